"""3x3 convolutions with less than half of the multiplications, on a CPU, without gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from vit_jax.contracts import Array
from vit_jax.layers.portions import looped

Line = list[Array]

# Below so many channels the sums around the products cost what these save, and below so many
# pixels those of the kernel do: experiments/benchmarks.
CHANNELS = 128
PIXELS = 1024
# Bytes of the tiles that are made at a time, which are four times their pixels: all pictures', or
# one's, or a strip of it.
TILES = 64 * 2**20


def pays(x: Array, kernel: Array) -> bool:
    """Whether `winograd` is the faster form on a CPU, for x [B, H, W, C], kernel [k, k, C, D]."""
    if not all(isinstance(side, int) for side in x.shape) or x.dtype != jnp.float32:
        return False
    batch, height, width, _ = x.shape
    return (
        kernel.shape[:2] == (3, 3)
        and min(kernel.shape[2:]) >= CHANNELS
        and batch * height * width >= PIXELS
        and jax.sharding.get_abstract_mesh().size <= 1
    )


@jax.custom_vjp
def winograd(x: Array, kernel: Array) -> jax.Array:
    """A 3x3 convolution with stride 1 and a pixel of zeros around, by tiles of 2x2 outputs.

    F(2x2, 3x3) of Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks"
    (arXiv:1509.09308), section 4.1: Y = A' [(G g G') * (B' d B)] A for a tile of 4x4 pixels d and a
    kernel g. Over all tiles and channels the product * is one matrix product for each of the 16
    numbers of a tile, so that an output takes 4 multiplications for each channel instead of 9.
    Where a gradient is asked for, and on every platform but a CPU, it is the plain convolution.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, D].

    Returns:
      [B, H, W, D]; differentiable once, in reverse mode.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_tiled, default=_plain)


def _plain(x: Array, kernel: Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _forward(x: Array, kernel: Array) -> tuple[jax.Array, tuple[Array, Array]]:
    return _plain(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(_plain, *saved)[1](gradient)


winograd.defvjp(_forward, _backward)


def _tiled(x: Array, kernel: Array) -> jax.Array:
    weights = [_weights(list(row)) for row in _weights(list(kernel))]
    batch, height, width, channels = x.shape
    h, w = -(-height // 2), -(-width // 2)  # tiles
    picture = 16 * h * w * channels * x.dtype.itemsize
    whole = batch * picture <= TILES
    high = h if whole else -(-h // -(-picture // TILES))  # rows of tiles in a strip
    strips = -(-h // high)
    zeros = 1 + 2 * strips * high - height, 1 + 2 * w - width
    x = jnp.pad(x, ((0, 0), (1, zeros[0]), (1, zeros[1]), (0, 0)))
    x = jnp.stack([x[:, i : i + 2 * high + 2] for i in range(0, 2 * h, 2 * high)], 1)
    x = rearrange(x, "b s h w c -> (b s) h w c")
    apply = partial(_strips, weights=weights)
    out = apply(x) if whole else looped(apply, x, 1)
    return rearrange(out, "(b s) h w d -> b (s h) w d", s=strips)[:, :height, :width]


def _strips(x: Array, weights: list[Line]) -> jax.Array:
    """[b, 2 h + 2, 2 w + 2, C] and what `_weights` makes of a kernel -> [b, 2 h, 2 w, D]."""
    h, w = (side // 2 - 1 for side in x.shape[1:3])
    out = []
    for row, line in zip(
        _pixels([x[:, i : i + 2 * h : 2] for i in range(4)]), weights, strict=True
    ):
        tiles = _pixels([row[:, :, i : i + 2 * w : 2] for i in range(4)])
        tiles = [rearrange(tile, "b h w c -> (b h w) c") for tile in tiles]
        out.append(_outputs([tile @ k for tile, k in zip(tiles, line, strict=True)]))
    columns = [jnp.stack(_outputs(list(column))) for column in zip(*out, strict=True)]
    return rearrange(jnp.stack(columns), "q p (b h w) d -> b (h p) (w q) d", h=h, w=w)


def _pixels(d: Line) -> Line:
    """B' d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _weights(g: Line) -> Line:
    """G g."""
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _outputs(m: Line) -> Line:
    """A' m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
