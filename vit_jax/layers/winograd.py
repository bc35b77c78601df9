"""3x3 convolutions, and their gradients, with less than half of the multiplications, on a CPU."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from vit_jax.contracts import Array

Line = list[Array]
Grid = list[Line]  # [row][column]

# Below so many channels the sums around the products cost what these save, and below so many
# pixels those of the kernel do: experiments/benchmarks.
CHANNELS = 128
PIXELS = 1024
# Bytes of the tiles that are made at a time, which are four times their pixels: those of all
# pictures, or of a strip of one.
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
    numbers of a tile, so that an output takes 4 multiplications for each channel instead of 9. Both
    gradients take as many. On every platform but a CPU it is the plain convolution.

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
    return winograd(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.platform_dependent(
        *saved, gradient, cpu=_tiled_gradients, default=_plain_gradients
    )


winograd.defvjp(_forward, _backward)


def _plain_gradients(x: Array, kernel: Array, gradient: Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(_plain, x, kernel)[1](gradient)


def _tiled(x: Array, kernel: Array) -> jax.Array:
    return _convolved(x, _weights(kernel), _strips(x.shape))


def _tiled_gradients(x: Array, kernel: Array, gradient: Array) -> tuple[jax.Array, jax.Array]:
    # An input reaches the outputs through the kernel turned by half a circle, and the weights of
    # that are the kernel's in another order: G of (g2, g1, g0) swaps the first and the last.
    weights, turned = _weights(kernel), (3, 1, 2, 0)
    weights = [[weights[i][j].T for j in turned] for i in turned]
    for_x = _convolved(gradient, weights, _strips(gradient.shape))
    for_kernel = jax.linear_transpose(_weights, kernel)(_correlated(x, gradient))[0]
    return for_x, for_kernel


def _strips(shape: tuple[int, ...]) -> int:
    """In how many strips each of the pictures [B, H, W, C] is cut; 0: the batch is one part."""
    batch, height, width, channels = shape
    picture = 16 * -(-height // 2) * -(-width // 2) * channels * 4  # bytes of float32
    return 0 if batch * picture <= TILES else -(-picture // TILES)


def _cut(x: Array, strips: int, border: int) -> jax.Array:
    """[B, H, W, C] -> [parts, b, 2 h + 2 border, 2 w + 2 border, C], with zeros around."""
    height, width = x.shape[1:3]
    h, w = -(-height // 2), -(-width // 2)  # tiles
    high = -(-h // max(1, strips))
    tops = range(0, 2 * h, 2 * high)
    zeros = border + 2 * high * len(tops) - height, border + 2 * w - width
    x = jnp.pad(x, ((0, 0), (border, zeros[0]), (border, zeros[1]), (0, 0)))
    x = jnp.stack([x[:, top : top + 2 * high + 2 * border] for top in tops], 1)
    return rearrange(x, "b s h w c -> (b s) 1 h w c" if strips else "b 1 h w c -> 1 b h w c")


def _convolved(x: Array, weights: Grid, strips: int) -> jax.Array:
    """[B, H, W, C] and the `_weights` of a kernel -> [B, H, W, D]."""
    out = jax.lax.map(partial(_products, weights=weights), _cut(x, strips, 1))
    strips = out.shape[0] * out.shape[1] // x.shape[0]
    out = rearrange(out, "(b s) k h w d -> (b k) (s h) w d", s=strips)
    return out[:, : x.shape[1], : x.shape[2]]


def _products(x: Array, weights: Grid) -> jax.Array:
    """[b, 2 h + 2, 2 w + 2, C] and the `_weights` of a kernel -> [b, 2 h, 2 w, D]."""
    h, w = (side // 2 - 1 for side in x.shape[1:3])
    tiles = jax.tree.map(jnp.matmul, _tiles(x), weights)
    out = jnp.stack([jnp.stack(row) for row in _both(_outputs, tiles)])
    return rearrange(out, "p q (b h w) d -> b (h p) (w q) d", h=h, w=w)


def _correlated(x: Array, gradient: Array) -> Grid:
    """[B, H, W, C] and the gradient of [B, H, W, D] -> the gradient of `_weights`."""
    strips = max(_strips(x.shape), _strips(gradient.shape))
    parts = _cut(x, strips, 1), _cut(gradient, strips, 0)

    def add(total: Grid, part: tuple[Array, Array]) -> tuple[Grid, None]:
        pixels, grad = part
        grads = [[grad[:, p::2, q::2] for q in range(2)] for p in range(2)]
        tiles = _tiles(pixels), _listed(_both(_spread, grads))
        return jax.tree.map(lambda t, d, m: t + d.T @ m, total, *tiles), None

    zeros = jnp.zeros((x.shape[-1], gradient.shape[-1]), x.dtype)
    total, _ = jax.lax.scan(add, [[zeros] * 4] * 4, parts)
    return total


def _tiles(x: Array) -> Grid:
    """B' d B of all tiles: [b, 2 h + 2, 2 w + 2, C] -> 4x4 arrays [b h w, C]."""
    h, w = (side - 2 for side in x.shape[1:3])
    pixels = [[x[:, i : i + h : 2, j : j + w : 2] for j in range(4)] for i in range(4)]
    return _listed(_both(_pixels, pixels))


def _listed(grid: Grid) -> Grid:
    return jax.tree.map(lambda tile: rearrange(tile, "b h w c -> (b h w) c"), grid)


def _weights(kernel: Array) -> Grid:
    """G g G' of a kernel [3, 3, C, D]: 4x4 matrices [C, D]."""
    return _both(_kernel, [list(row) for row in kernel])


def _both(transform: Callable[[Line], Line], grid: Grid) -> Grid:
    """A transform of the columns of a grid, and then of its rows."""
    rows = zip(*[transform(list(column)) for column in zip(*grid, strict=True)], strict=True)
    return [transform(list(row)) for row in rows]


def _pixels(d: Line) -> Line:
    """B' d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _kernel(g: Line) -> Line:
    """G g."""
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _outputs(m: Line) -> Line:
    """A' m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _spread(y: Line) -> Line:
    """A y, the gradient of `_outputs`."""
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]
