"""Where a token lies: learned positions, resampled for other grids, and fixed sin-cos ones."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.errors import nearest


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(a: float):
    """Keys 1981, "Cubic convolution interpolation for digital image processing", eq. 4, 15."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    return kernel


# Published answers to the same question, which differ by more than float noise: weights give their
# published numbers at another resolution only with their own.
RESIZERS = {  # name: kernel, antialias, align corners, what is added to the target's size
    "align_corners": (_triangle, False, True, 0.0),
    "bilinear": (_triangle, True, False, 0.0),
    "bilinear_torch": (_triangle, False, False, 0.0),
    "bicubic": (_cubic(-0.5), True, False, 0.0),
    "bicubic_torch": (_cubic(-0.75), False, False, 0.0),
    "bicubic_dinov2": (_cubic(-0.75), False, False, 0.1),
}


def resize_matrix(size: int, target: int, method: str) -> np.ndarray:
    """The matrix [target, size] that resamples one axis; its rows sum to one.

    Args:
      size: entries now.
      target: entries wanted.
      method: one of `RESIZERS`.
        `align_corners`: linear, with the outermost entries kept: Google's fine-tuning of ViT, by
        `scipy.ndimage.zoom(order=1)`.
        `bilinear`, `bicubic`: entries are pixels with an extent, and shrinking averages over all
        of them: `jax.image.resize`, and PyTorch's with `antialias=True`; timm takes the latter.
        `bilinear_torch`: PyTorch's without antialias: BEiT's tables in transformers.
        `bicubic_torch`: PyTorch's bicubic without antialias, another kernel (a = -0.75), which
        CLIP, MAE, Swin's loader and transformers' ViT use.
        `bicubic_dinov2`: that one, stretched as if the target had a tenth of an entry more: the
        code that DINOv2 was published with.

    Raises:
      ValueError: on an unknown method, with the nearest one.
    """
    if method not in RESIZERS:
        raise ValueError(f"resize={method!r} does not exist.{nearest(method, RESIZERS)}")
    kernel, antialias, corners, more = RESIZERS[method]
    rows = np.arange(target)
    if corners:
        centre = rows * ((size - 1) / max(target - 1, 1))
    else:
        centre = (rows + 0.5) * (size / (target + more)) - 0.5
    if antialias:
        wide = max(size / target, 1.0)
        matrix = kernel((centre[:, None] - np.arange(size)[None]) / wide)
        return matrix / matrix.sum(1, keepdims=True)
    matrix = np.zeros((target, size))
    for tap in range(-1, 3):
        column = np.floor(centre).astype(int) + tap
        # Beyond the edge its last entry goes on.
        np.add.at(matrix, (rows, np.clip(column, 0, size - 1)), kernel(centre - column))
    return matrix


def resize_grid(grid: Array, size: tuple[int, int], method: str = "align_corners") -> jax.Array:
    """Resamples a map: [h, w, D] -> [*size, D] in the dtype of `grid`.

    Two small matrix products, since each method is linear and treats the axes apart.

    Args:
      grid: [h, w, D].
      size: the new (h, w).
      method: see `resize_matrix`.

    Raises:
      ValueError: on an unknown method, with the nearest one.
    """
    rows, columns = (
        jnp.asarray(resize_matrix(old, new, method), grid.dtype)
        for old, new in zip(grid.shape[:2], size, strict=True)
    )
    if grid.shape[:2] == tuple(size):
        return jnp.asarray(grid)
    return jnp.einsum("yh,xw,hwd->yxd", rows, columns, grid, precision="highest")


class LearnedPositions(nn.Module):
    """A learned vector for each place: Dosovitskiy et al. 2021 (arXiv:2010.11929), eq. 1.

    The vectors of the image are kept as a map, so that another resolution can resample them
    (section 3.2); those of tokens without a place, such as the class token, stay as they are.

    Parameters: `grid` [h, w, D], and `token` [tokens, D] where there are tokens.

    Attributes:
      grid: (h, w) that the vectors are made for.
      width: D.
      tokens: how many tokens come before those of the image.
      resize: how to resample, a name of `RESIZERS`.
    """

    grid: tuple[int, int]
    width: int
    tokens: int = 0
    resize: str = "align_corners"

    @nn.compact
    def __call__(self, size: tuple[int, int]) -> jax.Array:
        """Positions [tokens + h * w, D] for a grid of `size` (h, w), row by row."""
        init = nn.initializers.normal(0.02)
        grid = self.param("grid", init, (*self.grid, self.width))
        grid = resize_grid(grid, size, self.resize).reshape(-1, self.width)  # [h w, D]
        if not self.tokens:
            return grid
        return jnp.concatenate([self.param("token", init, (self.tokens, self.width)), grid])


def sincos_positions(height: int, width: int, channels: int, *, closed: bool = False) -> np.ndarray:
    """Fixed two-dimensional positions: Chen et al. 2021, "MoCo v3" (arXiv:2104.02057), section 5.

    Sines, then cosines, of the column, then of the row: [sin x, cos x, sin y, cos y], each at D / 4
    frequencies from 1 towards 1/10000. That is the order of MAE's published weights and of
    big_vision; MoCo v3's own code, on a square image, has the row first by a slip in its mesh grid,
    and so have its weights.

    Args:
      height: h of the grid.
      width: w of the grid.
      channels: D.
      closed: whether the lowest frequency is 1/10000 itself, as in big_vision.

    Returns:
      float32 [h * w, D], row by row.

    Raises:
      ValueError: if 4 does not divide `channels`.
    """
    if channels % 4:
        raise ValueError(f"sin-cos positions need a width that 4 divides, not {channels}")
    number = channels // 4
    frequencies = 10_000.0 ** -(np.arange(number) / (max(number - 1, 1) if closed else number))
    y, x = np.divmod(np.arange(height * width), width)
    angles = [place[:, None] * frequencies[None] for place in (x, y)]  # each [h w, D/4]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(waves, 1).astype(np.float32)
