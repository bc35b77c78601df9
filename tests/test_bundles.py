"""Small parameters in common arrays: nothing but their number changes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.bundles import LARGEST, Bundles
from vit_jax.mesh import SMALLEST


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters(seed=0):
    shapes = {"a": (3,), "b": (), "c": (2, 5), "d": (5, 2), "e": (2, 5), "f": (1, 7), "g": (5, 2)}
    large = {"large": normal(seed, SMALLEST), "larger": normal(seed + 1, LARGEST)}
    return {name: normal(seed + 2, *shape) for name, shape in shapes.items()} | large


def marks(value=False, **others):
    return {name: others.get(name, value) for name in parameters()}


def bundles(apart=None, matrices=None, kinds=()):
    return Bundles(parameters(), apart=apart or marks(), matrices=matrices or marks(), kinds=kinds)


def sizes(made):
    return [np.shape(x) for x in jax.tree.leaves(made.gathered(parameters()))]


@pytest.mark.parametrize("matrices", [marks(), marks(c=True, d=True, e=True, g=True)])
def test_what_is_gathered_is_scattered_to_where_it_was(matrices):
    params, made = parameters(), bundles(matrices=matrices)
    chex.assert_trees_all_equal(made.scattered(made.gathered(params)), params)


def test_small_parameters_become_one_vector_and_large_ones_stay():
    assert sizes(bundles()) == [(SMALLEST,), (LARGEST,), (3 + 1 + 10 + 10 + 10 + 7 + 10,)]


def test_matrices_of_one_shape_lie_on_each_other():
    made = bundles(matrices=marks(c=True, d=True, e=True, g=True))
    assert sizes(made) == [(SMALLEST,), (LARGEST,), (3 + 1 + 7,), (2, 2, 5), (2, 5, 2)]


def test_only_what_is_treated_alike_is_bundled_and_one_alone_is_none():
    made = bundles(apart=marks(a=True), kinds=(marks(1.0, b=0.5, c=0.5), marks(True, c=False)))
    alone = [(3,), (), (2, 5), (SMALLEST,), (LARGEST,)]
    assert sizes(made) == [*alone, (10 + 10 + 7 + 10,)]
    names = made.of({name: name for name in parameters()})
    assert jax.tree.leaves(names) == ["a", "b", "c", "large", "larger", "d"]


def test_parameters_of_two_types_share_no_vector():
    params = {"a": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.ones(4)}
    no = jax.tree.map(lambda _: False, params)
    gathered = Bundles(params, apart=no, matrices=no, kinds=()).gathered(params)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(gathered)] == [
        ((3,), jnp.bfloat16),
        ((6,), jnp.float32),
    ]


def test_an_optimizer_makes_the_same_updates_to_the_last_bit():
    inner, params = optax.adam(0.1), parameters()
    around = bundles().around(inner)
    ours, theirs = around.init(params), inner.init(params)
    for seed in range(5, 8):
        gradients = parameters(seed)
        own, ours = jax.jit(around.update)(gradients, ours, params)
        other, theirs = jax.jit(inner.update)(gradients, theirs, params)
        chex.assert_trees_all_equal(own, other)
    assert len(jax.tree.leaves(ours)) < len(jax.tree.leaves(theirs)) / 2
