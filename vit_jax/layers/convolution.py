"""Convolutions in the forms that the backend runs fastest."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array

Pads = tuple[tuple[int, int], tuple[int, int]]

# Bytes of gathered pixels for which one product is made: they and what they are made of stay in a
# core's cache. Measured by experiments/benchmarks/forms.py.
GATHERED = 1_500_000
FEW = 32  # numbers under a kernel, up to which a CPU gathers them faster than it convolves


def convolve(x: Array, kernel: Array, stride: int = 1, padding: int | str | Pads = "SAME") -> Array:
    """A convolution: the cross-correlation that papers call so. Differentiable once, in reverse.

    A kernel of one pixel is a matrix product everywhere, twice as fast on a CPU. On a CPU a kernel
    that moves by its own side is one as well, and the gradient of every other kernel is a sum of
    products over few pictures at a time: XLA's own form of it is a convolution with an image for
    its kernel, two to four times slower.

    Args:
      x: [B, H, W, C].
      kernel: [k, l, C, D].
      stride: step between outputs, in pixels.
      padding: zeros on all four sides, in pixels, or ((above, below), (left, right)), or "VALID",
        none, or "SAME", TensorFlow's, which gives ceil(H / stride) rows and puts the odd zero at
        the bottom and the right. PyTorch's networks pad k // 2 on all sides, which is another
        network where the stride is 2.

    Returns:
      [B, h, w, D] in the dtype of `x`.
    """
    kernel, size, strides = kernel.astype(x.dtype), kernel.shape[:2], (stride, stride)
    if isinstance(padding, int):
        padding = ((padding, padding),) * 2
    elif isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    padding = tuple((int(first), int(last)) for first, last in padding)
    if size == (1, 1) and not any(map(any, padding)):
        x = x[:, ::stride, ::stride]
        # One list of pixels, as in `layers.dense`: the gradient of the kernel is a plain product.
        pixels = rearrange(x, "b h w c -> (b h w) c")
        return (pixels @ kernel[0, 0]).reshape(*x.shape[:3], kernel.shape[3])
    return _convolve(x, kernel, stride, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: Array, kernel: Array, stride: int, padding: Pads) -> jax.Array:
    """As `convolve`, with all paddings spelt out."""
    static = {"stride": stride, "padding": padding}
    plain = partial(_plain, **static)
    if not _apart(x.shape, kernel.shape, **static) and kernel[:, :, :, 0].size > FEW:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=partial(_product, **static), default=plain)


def _plain(x: Array, kernel: Array, *, stride: int, padding: Pads) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _apart(shape: tuple[int, ...], kernel: tuple[int, ...], *, stride: int, padding: Pads) -> bool:
    """Whether each pixel lies under the kernel exactly once."""
    sides = [size + sum(zeros) for size, zeros in zip(shape[1:3], padding, strict=True)]
    return kernel[:2] == (stride, stride) and not any(side % stride for side in sides)


def _product(x: Array, kernel: Array, *, stride: int, padding: Pads) -> jax.Array:
    """The convolution as one product of all that the kernel meets."""
    rows, columns, channels, features = kernel.shape
    apart = _apart(x.shape, kernel.shape, stride=stride, padding=padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    if apart:
        met = rearrange(x, "b (h i) (w j) c -> b h w (i j c)", i=rows, j=columns)
    else:
        met = _neighbours(_neighbours(x, columns, stride, axis=2), rows, stride, axis=1)
    pixels = met.reshape(-1, rows * columns * channels)
    flat = kernel.reshape(-1, features)
    return (pixels @ flat).reshape(*met.shape[:3], features)


def _neighbours(x: Array, side: int, stride: int, *, axis: int) -> jax.Array:
    """Puts the `side` pixels that a kernel meets along an axis into one pixel's channels."""
    last = x.shape[axis] - side
    taps = [jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(side)]
    return jnp.concatenate(taps, -1)


def _convolve_forward(
    x: Array, kernel: Array, stride: int, padding: Pads
) -> tuple[jax.Array, tuple[Array, Array]]:
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(
    stride: int, padding: Pads, saved: tuple[Array, Array], gradient: Array
) -> tuple[jax.Array, jax.Array]:
    static = {"stride": stride, "padding": padding}
    x, kernel = saved

    def for_kernel(x: Array, gradient: Array) -> jax.Array:
        return jax.vjp(lambda kernel: _plain(x, kernel, **static), kernel)[1](gradient)[0]

    gathered = partial(_gathered_gradient, kernel.shape, **static)
    _, pull = jax.vjp(lambda x: _plain(x, kernel, **static), x)
    return pull(gradient)[0], jax.lax.platform_dependent(
        x, gradient, cpu=gathered, default=for_kernel
    )


def _gathered_gradient(
    shape: tuple[int, ...], x: Array, gradient: Array, *, stride: int, padding: Pads
) -> jax.Array:
    """A kernel's gradient as a sum over a few pictures at a time, a product for each of its rows.

    Each part's pixels are gathered along the columns, and lie in the cache for the products of all
    rows.
    """
    rows, columns, channels, features = shape
    batch, h, w, _ = gradient.shape
    if _apart(x.shape, shape, stride=stride, padding=padding):
        _, pull = jax.vjp(
            lambda kernel: _product(x, kernel, stride=stride, padding=padding),
            jnp.zeros(shape, x.dtype),
        )
        return pull(gradient)[0]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    fit = max(GATHERED // (x.shape[1] * w * columns * channels * x.dtype.itemsize), 1)
    size = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fit)

    def add(total: jax.Array, part: tuple[Array, Array]) -> tuple[jax.Array, None]:
        pixels, grad = part
        pixels, grad = _neighbours(pixels, columns, stride, axis=2), grad.reshape(-1, features)
        products = []
        for i in range(rows):
            met = jax.lax.slice_in_dim(pixels, i, i + (h - 1) * stride + 1, stride, 1)
            met = met.reshape(-1, columns * channels)
            products.append(jnp.matmul(met.T, grad, preferred_element_type=jnp.float32))
        return total + jnp.stack(products), None

    parts = [rearrange(a, "(p n) ... -> p n ...", n=size) for a in (x, gradient)]
    total = jnp.zeros((rows, columns * channels, features), jnp.float32)
    total, _ = jax.lax.scan(add, total, tuple(parts))
    return total.reshape(shape).astype(x.dtype)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _as_flax_asks(
    x: Array, kernel: Array, strides: Sequence[int], padding: str | Pads, **rest: Any
) -> jax.Array:
    """`convolve` for `nn.Conv`, which asks for it in the words of `lax.conv_general_dilated`."""
    stride, *others = {*strides}
    plain = rest["feature_group_count"] == 1 and {*rest["rhs_dilation"]} == {1}
    if others or not plain:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest)
    return convolve(x, kernel, stride, padding)


# Flax's layer with `convolve` inside: NHWC, the same fields and the same names.
Conv = partial(nn.Conv, conv_general_dilated=_as_flax_asks)


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
