from functools import partial

import chex
import jax
import numpy as np
import pytest

from vit_jax.layers import pyramid
from vit_jax.layers.pyramid import ConvNorm, PyramidLevel, SimplePyramid

# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(model, *inputs, **options):
    """Values that matter for every parameter; compiling `init` would take longer than the test."""
    shapes = jax.eval_shape(partial(model.init, **options), jax.random.key(0), *inputs)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.uniform(0.2, 1, leaf.shape).astype(np.float32), shapes)


def test_nearest_takes_what_pytorch_takes():
    # 25 -> 50 and 34 -> 67 are maps of the panoptic head, 1066 -> 34 is a padding mask.
    chex.assert_trees_all_equal(pyramid.nearest_indices(25, 50), np.arange(50) // 2)
    chex.assert_trees_all_equal(pyramid.nearest_indices(3, 5), np.array([0, 0, 1, 1, 2]))
    chex.assert_trees_all_equal(pyramid.nearest_indices(7, 3), np.array([0, 2, 4]))
    found = pyramid.nearest_indices(1066, 34)
    assert (found[1], found[-1]) == (31, 1034)  # scale 31.35, from each pixel's start
    x = draw(2, 3, 4, 5)
    got = pyramid.nearest(x, (5, 2))
    chex.assert_trees_all_equal(got, x[:, [0, 0, 1, 1, 2]][:, :, [0, 2]])
    mask = draw(2, 7, 9) > 0
    chex.assert_trees_all_equal(pyramid.nearest(mask, (3, 9)), mask[:, [0, 2, 4]])


def test_bilinear_keeps_planes_inside_and_edges_outside():
    y, x = np.mgrid[:4, :6].astype(np.float32)
    plane = (2 * y - x)[None, ..., None]
    big = np.asarray(pyramid.bilinear(plane, (8, 12)))[0, ..., 0]
    rows, columns = (np.arange(8) + 0.5) / 2 - 0.5, (np.arange(12) + 0.5) / 2 - 0.5
    wanted = 2 * rows.clip(0, 3)[:, None] - columns.clip(0, 5)[None]
    chex.assert_trees_all_close(big, wanted.astype(np.float32), atol=1e-5)
    small = pyramid.bilinear(plane, (2, 3))[0, ..., 0]  # every second pixel's corner, no average
    corners = plane[0, ..., 0].reshape(2, 2, 3, 2).mean((1, 3))
    chex.assert_trees_all_close(small, corners, atol=1e-5)


def test_pooling_overlaps_where_parts_do_not_divide():
    wanted = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1]])
    chex.assert_trees_all_close(pyramid.pool_matrix(5, 3), wanted / wanted.sum(1)[:, None])
    x = draw(2, 4, 6, 3)
    chex.assert_trees_all_close(
        pyramid.pool(x, 2), x.reshape(2, 2, 2, 2, 3, 3).mean((2, 4)), atol=1e-6
    )
    chex.assert_trees_all_close(pyramid.pool(x, 1)[:, 0, 0], x.mean((1, 2)), atol=1e-6)
    # A map smaller than the parts repeats its pixels.
    chex.assert_trees_all_close(
        pyramid.pool(x[:, :1, :1], 3), x[:, :1, :1].repeat(3, 1).repeat(3, 2)
    )


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_before_a_norm_has_no_bias(kernel):
    x = draw(2, 5, 6, 3)
    layer = ConvNorm(4, kernel)
    variables = random_variables(layer, x, train=False)
    assert set(variables["params"]["conv"]) == {"kernel"}
    out, changed = quick(partial(layer.apply, train=True, mutable=["batch_stats"]))(variables, x)
    assert out.shape == (2, 5, 6, 4)
    assert out.min() == 0
    assert set(changed["batch_stats"]["norm"]) == {"mean", "var"}


def test_a_pyramid_has_four_sizes_whatever_the_map():
    model = SimplePyramid(features=6)
    maps, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), draw(2, 5, 8, 12))
    sizes = [(20, 32), (10, 16), (5, 8), (3, 4)]
    assert [x.shape for x in maps] == [(2, *size, 6) for size in sizes]
    assert set(variables["params"]["level_1"]) >= {"up1", "up1_norm", "up2"}
    assert "up1_norm" not in variables["params"]["level_2"]


def test_halving_loses_no_part_of_the_map():
    x = draw(1, 3, 5, 4)
    level = PyramidLevel(0.5, 3)
    variables = random_variables(level, x)
    run = quick(level.apply)
    for row, column in ((0, 0), (2, 4)):
        other = x.copy()
        other[:, row, column] += 9 * np.arange(1, 5)
        assert np.abs(run(variables, other) - run(variables, x)).max() > 1e-3


def test_channels_that_cannot_be_quartered_are_refused():
    with pytest.raises(ValueError, match="whose channels 4 divides, not 6"):
        jax.eval_shape(SimplePyramid().init, jax.random.key(0), draw(1, 4, 4, 6))
