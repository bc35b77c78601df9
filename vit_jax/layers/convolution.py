"""Convolutions in the form that the backend runs fastest."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers.winograd import pays, winograd


def convolve(
    x: Array, kernel: Array, stride: int = 1, padding: int | str = "SAME", dilation: int = 1
) -> jax.Array:
    """A convolution, in a CPU's fastest form.

    Where the kernel has one pixel that is a matrix product, on every backend: a CPU takes half the
    time. Where the result has fewer pixels than the kernel, as the last maps of a network have on
    small images, XLA leaves a CPU's library of convolutions, here or in the gradient, for loops
    that take twenty times as long; there it is the product of all pixels that an output sees with
    the kernel. That choice falls when the program is lowered for its platform.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C, D].
      stride: step between outputs, in pixels.
      padding: zeros on all four sides, in pixels; "SAME" is TensorFlow's, which gives
        ceil(H / stride) rows and puts the odd zero at the bottom and the right. PyTorch's networks
        pad k // 2 on all sides, which is another network where the stride is 2.
      dilation: step between the pixels that the kernel sees, on both axes.

    Returns:
      [B, h, w, D] in the dtype of `x`.
    """
    kernel = kernel.astype(x.dtype)
    if kernel.shape[:2] == (1, 1) and padding in ("SAME", 0):
        x = x[:, ::stride, ::stride]
        # One list of pixels, as in `layers.dense`: the gradient of the kernel is a plain product.
        pixels = rearrange(x, "b h w c -> (b h w) c")
        return (pixels @ kernel[0, 0]).reshape(*x.shape[:3], kernel.shape[3])
    if isinstance(padding, str):
        seen = [(side - 1) * dilation + 1 for side in kernel.shape[:2]]
        padding = jax.lax.padtype_to_pads(x.shape[1:3], seen, (stride, stride), padding)
    else:
        padding = [(padding, padding)] * 2
    same = stride == dilation == 1 and list(padding) == [(1, 1), (1, 1)]
    if same and pays(x, kernel):
        return winograd(x, kernel)
    plain = partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    size = jax.eval_shape(plain, x, kernel).shape[1:3]
    if math.prod(size) >= math.prod(kernel.shape[:2]):
        return plain(x, kernel)
    product = partial(_product, stride=stride, padding=padding, dilation=dilation, size=size)
    return jax.lax.platform_dependent(x, kernel, cpu=product, default=plain)


def _product(
    x: Array,
    kernel: Array,
    *,
    stride: int,
    padding: Sequence[tuple[int, int]],
    dilation: int,
    size: tuple[int, int],
) -> jax.Array:
    """One product of the pixels that each output sees, [B h w, k k C], with the kernel."""
    padded = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    rows, columns = (range(0, side * dilation, dilation) for side in kernel.shape[:2])
    seen = [_taps(padded, i, j, size, stride) for i in rows for j in columns]
    seen = rearrange(seen, "k b h w c -> (b h w) (k c)")
    weights = rearrange(kernel, "i j c d -> (i j c) d")
    return (seen @ weights).reshape(x.shape[0], *size, kernel.shape[3])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(x: Array, kernel: Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolves each channel with its own kernel: the cross-correlation that papers call so.

    XLA runs a grouped convolution on a CPU as one small convolution per channel, tens of times
    slower than the sum of shifted products that it fuses into a single pass, so a CPU gets that
    sum and every other backend the grouped convolution. The choice falls when the program is
    lowered for its platform, not when it is traced, so that a program compiled here for another
    machine gets the other machine's form. Differentiable once, in reverse mode.

    Args:
      x: [B, H, W, C].
      kernel: [k, l, 1, C], the layout of a grouped convolution.
      stride: step between outputs, in pixels, on both axes.
      padding: zeros added to all four sides, in pixels.

    Returns:
      [B, h, w, C] in the dtype of `x`, with h = (H + 2 padding - k) // stride + 1; the sums are
      float32.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_shifted_sum, stride=stride, padding=padding),
        default=partial(_grouped, stride=stride, padding=padding),
    )


def _grouped(x: Array, kernel: Array, *, stride: int, padding: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _shifted_sum(x: Array, kernel: Array, *, stride: int, padding: int) -> jax.Array:
    rows, columns = kernel.shape[:2]
    h = (x.shape[1] + 2 * padding - rows) // stride + 1
    w = (x.shape[2] + 2 * padding - columns) // stride + 1
    padded = _pad(x, padding)
    total = jnp.zeros((x.shape[0], h, w, x.shape[3]), jnp.float32)
    for i in range(rows):
        for j in range(columns):
            weight = kernel[i, j].astype(jnp.float32)[None, None]  # [1, 1, 1, C]
            total += _taps(padded, i, j, (h, w), stride).astype(jnp.float32) * weight
    return total.astype(x.dtype)


def _pad(x: Array, padding: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(padding, padding)] * 2 + [(0, 0)])


def _taps(padded: Array, i: int, j: int, size: tuple[int, int], stride: int) -> jax.Array:
    """The pixels that kernel entry (i, j) meets: [..., H, W, C] -> [..., h, w, C]."""
    h, w = size
    rows = slice(i, i + (h - 1) * stride + 1, stride)
    columns = slice(j, j + (w - 1) * stride + 1, stride)
    return padded[..., rows, columns, :]


def _forward(x: Array, kernel: Array, stride: int, padding: int) -> tuple[jax.Array, tuple]:
    return depthwise_conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride: int, padding: int, saved: tuple, gradient: Array) -> tuple:
    x, kernel = saved
    return jax.lax.platform_dependent(
        x,
        kernel,
        gradient,
        cpu=partial(_shifted_gradient, stride=stride, padding=padding),
        default=partial(_grouped_gradient, stride=stride, padding=padding),
    )


def _grouped_gradient(
    x: Array, kernel: Array, gradient: Array, *, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    _, pull = jax.vjp(partial(_grouped, stride=stride, padding=padding), x, kernel)
    return pull(gradient)


def _shifted_gradient(
    x: Array, kernel: Array, gradient: Array, *, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    for_x = _input_gradient(x.shape, kernel, gradient, stride=stride, padding=padding)
    for_kernel = _kernel_gradient(x, kernel, gradient, stride=stride, padding=padding)
    return for_x.astype(x.dtype), for_kernel.astype(kernel.dtype)


def _input_gradient(
    shape: tuple[int, ...], kernel: Array, gradient: Array, *, stride: int, padding: int
) -> jax.Array:
    """The transposed convolution, as one shifted sum for each phase of the stride.

    Padded pixel stride * m + a meets output m - t through kernel row a + stride * t, so the
    pixels of one phase `a` form a dense sum over few kernel rows, and no product is with a zero
    that a dilation put in.
    """
    _, height, width, _ = shape
    rows, columns = kernel.shape[:2]
    h, w = gradient.shape[1:3]
    # Pixels of a phase, so that all phases together cover the padded input.
    phase_h = -(-(height + 2 * padding) // stride)
    phase_w = -(-(width + 2 * padding) // stride)
    above, left = (rows - 1) // stride, (columns - 1) // stride
    padded = jnp.pad(
        gradient, ((0, 0), (above, max(phase_h - h, 0)), (left, max(phase_w - w, 0)), (0, 0))
    )
    phases = []
    for a in range(stride):
        for b in range(stride):
            total = jnp.zeros((shape[0], phase_h, phase_w, shape[3]), jnp.float32)
            for i in range(a, rows, stride):
                for j in range(b, columns, stride):
                    top, start = above - i // stride, left - j // stride
                    part = padded[:, top : top + phase_h, start : start + phase_w]
                    weight = kernel[i, j].astype(jnp.float32)[None, None]
                    total += part.astype(jnp.float32) * weight
            phases.append(total)
    if stride == 1:
        full = phases[0]
    else:
        full = jnp.stack(phases).reshape(stride, stride, shape[0], phase_h, phase_w, shape[3])
        full = full.transpose(2, 3, 0, 4, 1, 5)  # [B, h, a, w, b, C]
        full = full.reshape(shape[0], phase_h * stride, phase_w * stride, shape[3])
    return full[:, padding : padding + height, padding : padding + width]


def _kernel_gradient(
    x: Array, kernel: Array, gradient: Array, *, stride: int, padding: int
) -> jax.Array:
    """Sums over examples in a loop: one example's pixels stay in the cache for all its products.

    The kernel's rows are a loop as well, which costs no time and compiles a third of the code.
    """
    rows, columns = kernel.shape[:2]
    h, w = gradient.shape[1:3]

    def add(total: jax.Array, example: tuple[Array, Array]) -> tuple[jax.Array, None]:
        pixels, grad = (part.astype(jnp.float32) for part in example)
        padded = _pad(pixels, padding)

        def row(i: jax.Array) -> jax.Array:
            height = (h - 1) * stride + 1
            band = jax.lax.dynamic_slice_in_dim(padded, i, height)  # the pixels that row i meets
            return jnp.stack(
                [(_taps(band, 0, j, (h, w), stride) * grad).sum((0, 1)) for j in range(columns)]
            )

        return total + jax.lax.map(row, jnp.arange(rows)), None

    total = jnp.zeros((rows, columns, x.shape[3]), jnp.float32)
    total, _ = jax.lax.scan(add, total, (x, gradient))
    return total[:, :, None]


depthwise_conv.defvjp(_forward, _backward)


class Conv(nn.Module):
    """A convolution by `convolve`, with the parameters of `flax.linen.Conv`.

    Attributes:
      features: D.
      kernel: side k of the square kernel.
      stride: step between outputs, in pixels.
      dilation: step between the pixels that the kernel sees.
      padding: zeros on all four sides; None is k // 2 * dilation, as PyTorch's networks have it.
      use_bias: whether a bias is added.
      kernel_init: first values of the kernel.
      dtype: of the computation; parameters stay float32.
    """

    features: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: int | None = None
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, D]; by default h = ceil(H / stride) with an odd kernel."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        padding = self.kernel // 2 * self.dilation if self.padding is None else self.padding
        x = convolve(x.astype(self.dtype), kernel, self.stride, padding, self.dilation)
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x + bias.astype(x.dtype)[None, None, None]


class DepthwiseConv(nn.Module):
    """A depthwise convolution without bias, with zeros around the image.

    Attributes:
      kernel: side k of the square kernel.
      stride: step between outputs, in pixels.
      padding: zeros added to all four sides; None is k // 2.
      dtype: of the computation; the kernel stays float32.
    """

    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, C], h = (H + 2 padding - k) // stride + 1."""
        shape = (self.kernel, self.kernel, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        padding = self.kernel // 2 if self.padding is None else self.padding
        return depthwise_conv(x.astype(self.dtype), kernel, self.stride, padding)
