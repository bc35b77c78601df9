"""What one chip can do, as its vendor publishes it: the only such figures of the project."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The published figures of one accelerator; nothing here was measured.

    Attributes:
      name: how a topology calls it.
      flops: dense bfloat16 operations a second; a multiply-add counts 2, sparsity not.
      memory: bytes of its own memory.
      memory_bandwidth: bytes a second to and from that memory.
      link_bandwidth: bytes a second that the chip can send to its neighbours, over all its links
        together: half of what vendors call bidirectional.
      source: where the figures are published.
      tpu: whether `libtpu` compiles for it.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    source: str
    tpu: bool = True


_CLOUD = "Google Cloud, Cloud TPU documentation, TPU"
# The interconnect of v4 is not on Google's page but in the paper: 6 links of 50 GB/s.
_V4 = "Jouppi et al. 2023, TPU v4 (arXiv:2304.01433), table 4"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1200e9, 300e9, f"{_CLOUD} v4; links: {_V4}"),
        Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, f"{_CLOUD} v5e: 400 GB/s bidirectional"),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, f"{_CLOUD} v5p: 1200 GB/s bidirectional"),
        Chip("v6e", 918e12, 32 * GIB, 1600e9, 400e9, f"{_CLOUD} v6e: 800 GB/s bidirectional"),
        Chip(
            *("a100", 312e12, 80e9, 2039e9, 300e9),
            "NVIDIA A100 80GB SXM datasheet: NVLink 600 GB/s both ways",
            tpu=False,
        ),
        Chip(
            *("h100", 989e12, 80e9, 3350e9, 450e9),
            "NVIDIA H100 SXM datasheet, half of the sparse 1,979 TFLOPS: NVLink 900 GB/s both ways",
            tpu=False,
        ),
        Chip(
            *("h200", 989e12, 141e9, 4800e9, 450e9),
            "NVIDIA H200 SXM datasheet, half of the sparse 1,979 TFLOPS: NVLink 900 GB/s both ways",
            tpu=False,
        ),
    )
}
