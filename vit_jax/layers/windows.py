"""Windows of a feature map and what attention inside them needs: Swin's geometry.

Liu et al. 2021, "Swin Transformer" (arXiv:2103.14030), section 3.2, and Liu et al. 2022, "Swin
Transformer V2" (arXiv:2111.09883), section 3.3. Windows are numbered row by row, and so are the
positions inside one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vit_jax.contracts import Array

SEPARATE = -100.0  # added to a logit between regions; the published value, not minus infinity


def pad_to_multiple(x: Array, step: int) -> jax.Array:
    """Zeros at the bottom and right, until `step` divides both sides: [B, H, W, C]."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % step), (0, -x.shape[2] % step), (0, 0)))


def partition(x: Array, window: int) -> jax.Array:
    """Cuts a map into windows: [B, H, W, C] -> [B, (H W) / window**2, window**2, C].

    `window` must divide H and W.
    """
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q) c", p=window, q=window)


def reverse(windows: Array, window: int, height: int, width: int) -> jax.Array:
    """Undoes `partition`: [B, n, window**2, C] -> [B, height, width, C]."""
    return rearrange(
        windows,
        "b (h w) (p q) c -> b (h p) (w q) c",
        h=height // window,
        w=width // window,
        p=window,
        q=window,
    )


def shift_regions(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Which pixels were neighbours before the map was rolled by (-shift, -shift): figure 4.

    Two pixels of one window may attend to each other where their numbers are equal.

    Returns:
      [n, window**2] int32 numbers 0..8, for a map of `height` x `width` that `window` divides.
    """

    def bands(size: int) -> np.ndarray:
        place = np.arange(size)
        return (place >= size - window).astype(np.int32) + (place >= size - shift)

    regions = 3 * bands(height)[:, None] + bands(width)[None]
    return rearrange(regions, "(h p) (w q) -> (h w) (p q)", p=window, q=window)


def shift_bias(height: int, width: int, window: int, shift: int) -> jax.Array:
    """`SEPARATE` between pixels that a cyclic shift brought together, else 0: float32 [n, N, N].

    N is `window`**2. Compared in the program, since the regions are N times smaller than the bias.
    """
    regions = jnp.asarray(shift_regions(height, width, window, shift))
    return jnp.where(regions[:, :, None] == regions[:, None, :], 0.0, SEPARATE)


def relative_bias(table: Array, window: int) -> jax.Array:
    """One learned number for each offset between query and key: eq. 4.

    Rows of the table are offsets (query - key) from (-(M-1), -(M-1)) to (M-1, M-1), row by row,
    where M is the window that the table was made for.

    Args:
      table: [(2M-1)**2, A].
      window: side of the windows, at most M. A smaller window reads the middle of the table, so
        that an offset keeps its number.

    Returns:
      [A, N, N] with N = window**2: heads, queries, keys.
    """
    side = round(len(table) ** 0.5)  # 2M - 1
    middle = side // 2
    square = jnp.reshape(table, (side, side, table.shape[1]))
    # A slice for each key's row, then for each key's column: the backward pass of a gather would
    # add N * N rows one after the other on a CPU.
    first = [middle - k for k in range(window)]
    square = jnp.stack([square[i : i + window] for i in first], 1)  # [p, k, side, A]
    square = jnp.stack([square[:, :, i : i + window] for i in first], 3)  # [p, k, q, l, A]
    return rearrange(square, "p k q l a -> a (p q) (k l)")


def log_offsets(window: int, made_for: int = 0) -> np.ndarray:
    """Offsets between two pixels of a window on a logarithmic scale: Swin V2, eq. 4.

    The authors' code first maps the largest offset to 8, which then becomes log2(9) / 3 = 1.057.

    Args:
      window: M, side of the windows.
      made_for: side of the windows whose largest offset that is, of pre-training; 0 is `window`.

    Returns:
      float32 [(2M - 1)**2, 2], (row, column) of query - key, in the order of `relative_bias`.
    """
    largest = max((made_for or window) - 1, 1)
    step = 8 * np.arange(1 - window, window) / largest
    scaled = np.sign(step) * np.log2(np.abs(step) + 1) / np.log2(8)
    grid = np.stack(np.meshgrid(scaled, scaled, indexing="ij"), -1)
    return rearrange(grid, "p q c -> (p q) c").astype(np.float32)


def within(
    attention: Callable[..., jax.Array], x: Array, bias: Array, window: int, shift: int
) -> jax.Array:
    """Attention inside the windows of a map: pads it, shifts it, cuts it, and undoes all that.

    The map is padded with zeros to whole windows, and shifted after that, as in the authors'
    detection code; the padded pixels are seen as keys.

    Args:
      attention: maps (tokens [B, n, N, C], bias=) to tokens.
      x: [B, H, W, C].
      bias: [A, N, N], N = `window`**2.
      window: side of the windows, in pixels.
      shift: how far down and right the windows lie, in pixels; 0 is not at all.

    Returns:
      [B, H, W, C].
    """
    height, width = x.shape[1:3]
    x = pad_to_multiple(x, window)
    padded = x.shape[1:3]
    if shift:
        x = jnp.roll(x, (-shift, -shift), (1, 2))
        bias = bias[None] + shift_bias(*padded, window, shift)[:, None]  # [n, A, N, N]
    x = attention(partition(x, window), bias=bias)
    x = reverse(x, window, *padded)
    if shift:
        x = jnp.roll(x, (shift, shift), (1, 2))
    return x[:, :height, :width]
