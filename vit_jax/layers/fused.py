"""Attention by a backend's own kernel, which never stores the weights."""

import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vit_jax.contracts import ROW_AXES, Array
from vit_jax.errors import ConfigError, nearest

VARIABLE = "VIT_JAX_ATTENTION"  # of the environment: a form
FORMS = ("plain", "fused")
BLOCK = 128  # tokens that the TPU's kernel takes at a time
# Keys from which it moves fewer bytes than the plain form, by the TPU's compiler:
# experiments/what_fits.
LEAST = 384


def form() -> str:
    """The form of attention that this process is told to compute where it fits, of `FORMS`.

    "fused" is cuDNN's kernel on an NVIDIA GPU and Pallas' on a TPU. Both are for float16 and
    bfloat16, heads of a multiple of 8 up to 128 channels, and attention without mask and dropout
    whose weights nobody looks at, that of a TPU without bias; everything else stays plain. Not the
    default: neither was ever run, for want of the machines.

    Raises:
      ConfigError: if `VIT_JAX_ATTENTION` names no form.
    """
    name = os.environ.get(VARIABLE, "plain")
    if name not in FORMS:
        raise ConfigError(f"{VARIABLE}={name} does not exist.{nearest(name, FORMS)}")
    return name


def kernel(query: Array, key: Array, bias: Array | None) -> Callable[..., jax.Array] | None:
    """What computes attention without mask and dropout of arrays like these.

    Args:
      query: [..., N, A, D].
      key: [..., M, A, D].
      bias: broadcasts to [..., A, N, M].

    Returns:
      A function of (query, key, value, bias, scale) that gives the attended values, in the shapes
      of `attention.attend`; None where that is the plain form.
    """
    channels, half = query.shape[-1], query.dtype in (jnp.float16, jnp.bfloat16)
    if not half or channels % 8 or channels > 128:
        return None
    machine = platform()
    if machine == "gpu":
        # Devices that share the rows would have to share those of the bias.
        alone = jax.sharding.get_abstract_mesh().size <= 1
        return cudnn if bias is None or alone or _of_all_rows(bias) else None
    if machine == "tpu" and bias is None and key.shape[-3] >= LEAST and _divides(query):
        return pallas
    return None


def _of_all_rows(bias: Array) -> bool:
    """Whether a bias of [..., A, N, M] is the same for all rows."""
    return math.prod(bias.shape[:-3]) == 1


def platform() -> str:
    """Of the devices that the program is for, which need not be there: "cpu", "gpu" or "tpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    known = not mesh.empty and mesh.abstract_device is not None
    return mesh.abstract_device.platform if known else jax.default_backend()


def _divides(query: Array) -> bool:
    """Whether the rows and the heads of [..., N, A, D] lie whole on the mesh around."""
    shape = jax.sharding.get_abstract_mesh().shape
    rows = math.prod(shape.get(name, 1) for name in ROW_AXES)
    return query.shape[0] % rows == 0 and query.shape[-2] % shape.get("tensor", 1) == 0


def _named(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function, compiled as one, under the name that `cost.count` knows."""

    def fused_attention(
        query: Array, key: Array, value: Array, bias: Array | None, scale: float
    ) -> jax.Array:
        return attend(query, key, value, bias, scale)

    return jax.jit(fused_attention, static_argnames="scale")


@_named
def cudnn(query: Array, key: Array, value: Array, bias: Array | None, scale: float) -> jax.Array:
    """By `jax.nn.dot_product_attention`; as `kernel` says. The bias is added in `query`'s dtype."""
    queries, keys = (x.shape[-3] for x in (query, key))
    rows = math.prod(query.shape[:-3])
    # JAX refuses the gradient of an odd number of tokens; one more, which is not looked at.
    lengths = {}
    if queries % 2 or keys % 2:
        lengths = {
            "query_seq_lengths": jnp.full(rows, queries, jnp.int32),
            "key_value_seq_lengths": jnp.full(rows, keys, jnp.int32),
        }

    def even(x: Array) -> jax.Array:
        """[..., N, A, D] -> [rows, N or N + 1, A, D]."""
        x = x.reshape(rows, *x.shape[-3:])
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    if bias is not None:
        leading, weights = query.shape[:-3], (query.shape[-2], queries, keys)
        if _of_all_rows(bias):
            leading, bias = (1,), bias.reshape(bias.shape[-3:])
        bias = jnp.broadcast_to(bias.astype(query.dtype), (*leading, *weights))
        bias = bias.reshape(-1, *weights)  # [1 or rows, A, N, M]
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, queries % 2), (0, keys % 2)))
    attended = jax.nn.dot_product_attention(
        even(query), even(key), even(value), bias, scale=scale, implementation="cudnn", **lengths
    )
    return attended[:, :queries].reshape(query.shape)


@_named
def pallas(query: Array, key: Array, value: Array, bias: None, scale: float) -> jax.Array:
    """By `flash_attention` of Pallas, on each device of a mesh by itself; as `kernel` says."""
    # Imported late: it takes half a second, and nobody else wants it.
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    rows = math.prod(query.shape[:-3])

    def blocks(x: Array) -> jax.Array:
        """[..., N, A, D] -> [rows, A, N up to whole blocks, D]."""
        x = x.reshape(rows, *x.shape[-3:]).swapaxes(1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % BLOCK), (0, 0)))

    def real(x: Array) -> jax.Array:
        """1 for each token, 0 for those that fill the last block, which it does not see."""
        tokens = x.shape[-3]
        of_row = jnp.arange(tokens + -tokens % BLOCK) < tokens
        return jnp.broadcast_to(of_row.astype(jnp.int32)[None], (rows, len(of_row)))

    def attend(
        query: Array, key: Array, value: Array, queries: Array | None, keys: Array | None
    ) -> jax.Array:
        seen = None if queries is None else SegmentIds(queries, keys)
        return flash_attention(query, key, value, segment_ids=seen, sm_scale=scale)

    whole = not (query.shape[-3] % BLOCK or key.shape[-3] % BLOCK)
    tokens = (None, None) if whole else (real(query), real(key))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:  # the compiler cannot divide a kernel by itself
        heads, places = PartitionSpec(ROW_AXES, "tensor"), PartitionSpec(ROW_AXES)
        attend = jax.shard_map(
            attend,
            in_specs=(heads, heads, heads, *[None if whole else places] * 2),
            out_specs=heads,
            check_vma=False,  # which a kernel does not declare
        )
    attended = attend(blocks(query), blocks(key), blocks(value), *tokens)
    return attended[:, :, : query.shape[-3]].swapaxes(1, 2).reshape(query.shape)
