import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.layers.transformer import (
    DropPath,
    EncoderBlock,
    LayerScale,
    Mlp,
    SwiGlu,
    activation,
    apply_blocks,
    drop_path_rates,
)

# Less optimised code is compiled in half the time, and a whole function at once in less still.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        (
            "gelu_tanh",
            lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("relu", lambda x: max(x, 0.0)),
    ],
)
def test_activations_are_the_published_formulas(name, formula):
    x = np.linspace(-4, 4, 17)
    wanted = [formula(value) for value in x]
    np.testing.assert_allclose(quick(activation(name))(x), wanted, rtol=1e-5, atol=1e-6)


def test_an_unknown_activation_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"activation='gelutanh'.*Did you mean 'gelu_tanh'"):
        activation("gelutanh")


def test_the_mlp_is_two_layers_with_an_activation_between():
    params = {
        "fc1": {"kernel": jnp.array([[1.0, -1.0, 2.0]]), "bias": jnp.array([0.0, 0.0, -1.0])},
        "fc2": {"kernel": jnp.array([[1.0], [10.0], [100.0]]), "bias": jnp.array([0.5])},
    }
    out = Mlp(3, "relu").apply({"params": params}, jnp.array([[2.0], [-3.0]]), train=False)
    np.testing.assert_allclose(out, [[2 + 300 + 0.5], [30 + 0.5]])


def test_a_gated_mlp_multiplies_one_layer_by_the_silu_of_another():
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    layer = SwiGlu(20)  # two thirds are 13, the next multiple of 8 is 16
    out, variables = layer.init_with_output(jax.random.key(0), x, train=False)
    params = variables["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "gate": {"kernel": (3, 16), "bias": (16,)},
        "up": {"kernel": (3, 16), "bias": (16,)},
        "down": {"kernel": (16, 3), "bias": (3,)},
    }
    gate, up = (x @ np.asarray(params[name]["kernel"]) for name in ("gate", "up"))
    wanted = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(params["down"]["kernel"])
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)


def test_layer_scale_starts_at_its_value_and_scales_channels():
    x = np.ones((2, 3, 4), np.float32)
    out, variables = LayerScale(0.25).init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(out, 0.25 * x)
    assert variables["params"]["gamma"].shape == (4,)
    gamma = np.arange(4.0, dtype=np.float32)
    out = LayerScale(0.25).apply({"params": {"gamma": gamma}}, x)
    np.testing.assert_array_equal(out[1, 2], gamma)


@pytest.mark.parametrize("traced", [False, True])
def test_drop_path_drops_whole_examples_and_keeps_the_mean(traced):
    x = jnp.ones((4000, 2, 3))

    def run(rate):
        return DropPath().apply({}, x, rate, train=True, rngs={"dropout": jax.random.key(0)})

    out = np.asarray(quick(run)(0.2) if traced else quick(lambda: run(0.2))())
    assert (out == out[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(out), [0, 1.25])
    np.testing.assert_allclose(out.mean(), 1, atol=0.03)


def test_drop_path_draws_nothing_in_evaluation_or_at_rate_0():
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(DropPath().apply({}, x, 0.5, train=False), x)
    np.testing.assert_array_equal(DropPath().apply({}, x, 0.0, train=True), x)  # and no rng


def test_rates_rise_on_a_line_from_0_to_the_last_block():
    np.testing.assert_allclose(drop_path_rates(0.3, 4), [0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == (0.0,)


def test_a_block_whose_branches_end_in_0_is_the_identity_and_norms_come_first():
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    block = EncoderBlock(heads=3, mlp_ratio=1.5)
    params = quick(partial(block.init, train=False))(jax.random.key(1), x)["params"]
    apply = quick(partial(block.apply, train=False))
    assert params["mlp"]["fc1"]["kernel"].shape == (6, 9)
    off = {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)}
    silent = params | {
        "attention": params["attention"] | {"out": off},
        "mlp": params["mlp"] | {"fc2": {"kernel": jnp.zeros((9, 6)), "bias": jnp.zeros(6)}},
    }
    np.testing.assert_array_equal(apply({"params": silent}, x), x)
    # A branch sees normalised tokens, so that their scale changes nothing but the shortcut.
    attention = {"params": params | {"mlp": silent["mlp"]}}
    branch = apply(attention, x) - x
    np.testing.assert_allclose(apply(attention, 100 * x) - 100 * x, branch, atol=1e-3)
    assert np.abs(branch).max() > 0.1


def test_layer_scale_gains_both_branches_of_a_block():
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    block = EncoderBlock(heads=3, mlp_ratio=1.0, layer_scale=0.5, key_bias=False)
    params = quick(partial(block.init, train=False))(jax.random.key(1), x)["params"]
    assert set(params["attention"]["key"]) == {"kernel"}
    assert set(params["attention"]["value"]) == {"kernel", "bias"}
    apply = quick(partial(block.apply, train=False))

    def gained(first, second):
        gains = {"layer_scale1": {"gamma": jnp.full(6, first)}}
        gains |= {"layer_scale2": {"gamma": jnp.full(6, second)}}
        return apply({"params": params | gains}, x)

    np.testing.assert_array_equal(gained(0.0, 0.0), x)
    np.testing.assert_allclose(gained(2.0, 0.0) - x, 2 * (gained(1.0, 0.0) - x), atol=1e-5)
    np.testing.assert_allclose(gained(0.0, 3.0) - x, 3 * (gained(0.0, 1.0) - x), atol=1e-5)
    np.testing.assert_array_equal(apply({"params": params}, x), gained(0.5, 0.5))


def test_a_bias_on_the_logits_can_hide_a_token():
    x = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float32)
    block = EncoderBlock(heads=2, mlp_ratio=1.0)
    variables = quick(partial(block.init, train=False))(jax.random.key(1), x)
    apply = quick(partial(block.apply, train=False))
    hidden = jnp.where(jnp.arange(4) == 3, -1e9, 0.0)[None, None]  # [1, 1, M]
    other = x.copy()
    other[0, 3] += 1
    first, second = (apply(variables, y, bias=hidden)[0, :3] for y in (x, other))
    np.testing.assert_array_equal(first, second)
    assert np.abs(apply(variables, other)[0, :3] - first).max() > 1e-2


class Affine(nn.Module):
    """x * kernel + rate: shows the order of blocks and the rate that each of them got."""

    @nn.compact
    def __call__(self, x, rate, *, train):
        return x * self.param("kernel", nn.initializers.ones, (1, 1)) + rate


class Stack(nn.Module):
    scan: bool
    remat: bool

    @nn.compact
    def __call__(self, x):
        rates = (1.0, 2.0, 3.0)
        return apply_blocks(Affine, x, rates, scan=self.scan, remat=self.remat, train=True)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_blocks_run_in_order_each_with_its_own_rate_and_parameters(scan, remat):
    kernels = [np.full((1, 1), k, np.float32) for k in (2.0, 3.0, 5.0)]
    if scan:
        params = {"blocks": {"kernel": np.stack(kernels)}}
    else:
        params = {f"block_{i}": {"kernel": kernel} for i, kernel in enumerate(kernels)}

    def run(params):
        return Stack(scan, remat).apply({"params": params}, jnp.full((1, 1), 7.0))[0, 0]

    value, gradient = quick(jax.value_and_grad(run))(params)
    assert value == ((7 * 2 + 1) * 3 + 2) * 5 + 3
    first, second, third = np.concatenate(jax.tree.leaves(gradient)).ravel()
    assert (first, second, third) == (7 * 3 * 5, 15 * 5, 47)
    shapes = jax.eval_shape(Stack(scan, remat).init, jax.random.key(0), jnp.ones((1, 1)))
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("scan", [False, True])
def test_random_numbers_differ_from_block_to_block(scan):
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x, rate, *, train):
            return 2 * x + jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return apply_blocks(Noise, x, (0.0, 0.0), scan=scan, remat=True, train=True)

    out = quick(Two().apply)({}, jnp.zeros((64, 1)), rngs={"dropout": jax.random.key(0)})
    # Two equal draws would give 0 and 3 only.
    assert set(np.unique(out)) == {0, 1, 2, 3}
