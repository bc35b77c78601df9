"""A batch in portions is the batch."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from vit_jax.layers import portions
from vit_jax.layers.portions import in_portions, portion


def apply(x):
    return {"sine": jnp.sin(x), "sum": x.sum((1, 2))}


@pytest.mark.parametrize(
    ("rows", "most", "size"),
    [
        (8, 2, 2),
        (32, 5, 4),
        (6, 4, 3),
        (7, 2, 7),  # no divisor but 1, which loses
        (14, 10, 7),
        (22, 10, 22),  # 2 would be far from 10
        (8, 1, 8),
        (8, 0, 8),  # a picture whose map is larger than a portion
        (8, 8, 8),
        (8, 99, 8),
        (1, 2, 1),
    ],
)
def test_portions_divide_the_batch_and_come_near_the_largest(rows, most, size):
    assert portion(rows, most) == size


@pytest.mark.parametrize("rows", [1, 2, 6, 7])
def test_results_and_gradients_are_those_of_the_whole_batch(rows, monkeypatch):
    monkeypatch.setattr(portions, "LARGEST", 200)
    x = jax.random.normal(jax.random.key(0), (rows, 3, 5))

    def loss(form, x):
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(form(x)))

    ours = partial(in_portions, apply, largest=100)
    chex.assert_trees_all_equal(jax.jit(ours)(x), jax.jit(apply)(x))
    gradients = [jax.jit(jax.grad(partial(loss, form)))(x) for form in (ours, apply)]
    chex.assert_trees_all_close(*gradients, rtol=1e-6, atol=1e-6)


def loops(function, x, platform="cpu"):
    lowered = jax.jit(function).trace(x).lower(lowering_platforms=(platform,))
    return "stablehlo.while" in lowered.as_text()


def test_only_a_cpu_of_one_device_and_a_known_batch_loops(monkeypatch):
    monkeypatch.setattr(portions, "LARGEST", 200)
    ours = partial(in_portions, apply, largest=100)
    x = jnp.ones((6, 3, 5))
    assert loops(ours, x)
    assert not loops(ours, x, "tpu")
    assert not loops(ours, x[:5])
    with jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("data",))):
        assert not loops(ours, x)
    (rows,) = jax.export.symbolic_shape("b")
    unknown = jax.ShapeDtypeStruct((rows, 3, 5), jnp.float32)
    assert not loops(ours, unknown)
