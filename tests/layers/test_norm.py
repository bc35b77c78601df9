from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax import programs
from vit_jax.layers import norm
from vit_jax.layers.norm import BatchNorm, GroupNorm, LayerNorm, layer_norm


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_gradients(function, x, scale, bias):
    """The value, and what x, scale and bias get of a fixed direction."""
    out, pull = jax.vjp(function, x, scale, bias)
    return out, pull(normal(9, *out.shape).astype(out.dtype))


def flax(x, scale, bias, dtype=jnp.float32):
    module = nn.LayerNorm(epsilon=1e-5, dtype=dtype)
    return module.apply({"params": {"scale": scale, "bias": bias}}, x)


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 3, 4, 6), (3, 8), (6,)], ids=str)
def test_equals_flax_in_value_and_all_gradients(shape):
    x = 3 * normal(0, *shape) + 1.5  # neither mean 0 nor variance 1
    scale, bias = 1 + 0.3 * normal(1, shape[-1]), normal(2, shape[-1])
    ours = partial(layer_norm, epsilon=1e-5)
    got = value_and_gradients(lambda *a: ours(*a), x, scale, bias)
    chex.assert_trees_all_close(
        got, value_and_gradients(flax, x, scale, bias), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 3, 4, 6), (6,)], ids=str)
def test_without_gradients_it_is_the_same(shape):
    x = 3 * normal(0, *shape) + 1.5
    scale, bias = 1 + 0.3 * normal(1, shape[-1]), normal(2, shape[-1])
    got = jax.jit(partial(layer_norm, epsilon=1e-5))(x, scale, bias)
    chex.assert_trees_all_close(got, flax(x, scale, bias), rtol=1e-5, atol=1e-5)


def test_a_cpu_does_not_make_one_kernel_of_a_norm_and_the_product_behind_it():
    x, kernel = normal(0, 8, 784, 16), normal(1, 16, 16)

    def forward(x, kernel):
        return layer_norm(x, kernel[0], kernel[1], 1e-5) @ kernel

    lowered = jax.jit(forward).lower(x, kernel)
    text = lowered.compile(programs.options("cpu")).as_text()
    entry = text[text.index("ENTRY") :]
    assert text.count(" dot(") == entry.count(" dot(") == 1


def test_what_other_processors_compute_is_what_a_cpu_does():
    gradient, x, scale = normal(0, 2, 7, 5), normal(1, 2, 7, 5), normal(2, 5)
    chex.assert_trees_all_close(
        norm._stored(gradient, x, scale), norm._fused(gradient, x, scale), rtol=1e-5, atol=1e-5
    )


def test_half_precision_is_computed_in_float32_and_comes_back_as_it_was():
    x = (3 * normal(0, 4, 9, 16) + 20).astype(jnp.bfloat16)
    scale, bias = 1 + 0.3 * normal(1, 16), normal(2, 16)
    module = LayerNorm(epsilon=1e-5, dtype=jnp.bfloat16)
    params = {"params": {"scale": scale, "bias": bias}}
    out, pull = jax.vjp(lambda x: module.apply(params, x), x)
    assert out.dtype == jnp.bfloat16
    (to_x,) = pull(jnp.ones_like(out))
    assert to_x.dtype == jnp.bfloat16
    exact = flax(x.astype(jnp.float32), scale, bias)
    chex.assert_trees_all_close(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)


def test_the_parameters_are_those_of_flax():
    x = normal(0, 2, 6)
    ours = LayerNorm().init(jax.random.key(0), x)
    theirs = nn.LayerNorm().init(jax.random.key(0), x)
    chex.assert_trees_all_equal(ours, theirs)


def batch_norms(dtype=jnp.float32):
    """Ours and flax's, in training."""
    shared = {"use_running_average": False, "momentum": 0.9, "epsilon": 1e-5, "dtype": dtype}
    return BatchNorm(**shared), nn.BatchNorm(**shared)


def trained(module, params, stats, x):
    """The value, the new statistics, and what parameters and x get of a fixed direction."""

    def apply(params, x):
        out, kept = module.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return out, kept["batch_stats"]

    out, pull, kept = jax.vjp(apply, params, x, has_aux=True)
    return out, kept, pull(normal(9, *out.shape).astype(out.dtype))


@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (1, 7, 2, 3), (8, 5)], ids=str)
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_batch_norm_equals_flax_in_value_statistics_and_all_gradients(shape, shift):
    x = 1.5 * normal(0, *shape) + shift
    width = shape[-1:]
    params = {"scale": 1 + 0.3 * normal(1, *width), "bias": normal(2, *width)}
    stats = {"mean": normal(3, *width), "var": 1 + jnp.abs(normal(4, *width))}
    ours, theirs = batch_norms()
    got, wanted = (trained(module, params, stats, x) for module in (ours, theirs))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=5e-5)


def test_batch_norm_in_evaluation_uses_what_it_has_and_leaves_it():
    x = normal(0, 2, 3, 4)
    variables = {
        "params": {"scale": normal(1, 4), "bias": normal(2, 4)},
        "batch_stats": {"mean": normal(3, 4), "var": 1 + jnp.abs(normal(4, 4))},
    }
    ours, kept = BatchNorm(use_running_average=True).apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(kept["batch_stats"], variables["batch_stats"])
    theirs = nn.BatchNorm(use_running_average=True).apply(variables, x)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_batch_norm_starts_as_flaxs_does():
    x = normal(0, 2, 3, 4) + 2
    ours, theirs = (module.init(jax.random.key(0), x) for module in batch_norms())
    chex.assert_trees_all_equal(ours, theirs)


def test_batch_norm_of_half_precision_is_computed_in_float32():
    x = (normal(0, 4, 5, 16) + 3).astype(jnp.bfloat16)
    params = {"scale": 1 + 0.3 * normal(1, 16), "bias": normal(2, 16)}
    stats = {"mean": jnp.zeros(16), "var": jnp.ones(16)}
    out, kept, (_, to_x) = trained(batch_norms(jnp.bfloat16)[0], params, stats, x)
    assert out.dtype == to_x.dtype == jnp.bfloat16
    assert kept["mean"].dtype == jnp.float32
    exact, exactly_kept, _ = trained(batch_norms()[1], params, stats, x.astype(jnp.float32))
    chex.assert_trees_all_close(kept, exactly_kept, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (1, 7, 6), (4, 12)], ids=str)
def test_group_norm_equals_flax_in_value_and_all_gradients(shape, groups):
    x = 1.5 * normal(0, *shape) + 2
    scale, bias = 1 + 0.3 * normal(1, shape[-1]), normal(2, shape[-1])

    def of(module):
        def apply(x, scale, bias):
            return module.apply({"params": {"scale": scale, "bias": bias}}, x)

        return value_and_gradients(apply, x, scale, bias)

    got, wanted = of(GroupNorm(groups, 1e-5)), of(nn.GroupNorm(groups, epsilon=1e-5))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=5e-5)


def test_group_norm_starts_as_flaxs_does_and_refuses_channels_that_are_no_groups():
    x = normal(0, 2, 3, 4)
    ours = GroupNorm(2).init(jax.random.key(0), x)
    chex.assert_trees_all_equal(ours, nn.GroupNorm(2).init(jax.random.key(0), x))
    with pytest.raises(ValueError, match="groups=3 must divide the 4 channels"):
        GroupNorm(3).init(jax.random.key(0), x)


def test_group_norm_of_half_precision_is_computed_in_float32():
    x = (normal(0, 4, 5, 16) + 3).astype(jnp.bfloat16)
    params = {"scale": 1 + 0.3 * normal(1, 16), "bias": normal(2, 16)}
    module = GroupNorm(4, 1e-5, jnp.bfloat16)
    out, pull = jax.vjp(lambda x: module.apply({"params": params}, x), x)
    assert out.dtype == pull(jnp.ones_like(out))[0].dtype == jnp.bfloat16
    exact = nn.GroupNorm(4, epsilon=1e-5).apply({"params": params}, x.astype(jnp.float32))
    chex.assert_trees_all_close(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)
