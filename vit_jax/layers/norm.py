"""Layer, batch and group normalisation with gradients in the form that the backend runs fastest."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers.lift import lift


def _moments(
    x: Array, axes: int | tuple[int, ...], groups: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance in float32, with axes of length 1 in the place of `axes`; with `groups`,
    each channel has those of its group.
    """
    wide = x.astype(jnp.float32)
    mean, square = (_shared(y.mean(axes, keepdims=True), groups) for y in (wide, wide * wide))
    return mean, jnp.maximum(square - mean * mean, 0.0)


def _shared(x: Array, groups: int | None) -> jax.Array:
    """[..., C] -> [..., C]: each channel has the mean over its group, or over itself alone."""
    if groups is None:
        return x
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return jnp.broadcast_to(parts.mean(-1, keepdims=True), parts.shape).reshape(x.shape)


def _normalized(
    x: Array,
    scale: Array,
    bias: Array,
    epsilon: float,
    axes: int | tuple[int, ...],
    groups: int | None = None,
) -> tuple[jax.Array, jax.Array, tuple]:
    """The output, the variance that was divided by, and what a gradient needs."""
    mean, variance = _moments(x, axes, groups)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return _scaled(x, mean, inverse, scale, bias), variance, (x, scale, bias, mean, inverse)


def _scale_and_bias(norm: nn.Module, x: Array) -> tuple[jax.Array, jax.Array]:
    """A module's parameters for the channels of its input."""
    width = x.shape[-1:]
    scale = norm.param("scale", norm.scale_init, width)
    return scale, norm.param("bias", nn.initializers.zeros_init(), width)


def _scaled(x: Array, mean: Array, inverse: Array, scale: Array, bias: Array) -> jax.Array:
    """Normalised by a mean and the inverse of a deviation that lie as `x` does."""
    return (x.astype(jnp.float32) - mean) * (inverse * lift(scale, x)) + lift(bias, x)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> jax.Array:
    """Ba et al. 2016 (arXiv:1607.06450), eq. 4, over the last axis; float32 in any dtype.

    The gradient is written out, because a CPU otherwise stores the scale as often as there are
    tokens and passes over them three times as often as it needs to. Differentiable in reverse mode.
    Where no gradient is asked for, a CPU's compiler is kept from making one kernel of the sums and
    of the products before and behind them, in which the products are slower.

    Args:
      x: [..., D].
      scale: [D].
      bias: [D].
      epsilon: added to the variance.

    Returns:
      [..., D], float32.
    """
    apart = partial(jax.lax.platform_dependent, cpu=jax.lax.optimization_barrier, default=_same)
    x = apart(x)
    mean, variance = apart(_moments(x, -1))
    return _scaled(x, mean, jax.lax.rsqrt(variance + epsilon), scale, bias)


def _same(x: Any) -> Any:
    return x


def _forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[jax.Array, tuple]:
    out, _, saved = _normalized(x, scale, bias, epsilon, -1)
    return out, saved


def _backward(epsilon: float, saved: tuple, gradient: Array) -> tuple:
    x, scale, bias, mean, inverse = saved
    normal = (x.astype(jnp.float32) - mean) * inverse
    product, level, slope = jax.lax.platform_dependent(
        gradient, normal, scale, cpu=_stored, default=_fused
    )
    moved = gradient * lift(scale, x) - (level + normal * slope) / x.shape[-1]
    tokens = tuple(range(x.ndim - 1))
    to_scale, to_bias = product.sum(tokens), gradient.sum(tokens)
    to_x = (inverse * moved).astype(x.dtype)
    return to_x, to_scale.astype(scale.dtype), to_bias.astype(bias.dtype)


def _stored(gradient: Array, normal: Array, scale: Array) -> tuple[jax.Array, ...]:
    """Gradient times normalised input, stored, since three sums read it; and two, as products."""
    product = jax.lax.optimization_barrier(gradient * normal)
    return product, (gradient @ scale)[..., None], (product @ scale)[..., None]


def _fused(gradient: Array, normal: Array, scale: Array) -> tuple[jax.Array, ...]:
    """The same where a compiler makes one pass of it all."""
    product = gradient * normal
    scale = lift(scale, product)
    level, slope = ((y * scale).sum(-1, keepdims=True) for y in (gradient, product))
    return product, level, slope


layer_norm.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
    """`flax.linen.LayerNorm` with its parameters `scale` and `bias`, by `layer_norm`.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result; parameters and the computation stay float32.
      scale_init: what the scales start at.
    """

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return layer_norm(x, *_scale_and_bias(self, x), self.epsilon).astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1, over all axes but the last.

    The gradient is written out, because a CPU otherwise stores the centred input to sum it once.
    Differentiable in reverse mode, not through the statistics that it returns.

    Args:
      x: [..., C].
      scale: [C].
      bias: [C].
      epsilon: added to the variance.

    Returns:
      [..., C], and of the batch the mean and the variance, not corrected, [C]; all float32.
    """
    return _batch_forward(x, scale, bias, epsilon)[0]


def _batch_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[tuple, tuple]:
    out, variance, saved = _normalized(x, scale, bias, epsilon, tuple(range(x.ndim - 1)))
    *_, mean, _ = saved
    return (out, mean.ravel(), variance.ravel()), saved


def _batch_backward(epsilon: float, saved: tuple, gradients: tuple) -> tuple:
    x, scale, bias, mean, inverse = saved
    gradient, wide = gradients[0], x.astype(jnp.float32)
    rows = tuple(range(x.ndim - 1))
    to_bias = gradient.sum(rows, keepdims=True)
    to_scale = ((gradient * wide).sum(rows, keepdims=True) - mean * to_bias) * inverse
    count = x.size // x.shape[-1]
    moved = gradient - to_bias / count - (wide - mean) * (inverse * to_scale / count)
    to_x = (moved * (inverse * lift(scale, x))).astype(x.dtype)
    return to_x, to_scale.ravel().astype(scale.dtype), to_bias.ravel().astype(bias.dtype)


batch_norm.defvjp(_batch_forward, _batch_backward)


class BatchNorm(nn.Module):
    """`flax.linen.BatchNorm` with its parameters `scale` and `bias`, and `mean` and `var` in the
    collection `batch_stats`, by `batch_norm`.

    Attributes:
      use_running_average: normalises with the statistics of earlier batches and leaves them as they
        are.
      momentum: what is kept of those at each batch.
      epsilon: added to the variance.
      dtype: of the result; parameters, statistics and the computation stay float32.
      scale_init: what the scales start at.
    """

    use_running_average: bool
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[..., C] -> [..., C]."""
        size = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, size)
        var = self.variable("batch_stats", "var", jnp.ones, size)
        scale, bias = _scale_and_bias(self, x)
        if self.use_running_average:
            inverse = jax.lax.rsqrt(var.value + self.epsilon)
            out = _scaled(x, lift(mean.value, x), lift(inverse, x), scale, bias)
            return out.astype(self.dtype)
        out, *found = batch_norm(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            for kept, new in zip((mean, var), found, strict=True):
                kept.value = self.momentum * kept.value + (1 - self.momentum) * new
        return out.astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(x: Array, scale: Array, bias: Array, groups: int, epsilon: float) -> jax.Array:
    """Wu and He 2018 (arXiv:1803.08494), eq. 7: over all pixels and a group of channels of a row.

    The gradient is written out, and every sum is first one of a single channel: a CPU otherwise
    stores the centred input, and reads it once more for each sum. Differentiable in reverse mode.

    Args:
      x: [B, ..., C].
      scale: [C].
      bias: [C].
      groups: must divide C.
      epsilon: added to the variance.

    Returns:
      [B, ..., C], float32.
    """
    return _group_forward(x, scale, bias, groups, epsilon)[0]


def _group_forward(
    x: Array, scale: Array, bias: Array, groups: int, epsilon: float
) -> tuple[jax.Array, tuple]:
    out, _, saved = _normalized(x, scale, bias, epsilon, tuple(range(1, x.ndim - 1)), groups)
    return out, saved


def _group_backward(groups: int, epsilon: float, saved: tuple, gradient: Array) -> tuple:
    x, scale, bias, mean, inverse = saved
    wide, pixels = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
    to_bias = gradient.sum(pixels, keepdims=True)  # of each row
    to_scale = ((gradient * wide).sum(pixels, keepdims=True) - mean * to_bias) * inverse
    count = x.size // (x.shape[0] * x.shape[-1])
    level, slope = (_shared(y * lift(scale, x), groups) / count for y in (to_bias, to_scale))
    moved = gradient * lift(scale, x) - level - (wide - mean) * (inverse * slope)
    to_scale, to_bias = (y.reshape(-1, y.shape[-1]).sum(0) for y in (to_scale, to_bias))
    to_x = (inverse * moved).astype(x.dtype)
    return to_x, to_scale.astype(scale.dtype), to_bias.astype(bias.dtype)


group_norm.defvjp(_group_forward, _group_backward)


class GroupNorm(nn.Module):
    """`flax.linen.GroupNorm` with its parameters `scale` and `bias`, by `group_norm`.

    Attributes:
      groups: of channels that stand side by side.
      epsilon: added to the variance.
      dtype: of the result; parameters and the computation stay float32.
      scale_init: what the scales start at.
    """

    groups: int = 32
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, ..., C] -> [B, ..., C]; ValueError if the groups do not divide C."""
        if x.shape[-1] % self.groups:
            raise ValueError(f"groups={self.groups} must divide the {x.shape[-1]} channels")
        return group_norm(x, *_scale_and_bias(self, x), self.groups, self.epsilon).astype(
            self.dtype
        )
