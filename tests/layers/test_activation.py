import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax.layers.activation import ACTIVATIONS, activation, gelu

POINTS = jnp.concatenate([jnp.linspace(-12, 12, 2401), jnp.array([-1e30, -100.0, 0.0, 1e30])])


def test_gelu_and_its_slope_are_those_of_the_normal_distribution():
    x = np.asarray(POINTS, np.float64)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    slope = below + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    out, pull = jax.vjp(gelu, POINTS)
    np.testing.assert_allclose(out, x * below, rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(out))[0], slope, rtol=1e-6, atol=1e-6)


def test_gelu_is_flaxs_to_the_last_digits():
    wanted, pull_wanted = jax.vjp(lambda x: nn.gelu(x, approximate=False), POINTS)
    got, pull = jax.vjp(gelu, POINTS)
    direction = jnp.cos(POINTS)
    chex.assert_trees_all_close(got, wanted, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(pull(direction), pull_wanted(direction), rtol=1e-6, atol=1e-6)


def test_gelu_of_half_precision_is_the_nearest_to_the_exact_one():
    x = jnp.linspace(-4, 4, 301).astype(jnp.bfloat16)
    out, pull = jax.vjp(gelu, x)
    assert out.dtype == pull(out)[0].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(out, gelu(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_name_is_nearly_a_line_far_up_and_nothing_far_down(name):
    out = activation(name)(jnp.array([-20.0, 0.0, 20.0]))
    chex.assert_trees_all_close(out, jnp.array([0.0, 0.0, 20.0]), atol=1e-4)


def test_a_name_that_does_not_exist_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"activation='geluu' does not exist.*gelu"):
        activation("geluu")
