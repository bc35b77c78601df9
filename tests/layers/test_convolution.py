from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax.layers.convolution import Conv, DepthwiseConv, convolve, depthwise_conv

# B, H, W, C, kernel, stride, padding: odd sizes, sizes that stride does not divide, single pixels.
CASES = [
    (2, 7, 10, 5, 3, 1, 1),
    (1, 7, 10, 5, 3, 2, 1),
    (3, 8, 9, 4, 3, 2, 1),
    (2, 6, 11, 4, 5, 2, 2),
    (2, 9, 8, 4, 2, 3, 0),
    (1, 1, 1, 3, 3, 2, 1),
    (1, 1, 4, 3, 3, 1, 1),
]


def grouped(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def inputs(case, seed=0):
    b, h, w, c, k, _, _ = case
    random = np.random.default_rng(seed)
    return normal(random, b, h, w, c), normal(random, k, k, 1, c)


def normal(random, *shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_grouped_convolution_in_value_and_both_gradients(case):
    *_, stride, padding = case
    x, kernel = inputs(case)

    shape = jax.eval_shape(lambda x, k: grouped(x, k, stride, padding), x, kernel).shape
    direction = normal(np.random.default_rng(7), *shape)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(conv, x, kernel):
        out, pull = jax.vjp(lambda x, k: conv(x, k, stride, padding), x, kernel)
        return out, pull(direction)

    wanted = value_and_gradients(grouped, x, kernel)
    got = value_and_gradients(depthwise_conv, x, kernel)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_each_output_is_the_sum_of_its_neighbours_times_the_kernel():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    out = jax.jit(depthwise_conv, static_argnums=(2, 3))(x, kernel, 1, 1)
    assert out.shape == (1, 3, 4, 1)
    # Rows 0-2, columns 1-3 of the image, not flipped.
    assert out[0, 1, 2, 0] == sum(
        k * pixel for k, pixel in enumerate([1, 2, 3, 5, 6, 7, 9, 10, 11])
    )
    # The corner meets the kernel's lower right part only.
    assert out[0, 0, 0, 0] == 4 * 0 + 5 * 1 + 7 * 4 + 8 * 5


def test_the_form_is_chosen_by_the_platform_a_program_is_lowered_for():
    x, kernel = inputs((2, 5, 7, 4, 3, 1, 1))
    traced = jax.jit(lambda x, k: jax.vjp(partial(depthwise_conv, padding=1), x, k)[0]).trace(
        x, kernel
    )
    assert "convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_works_under_vmap_scan_and_remat():
    case = (2, 5, 6, 3, 3, 2, 1)
    x, kernel = inputs(case)
    stack = jnp.stack([x, 2 * x, -x])

    def loss(conv, kernel, x):
        return jnp.sin(conv(x, kernel, 2, 1)).sum()

    def total(conv, wrap, kernel):
        def add(carry, x):
            return carry + wrap(partial(loss, conv))(kernel, x), None

        return jax.lax.scan(add, 0.0, stack)[0]

    wanted = jax.jit(jax.grad(partial(total, grouped, lambda f: f)))(kernel)
    got = jax.jit(jax.grad(partial(total, depthwise_conv, jax.checkpoint)))(kernel)
    each = jax.jit(jax.vmap(jax.grad(partial(loss, depthwise_conv)), (None, 0)))(kernel, stack)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(each.sum(0), wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once_and_gradients_keep_their_dtypes():
    x, kernel = inputs((2, 6, 5, 4, 3, 1, 1))
    x = x.astype(jnp.bfloat16)

    @jax.jit
    def value_and_gradients(x, kernel):
        out, pull = jax.vjp(lambda x, k: depthwise_conv(x, k, 1, 1), x, kernel)
        return out, pull(jnp.ones_like(out))

    out, (for_x, for_kernel) = value_and_gradients(x, kernel)
    exact = grouped(x.astype(jnp.float32), kernel, 1, 1)
    assert out.dtype == jnp.bfloat16
    # Half a unit in the last of bfloat16's 8 bits: sums of nine rounded terms would be further off.
    chex.assert_trees_all_close(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
    assert for_x.dtype == jnp.bfloat16
    assert for_kernel.dtype == jnp.float32


def test_the_layer_keeps_its_size_by_default_and_a_float32_kernel():
    x = jnp.ones((1, 5, 8, 3))
    out, variables = DepthwiseConv(dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
    assert out.shape == x.shape
    assert out.dtype == jnp.bfloat16
    assert variables["params"]["kernel"].shape == (3, 3, 1, 3)
    assert variables["params"]["kernel"].dtype == np.float32


def slow_convolution(x, kernel, stride, before, size):
    """Zeros `before` the image and as many behind as it takes: one sum for each output pixel."""
    side = len(kernel)
    padded = np.pad(x, ((0, 0), (before, 99), (before, 99), (0, 0)))
    out = np.zeros((len(x), *size, kernel.shape[-1]))
    for i, j in np.ndindex(*size):
        window = padded[:, i * stride : i * stride + side, j * stride : j * stride + side]
        out[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    return out


@pytest.mark.parametrize(
    ("side", "stride", "padding", "before", "size"),
    [
        (1, 1, "SAME", 0, (6, 7)),
        (1, 2, "SAME", 0, (3, 4)),
        (1, 2, 0, 0, (3, 4)),
        (3, 1, "SAME", 1, (6, 7)),
        (3, 2, 1, 1, (3, 4)),  # PyTorch's padding
        (7, 2, 3, 3, (3, 4)),
    ],
)
def test_convolution_equals_a_sum_over_windows(side, stride, padding, before, size):
    random = np.random.default_rng(0)
    x, kernel = normal(random, 2, 6, 7, 3), normal(random, side, side, 3, 4)
    got = jax.jit(convolve, static_argnums=(2, 3))(x, kernel, stride, padding)
    np.testing.assert_allclose(
        got, slow_convolution(x, kernel, stride, before, size), rtol=1e-4, atol=1e-4
    )


def test_same_padding_puts_the_odd_zero_behind():
    x = jnp.ones((1, 4, 5, 1))
    out = convolve(x, np.ones((3, 3, 1, 1)), 2)[0, :, :, 0]
    # Four rows need one zero, behind; five columns need one on each side.
    np.testing.assert_array_equal(out, [[6, 9, 6], [4, 6, 4]])


@pytest.mark.parametrize(
    ("size", "side", "stride", "padding", "dilation"),
    [
        ((2, 2), 3, 1, 1, 1),
        ((1, 5), 3, 1, 1, 1),
        ((1, 1), 3, 2, 1, 1),
        ((4, 3), 3, 2, 1, 1),  # only the gradient would meet a map smaller than the kernel
        ((5, 4), 3, 2, "SAME", 1),
        ((2, 3), 3, 1, 2, 2),
        ((6, 3), 7, 2, 3, 1),
    ],
)
def test_few_pixels_give_the_plain_convolution_in_value_and_both_gradients(
    size, side, stride, padding, dilation
):
    random = np.random.default_rng(3)
    x, kernel = normal(random, 2, *size, 5), normal(random, side, side, 5, 4)

    def plain(x, kernel):
        pads = padding if isinstance(padding, str) else [(padding, padding)] * 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            pads,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def ours(x, kernel):
        return convolve(x, kernel, stride, padding, dilation)

    direction = normal(random, *jax.eval_shape(plain, x, kernel).shape)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(conv, x, kernel):
        out, pull = jax.vjp(conv, x, kernel)
        return out, pull(direction)

    traced = value_and_gradients.trace(ours, x, kernel)
    assert "convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()
    got, wanted = value_and_gradients(ours, x, kernel), value_and_gradients(plain, x, kernel)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_map_with_as_many_pixels_as_the_kernel_stays_a_convolution():
    x, kernel = jnp.ones((1, 3, 3, 2)), jnp.ones((3, 3, 2, 2))
    lowered = jax.jit(partial(convolve, padding=1)).trace(x, kernel)
    assert "convolution" in lowered.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_that_of_flax(bias):
    x = jnp.ones((2, 5, 8, 3), jnp.bfloat16)
    ours = Conv(4, 3, 2, use_bias=bias, dtype=jnp.bfloat16)
    theirs = nn.Conv(4, (3, 3), 2, 1, use_bias=bias, dtype=jnp.bfloat16)
    (out, variables), (wanted, same) = (
        layer.init_with_output(jax.random.key(0), x) for layer in (ours, theirs)
    )
    chex.assert_trees_all_equal((out, variables), (wanted, same))
    chex.assert_trees_all_equal_dtypes((out, variables), (wanted, same))
