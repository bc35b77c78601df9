"""What is each form of a hot place worth here? Beside the plain form, mostly with gradients.

    python experiments/benchmarks/forms.py

Each pair takes turns; numbers are medians in milliseconds. The last rows are one program compiled
twice, without and with `vit_jax.programs.options`.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit_jax import programs
from vit_jax.layers.activation import gelu
from vit_jax.layers.convolution import convolve
from vit_jax.layers.norm import BatchNorm, GroupNorm, LayerNorm

ROUNDS = 15
NORMS = 6  # in a row: one alone is mostly the reading of its input
VIT, SWIN, RESNET = (8, 197, 384), (8, 56, 56, 96), (8, 56, 56, 64)  # of B 8, 224x224 pixels
# Side, stride and channels of what ResNet-50 convolves last, of 64x64 and 32x32 pixels.
SMALL = ((2, 1, 512), (4, 2, 512), (2, 2, 512), (1, 1, 512))
# Of ResNet-50, of UPerNet's pyramid of 224x224 pixels, and its last sum of that.
LARGE = (((8, 14, 14, 256), 256), ((1, 56, 56, 512), 512), ((1, 56, 56, 2048), 512))


def normal(*shape: int) -> jax.Array:
    """Numbers that are the same in each run."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def value_and_gradients(function: Callable) -> Callable:
    """Of arrays and a direction -> what a training step needs of the function."""

    def both(direction: jax.Array, *arrays: jax.Array):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(direction)

    return both


def norms(theirs: nn.Module, ours: nn.Module, *shape: int) -> tuple[Callable, Callable, tuple]:
    """Rows of flax's norm and of ours, each on a branch as in a block, and their arguments."""
    x = normal(*shape)
    variables = dict(theirs.init(jax.random.key(0), x))
    params = [variables.pop("params")] * NORMS

    def row(module: nn.Module, x: jax.Array, params: list[dict]) -> jax.Array:
        for own in params:
            x = x + module.apply(variables | {"params": own}, x, mutable=["batch_stats"])[0]
        return x

    return *(value_and_gradients(partial(row, m)) for m in (theirs, ours)), (x, x, params)


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution as a contraction of one axis of four."""
    return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])


def windows(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution padded by one pixel, as XLA has it."""
    spec = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=spec
    )


def pairs() -> dict[str, tuple[Callable, Callable, tuple]]:
    """Name -> the plain form, ours, and what they are called with."""
    wide = normal(8, 197, 1536)
    x, kernel = normal(*RESNET), normal(1, 1, 64, 256)
    plain = partial(nn.gelu, approximate=False)
    layer = nn.LayerNorm(epsilon=1e-6), LayerNorm()
    found = {f"{NORMS} layer norms {list(shape)}": norms(*layer, *shape) for shape in (VIT, SWIN)}
    batch = (norm(use_running_average=False, momentum=0.9) for norm in (nn.BatchNorm, BatchNorm))
    found[f"{NORMS} batch norms {[*RESNET[:3], 256]}"] = norms(*batch, *RESNET[:3], 256)
    group = nn.GroupNorm(32), GroupNorm(32)
    found[f"{NORMS} group norms {[*RESNET[:3], 256]}"] = norms(*group, *RESNET[:3], 256)
    found[f"GELU {list(wide.shape)}"] = (
        *(value_and_gradients(f) for f in (plain, gelu)),
        (wide, wide),
    )
    found[f"1x1 convolution {list(RESNET)} to 256, among norms"] = (
        *(value_and_gradients(partial(normalised, f)) for f in (pointwise, convolve)),
        (normal(*RESNET[:3], 256), x, kernel),
    )
    for side, stride, channels in SMALL:
        x, kernel = normal(8, side, side, channels), normal(3, 3, channels, channels)
        out = normal(8, side // stride, side // stride, channels)
        found[f"3x3 convolution {list(x.shape)}, stride {stride}"] = (
            *(value_and_gradients(partial(f, stride=stride)) for f in (windows, padded)),
            (out, x, kernel),
        )
    for shape, channels in LARGE:
        x, kernel = normal(*shape), normal(3, 3, shape[-1], channels) / 50
        name = f"3x3 convolution {list(shape)} to {channels}"
        forms = [partial(f, stride=1) for f in (windows, padded)]
        found[f"{name}, value only"] = (*forms, (x, kernel))
        out = normal(*shape[:3], channels)
        found[name] = (*(value_and_gradients(f) for f in forms), (out, x, kernel))
    return found


def padded(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return convolve(x, kernel, stride, padding=1)


def normalised(convolution: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution between two things that XLA fuses with its gradient."""
    out = convolution(nn.relu(x), kernel)
    return nn.relu(out / jnp.sqrt((out * out).mean((0, 1, 2), keepdims=True) + 1e-5))


def products() -> dict[str, tuple[Callable, tuple]]:
    """Name -> a program of matrix products, and what it is called with."""

    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    def heads(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.einsum("band,bamd->banm", q, k)

    rows = normal(1576, 384)
    return {
        "dense [1576, 384] to 1536": (
            value_and_gradients(dense),
            (normal(1576, 1536), rows, normal(384, 1536)),
        ),
        f"3x3 convolution {list(RESNET)}": (
            value_and_gradients(partial(convolve, padding=1)),
            (normal(*RESNET), normal(*RESNET), normal(3, 3, 64, 64)),
        ),
        "heads [8, 6, 197, 64]": (
            value_and_gradients(heads),
            (normal(8, 6, 197, 197), normal(8, 6, 197, 64), normal(8, 6, 197, 64)),
        ),
        "windows [512, 3, 49, 32]": (
            value_and_gradients(heads),
            (normal(512, 3, 49, 49), normal(512, 3, 49, 32), normal(512, 3, 49, 32)),
        ),
    }


def beside(name: str, first: Callable, second: Callable, arguments: tuple) -> None:
    """Times two compiled programs in turns and prints a line."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 1):
        for program, kept in zip((first, second), times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if turn:
                kept.append(1000 * (time.perf_counter() - began))
    plain, ours = (statistics.median(kept) for kept in times)
    print(f"{name:60} {plain:8.2f} {ours:8.2f}   {plain / ours:5.2f}x", flush=True)


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    options = programs.options(jax.default_backend())
    print(f"{'':60} {'plain':>8} {'ours':>8}   ms on {jax.devices()[0].device_kind}")
    for name, (plain, ours, arguments) in pairs().items():
        compiled = (jax.jit(f).lower(*arguments).compile(options) for f in (plain, ours))
        beside(name, *compiled, arguments)
    for name, (program, arguments) in products().items():
        lowered = jax.jit(program).lower(*arguments)
        beside(f"options: {name}", lowered.compile(), lowered.compile(options), arguments)


if __name__ == "__main__":
    main()
