from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.layers.convolution import convolve
from vit_jax.layers.residual import (
    Bottleneck,
    HybridStem,
    ResidualStage,
    StdConv,
    joined,
    standardize,
)

# Less optimised code is compiled in half the time, and a whole function at once in less still.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_standardized_weights_have_mean_0_and_deviation_1_for_each_output():
    kernel = 3 + draw(3, 3, 4, 2) * np.array([0.1, 10])
    out = np.asarray(quick(standardize)(kernel))
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, rtol=1e-3)
    # Weights 0 and 2 have deviation 1: the epsilon is added to that, not to its square.
    pair = jnp.array([0.0, 2.0]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(standardize(pair, 0.25).ravel(), [-0.8, 0.8], rtol=1e-6)
    # timm adds its own to the square: 1 + 0.5625 is 1.25 squared.
    np.testing.assert_allclose(standardize(pair, 0.0, 0.5625).ravel(), [-0.8, 0.8], rtol=1e-6)


def test_a_stem_computes_with_the_epsilons_of_its_source():
    x = 1e-3 * draw(1, 8, 9, 3)  # small, so that the norms' epsilons show
    stem = HybridStem((), 32)
    variables = {
        "params": {
            "root_conv": {"kernel": 1e-4 * draw(7, 7, 3, 32)},
            "root_norm": {"scale": np.ones(32, np.float32), "bias": np.zeros(32, np.float32)},
        }
    }
    kernel = variables["params"]["root_conv"]["kernel"]
    for source, on_kernel, on_norm in (
        ("google", (1e-5, 0.0), 1e-6),
        ("timm", (0.0, 1e-8), 1e-5),
    ):
        got = quick(stem.clone(source=source).apply)(variables, x)
        y = np.asarray(convolve(x, standardize(kernel, *on_kernel), 2))
        y = (y - y.mean((1, 2))[:, None, None]) / np.sqrt(y.var((1, 2)) + on_norm)[:, None, None]
        wanted = nn.max_pool(np.maximum(y, 0), (3, 3), (2, 2), "SAME")
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_std_conv_is_a_convolution_with_standardized_weights_and_no_bias():
    x = draw(1, 5, 6, 2)
    layer = StdConv(3, 3, stride=2)
    out, variables = quick(layer.init_with_output)(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"kernel": (3, 3, 2, 3)}
    kernel = variables["params"]["kernel"]
    wanted = quick(lambda x, kernel: convolve(x, standardize(kernel), 2))(x, kernel)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda k: 5 * np.asarray(k) + 1, variables)  # neither scale nor mean count
    np.testing.assert_allclose(quick(layer.apply)(moved, x), out, atol=1e-3)


class PlainConv(nn.Module):
    """Another network's convolution: PyTorch's padding, no standardisation."""

    features: int
    kernel: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return convolve(x, kernel, self.stride, self.kernel // 2)


norm = partial(nn.GroupNorm, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_joined_block_is_the_relu_of_its_sum_to_the_last_bit(dtype):
    shortcut, y = (jnp.asarray(draw(3, 5, 7, 4, seed=seed), dtype) for seed in (1, 2))
    shortcut, y = shortcut.at[0].set(-y[0]), y.at[1].set(0.0)  # sums of exactly 0, and none

    def plain(shortcut, y):
        return nn.relu(shortcut + y)

    out, pull = jax.vjp(joined, shortcut, y)
    expected, expected_pull = jax.vjp(plain, shortcut, y)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, expected)
    direction = jnp.asarray(draw(3, 5, 7, 4, seed=3), dtype)
    for got, wanted in zip(pull(direction), expected_pull(direction), strict=True):
        np.testing.assert_array_equal(got, wanted)
    for wide, narrow in ((jnp.inf, 1.0), (jnp.nan, 1.0), (1.0, jnp.nan), (2.0, -jnp.inf)):
        pair = jnp.full((2, 3), wide), jnp.full((2, 3), narrow)
        np.testing.assert_array_equal(joined(*pair), plain(*pair))
    mixed = jax.grad(lambda s, y: joined(s, y).sum(), (0, 1))(
        jnp.ones((2, 3)), jnp.ones((2, 3), dtype)
    )
    assert [gradient.dtype for gradient in mixed] == [jnp.float32, dtype]


def test_a_fresh_bottleneck_returns_its_shortcut():
    x = np.abs(draw(2, 4, 5, 8))
    block = Bottleneck(2, PlainConv, norm)
    out, variables = quick(block.init_with_output)(jax.random.key(0), x)
    assert set(variables["params"]) == {
        f"{kind}{i}" for kind in ("conv", "norm") for i in (1, 2, 3)
    }
    np.testing.assert_array_equal(out, x)


def test_a_bottleneck_that_changes_the_shape_projects_its_shortcut():
    x = draw(2, 5, 7, 8)
    for stride, features, size in ((2, 2, (3, 4)), (1, 3, (5, 7))):
        block = Bottleneck(features, PlainConv, partial(nn.GroupNorm, 1), stride)
        out, variables = quick(block.init_with_output)(jax.random.key(0), x)
        params = variables["params"]
        assert out.shape == (2, *size, 4 * features)
        assert params["conv2"]["kernel"].shape == (3, 3, features, features)
        # A fresh block's branch is 0: what is left is the shortcut, one group over all channels.
        kernel = np.asarray(params["shortcut_conv"]["kernel"])[0, 0]
        assert kernel.shape == (8, 4 * features)
        projected = x[:, ::stride, ::stride] @ kernel
        centred = projected - projected.mean((1, 2, 3), keepdims=True)
        wanted = np.maximum(centred / projected.std((1, 2, 3), keepdims=True), 0)
        np.testing.assert_allclose(out, wanted, rtol=1e-3, atol=1e-4)


def test_a_stage_strides_once_and_remat_changes_no_gradient():
    x = draw(1, 5, 4, 3)

    def gradient(remat):
        stage = ResidualStage(2, 2, PlainConv, norm, stride=2, remat=remat)
        shapes = jax.eval_shape(stage.init, jax.random.key(0), x)
        params = jax.tree.map(lambda s: draw(*s.shape), shapes)

        def loss(params):
            out = stage.apply(params, x)
            assert out.shape == (1, 3, 2, 8)
            return out.sum()

        return quick(jax.grad(loss))(params)

    plain, again = gradient(False), gradient(True)
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(again)):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "stride", "channels"),
    [((), 4, 64), ((1,), 4, 256), ((2, 2, 2, 2), 32, 2048), ((3, 4, 9), 16, 1024)],
)
def test_the_stem_of_a_hybrid_has_its_published_strides_and_widths(sizes, stride, channels):
    stem = HybridStem(sizes)
    out, variables = jax.eval_shape(
        stem.init_with_output, jax.random.key(0), jnp.zeros((1, 75, 130, 3))
    )
    assert HybridStem.stride(sizes) == stride
    assert out.shape == (1, -(-75 // stride), -(-130 // stride), channels)
    blocks = [len(variables["params"][f"stage_{i + 1}"]) for i in range(len(sizes))]
    assert blocks == list(sizes)
    scales = [s for path, s in jax.tree.leaves_with_path(variables) if "scale" in str(path[-1])]
    assert len(scales) == 1 + 3 * sum(sizes) + len(sizes)  # one more norm in each first block
