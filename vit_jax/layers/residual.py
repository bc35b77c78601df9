"""Residual networks: convolutions with standardised weights, bottlenecks, a hybrid ViT's CNN."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.errors import nearest
from vit_jax.layers.convolution import convolve
from vit_jax.layers.norm import GroupNorm
from vit_jax.layers.pooling import max_pool
from vit_jax.layers.remat import recomputed

# Where the epsilon of standardised weights goes, and the group norms' own: weights of usual size
# move by up to 1e-3 between the two.
SOURCES = {  # name: epsilon on the deviation, epsilon on the variance, epsilon of the norms
    "google": (1e-5, 0.0, 1e-6),
    "timm": (0.0, 1e-8, 1e-5),
}


def standardize(kernel: Array, epsilon: float = 1e-5, inside: float = 0.0) -> jax.Array:
    """Mean 0 and deviation 1 of the weights behind each output: [k, k, C, D] -> [k, k, C, D].

    Qiao et al. 2019 (arXiv:1903.10520), eq. 2. Google adds `epsilon` to the deviation; timm adds
    one to the variance, `inside` the root.
    """
    mean = kernel.mean((0, 1, 2), keepdims=True)
    variance = kernel.var((0, 1, 2), keepdims=True)
    return (kernel - mean) / (jnp.sqrt(variance + inside) + epsilon)


class StdConv(nn.Module):
    """A convolution without bias, with standardised weights: `standardize`, `convolve`.

    Attributes:
      features: D.
      kernel: side of the square kernel.
      stride: step between outputs, in pixels.
      padding: zeros on all sides, or "SAME".
      source: whose epsilon, a name of `SOURCES`.
      dtype: of the convolution; weights are standardised in float32.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: int | str = "SAME"
    source: str = "google"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, D]."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = standardize(kernel, *SOURCES[self.source][:2])
        return convolve(x.astype(self.dtype), kernel, self.stride, self.padding)


def joined(shortcut: Array, y: Array) -> jax.Array:
    """relu(shortcut + y), the end of a block: He et al. 2016 (arXiv:1512.03385), eq. 1.

    The result is the same to the last bit, in a form that XLA computes once on a CPU. A relu or
    another function of one array it computes again in each reader instead of storing it, so that a
    block would read what all blocks before it in its stage have added. A sum of two arrays it
    stores, if one of those who read it is a product or a convolution.

    Args:
      shortcut: [..., C], finite or infinite upwards.
      y: the same shape.

    Returns:
      The same shape; both gradients are the result's where that is positive, 0 elsewhere.
    """
    return _joined(*nn.dtypes.promote_dtype(shortcut, y))


@jax.custom_vjp
def _joined(shortcut: Array, y: Array) -> jax.Array:
    return jnp.maximum(y, -shortcut) + shortcut


def _forward(shortcut: Array, y: Array) -> tuple[jax.Array, jax.Array]:
    out = _joined(shortcut, y)
    return out, out


def _backward(out: Array, gradient: Array) -> tuple[jax.Array, jax.Array]:
    gradient = jnp.where(out > 0, gradient, 0)
    return gradient, gradient


_joined.defvjp(_forward, _backward)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution around a shortcut: He et al. 2016 (arXiv:1512.03385),
    figure 5, with the stride in the 3x3 ("v1.5"). The last norm starts at 0, the block at its
    shortcut: Goyal et al. 2017 (arXiv:1706.02677), section 5.1.

    Attributes:
      features: width of the 3x3; the block returns four times as many.
      conv: makes a convolution from (features, kernel, stride, name=).
      norm: makes a norm from (scale_init=, name=).
      stride: of the 3x3 and of the shortcut.
    """

    features: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, 4 * features]."""
        shortcut = x
        if self.stride != 1 or x.shape[-1] != 4 * self.features:
            shortcut = self.conv(4 * self.features, 1, self.stride, name="shortcut_conv")(x)
            shortcut = self.norm(name="shortcut_norm")(shortcut)
        y = self.conv(self.features, 1, 1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(4 * self.features, 1, 1, name="conv3")(y)
        y = self.norm(scale_init=nn.initializers.zeros, name="norm3")(y)
        # As rows the next block's 1x1 convolution, a product, reads the sum itself.
        rows = (-1, y.shape[-1])
        return joined(shortcut.reshape(rows), y.reshape(rows)).reshape(y.shape)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: He et al. 2016, figure 5, of the shallow networks.
    The last norm starts at 0, as in `Bottleneck`.

    Attributes:
      features: of both, and of what the block returns.
      conv: makes a convolution from (features, kernel, stride, name=).
      norm: makes a norm from (scale_init=, name=).
      stride: of the first 3x3 and of the shortcut.
    """

    features: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, features]."""
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = self.conv(self.features, 1, self.stride, name="shortcut_conv")(x)
            shortcut = self.norm(name="shortcut_norm")(shortcut)
        y = self.conv(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, 3, 1, name="conv2")(y)
        y = self.norm(scale_init=nn.initializers.zeros, name="norm2")(y)
        return joined(shortcut, y)


class ResidualStage(nn.Module):
    """Bottlenecks in a row, or other blocks: He et al. 2016, table 1.

    Parameters: `block_0`, `block_1`, ...

    Attributes:
      features: of each block.
      blocks: how many there are.
      conv: makes a convolution from (features, kernel, stride, name=), and from dilation= where
        that is not 1.
      norm: makes a norm from (scale_init=, name=).
      stride: of the first.
      remat: what is recomputed of each block in the backward pass: `layers.remat`.
      block: the class of the blocks.
      dilation: of the convolutions in all blocks but the first.
    """

    features: int
    blocks: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    stride: int = 1
    remat: bool | str = False
    block: type[nn.Module] = Bottleneck
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, 4 * features], or `features` with a `BasicBlock`."""
        block = recomputed(self.block, self.remat)
        for i in range(self.blocks):
            stride, conv = (self.stride if i == 0 else 1), self.conv
            if i > 0 and self.dilation != 1:
                conv = partial(conv, dilation=self.dilation)
            x = block(self.features, conv, self.norm, stride, name=f"block_{i}")(x)
        return x


class HybridStem(nn.Module):
    """The CNN in front of a hybrid ViT: Dosovitskiy et al. 2021 (arXiv:2010.11929), section 3.1.

    A ResNet with standardised weights and group norms, as in Kolesnikov et al. 2020, "BiT"
    (arXiv:1912.11370), but with the norms behind the convolutions. All padding is "SAME".

    Parameters: `root_conv`, `root_norm`, and `stage_1`, ... with `block_0`, ... each.

    Attributes:
      sizes: bottlenecks of each stage; () is the root alone.
      width: features of the root; 32 groups must divide it.
      source: whose epsilons, a name of `SOURCES`: "google" trained the published weights, "timm"
        computes with its own.
      remat: what is recomputed of each bottleneck in the backward pass: `layers.remat`.
      dtype: of the computation; parameters stay float32.
    """

    sizes: Sequence[int]
    width: int = 64
    source: str = "google"
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @staticmethod
    def stride(sizes: Sequence[int]) -> int:
        """Pixels of the image for one of the map: 4, and 2 more times with each later stage."""
        return 4 * 2 ** max(len(sizes) - 1, 0)

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, H, W, 3] -> [B, ceil(H / stride), ceil(W / stride), C].

        C is 4 * width with the first stage, twice that with each later one, width without any.

        Raises:
          ValueError: if 32 groups do not divide `width`, a stage has no bottleneck, or there is no
            such source.
        """
        if self.width % 32 or self.width < 32:
            raise ValueError(f"stem_width={self.width} must be a multiple of the 32 groups")
        if any(size < 1 for size in self.sizes):
            raise ValueError(
                f"stem={tuple(self.sizes)} must name at least one block for each stage"
            )
        if self.source not in SOURCES:
            raise ValueError(
                f"stem_source={self.source!r} does not exist.{nearest(self.source, SOURCES)}"
            )
        conv = partial(StdConv, source=self.source, dtype=self.dtype)
        norm = partial(GroupNorm, 32, epsilon=SOURCES[self.source][2], dtype=self.dtype)
        x = nn.relu(norm(name="root_norm")(conv(self.width, 7, 2, name="root_conv")(x)))
        x = max_pool(x, "SAME")
        for i, blocks in enumerate(self.sizes):
            stride = 1 if i == 0 else 2
            x = ResidualStage(
                self.width * 2**i, blocks, conv, norm, stride, self.remat, name=f"stage_{i + 1}"
            )(x)
        return x
