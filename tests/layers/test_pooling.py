"""Max pooling by rows and columns is max pooling."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from vit_jax.layers.pooling import max_pool

PADDINGS = {"torch": ((1, 1), (1, 1)), "SAME": "SAME"}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6), (8, 8)])
def test_values_and_gradient_are_those_of_the_plain_form(size, padding):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    weights = jax.random.normal(jax.random.key(1), (2, -(-size[0] // 2), -(-size[1] // 2), 3))

    def plain(x):
        return nn.max_pool(x, (3, 3), (2, 2), PADDINGS[padding])

    chex.assert_trees_all_equal(max_pool(x, padding), plain(x))
    gradients = [
        jax.grad(lambda x, pool=pool: (pool(x) * weights).sum())(x)
        for pool in (plain, partial(max_pool, padding=padding))
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-6, atol=1e-6)


def test_it_keeps_the_dtype():
    assert max_pool(jnp.zeros((1, 4, 4, 1), jnp.bfloat16)).dtype == jnp.bfloat16
