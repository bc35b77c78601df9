"""Maps of several sizes: from one to another, and a whole pyramid from a single map."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers.activation import gelu
from vit_jax.layers.convolution import Conv
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import BatchNorm, LayerNorm
from vit_jax.layers.position import resize_matrix

SCALES = (4, 2, 1, 0.5)


def nearest_indices(size: int, target: int) -> np.ndarray:
    """The entry that each of `target` takes from `size` by PyTorch's rule, floor(i * scale).

    In its arithmetic, float32. `jax.image.resize` rounds from the middle of a pixel instead, which
    takes other entries unless one size divides the other.
    """
    scale = np.float32(size) / np.float32(target)
    return np.minimum(np.floor(np.arange(target, dtype=np.float32) * scale), size - 1).astype(int)


def nearest(x: Array, size: tuple[int, int]) -> jax.Array:
    """Resamples rows and columns by `nearest_indices`: [B, H, W, ...] -> [B, *size, ...]."""
    if x.shape[1:3] == tuple(size):
        return jnp.asarray(x)
    rows, columns = (nearest_indices(old, new) for old, new in zip(x.shape[1:3], size, strict=True))
    return jnp.take(jnp.take(x, rows, axis=1), columns, axis=2)


def bilinear(x: Array, size: tuple[int, int]) -> jax.Array:
    """Resamples a map as PyTorch's `interpolate(mode="bilinear", align_corners=False)`, which does
    not average where it shrinks: [B, H, W, C] -> [B, *size, C] in the dtype of `x`.
    """
    if x.shape[1:3] == tuple(size):
        return jnp.asarray(x)
    rows, columns = (
        jnp.asarray(resize_matrix(old, new, "bilinear_torch"), x.dtype)
        for old, new in zip(x.shape[1:3], size, strict=True)
    )
    x = jnp.einsum("yh,bhwc->bywc", rows, x, precision="highest")
    return jnp.einsum("xw,bywc->byxc", columns, x, precision="highest")


def pool_matrix(size: int, bins: int) -> np.ndarray:
    """[bins, size]: each row is the mean over the entries that its share of the axis touches.

    Neighbours overlap by an entry where `bins` does not divide `size`: PyTorch's adaptive pooling.
    """
    matrix = np.zeros((bins, size))
    for i in range(bins):
        start, stop = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def pool(x: Array, bins: int) -> jax.Array:
    """Means of `bins` x `bins` parts of a map of any size: [B, H, W, C] -> [B, bins, bins, C]."""
    rows, columns = (jnp.asarray(pool_matrix(side, bins), x.dtype) for side in x.shape[1:3])
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, x, precision="highest")


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalisation, and a ReLU.

    Parameters: `conv`, `norm`; statistics of the norm are in `batch_stats`.

    Attributes:
      features: D.
      kernel: side of the square kernel; the map is padded so as to keep its size.
      momentum: what a training step keeps of the running statistics.
      epsilon: of the norm.
      dtype: of the computation; parameters stay float32.
    """

    features: int
    kernel: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, D]."""
        shared = {
            "use_bias": False,
            "dtype": self.dtype,
            "kernel_init": nn.initializers.he_normal(),
            "name": "conv",
        }
        if self.kernel == 1:
            x = Dense(self.features, **shared)(x)
        else:
            x = Conv(self.features, self.kernel, **shared)(x)
        x = BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name="norm",
        )(x)
        return nn.relu(x)


class SimplePyramid(nn.Module):
    """Maps of 4, 2, 1 and 1/2 times the size of a plain ViT's: Li et al. 2022, "Exploring Plain
    Vision Transformer Backbones for Object Detection" (arXiv:2203.16527), section 3.

    Each level starts from the same map: transposed convolutions with stride 2 enlarge it, a max
    pooling halves it; a 1x1 and a 3x3 convolution follow, each with a layer norm, as in the
    authors' code.

    Parameters: for each scale `level_1` .. `level_4` with what it has of `up1`, `up1_norm`, `up2`,
    and with `conv1`, `norm1`, `conv2`, `norm2`.

    Attributes:
      features: D of each level.
      epsilon: of the layer norms.
      dtype: of the computation; parameters stay float32.
    """

    features: int = 256
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[jax.Array, ...]:
        """[B, h, w, C] -> four maps [B, s h, s w, D] for s in 4, 2, 1, 1/2, the last rounded up.

        Raises:
          ValueError: if 4 does not divide C, which the largest map has a quarter of.
        """
        if x.shape[-1] % 4:
            raise ValueError(f"a pyramid needs a map whose channels 4 divides, not {x.shape[-1]}")
        levels = (
            PyramidLevel(scale, self.features, self.epsilon, self.dtype, name=f"level_{i}")
            for i, scale in enumerate(SCALES, 1)
        )
        return tuple(level(x) for level in levels)


class PyramidLevel(nn.Module):
    """One level of a `SimplePyramid`.

    Attributes:
      scale: of the map that comes out, one of `SCALES`.
      features: D.
      epsilon: of the layer norms.
      dtype: of the computation; parameters stay float32.
    """

    scale: float
    features: int
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, h, w, C] -> [B, scale * h, scale * w, D]."""
        channels = x.shape[-1]
        norm = partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)

        def double(features: int, name: str) -> nn.Module:
            side = (2, 2)
            return nn.ConvTranspose(features, side, side, "VALID", dtype=self.dtype, name=name)

        if self.scale == 0.5:
            # A row or column too many makes a pixel of its own: no part of the image is lost.
            x = nn.max_pool(x, (2, 2), (2, 2), [(0, side % 2) for side in x.shape[1:3]])
        if self.scale >= 2:
            x = double(channels // 2, "up1")(x)
        if self.scale == 4:
            x = gelu(norm(name="up1_norm")(x))
            x = double(channels // 4, "up2")(x)
        x = Dense(self.features, use_bias=False, dtype=self.dtype, name="conv1")(x)
        x = norm(name="norm1")(x)
        x = Conv(self.features, 3, use_bias=False, dtype=self.dtype, name="conv2")(x)
        return norm(name="norm2")(x)
