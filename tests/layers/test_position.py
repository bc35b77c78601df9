import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from vit_jax.layers.position import (
    RESIZERS,
    LearnedPositions,
    resize_grid,
    resize_matrix,
    sincos_positions,
)

SIZES = ((4, 7), (9, 3), (1, 5), (8, 14))  # from 4x5: up and down, to one row, whole and odd ratios


def grid(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_antialiased_methods_equal_jax(method, size):
    wanted = jax.image.resize(grid(4, 5, 3), (*size, 3), method, antialias=True)
    np.testing.assert_allclose(resize_grid(grid(4, 5, 3), size, method), wanted, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_align_corners_equals_scipy_zoom(size):
    zoom = (size[0] / 4, size[1] / 5, 1)
    wanted = ndimage.zoom(grid(4, 5, 3), zoom, order=1)
    np.testing.assert_allclose(resize_grid(grid(4, 5, 3), size), wanted, atol=1e-5)


def test_bicubic_torch_equals_pytorch():
    # torch.nn.functional.interpolate(x, size=..., mode="bicubic", align_corners=False)
    wanted = [-0.2976494, 0.8377351, 2.6897762, 4.5, 6.3102238, 8.1622649, 9.2976494]
    got = resize_matrix(4, 7, "bicubic_torch") @ [0.0, 3.0, 6.0, 9.0]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_bilinear_torch_takes_two_neighbours_even_where_it_shrinks():
    # torch.nn.functional.interpolate(x, size=..., mode="bilinear", align_corners=False)
    got = resize_matrix(7, 3, "bilinear_torch") @ np.arange(7.0) ** 2
    np.testing.assert_allclose(got, [2 / 3, 9.0, 28 + 2 / 3], rtol=1e-6)


def test_dinov2_stretches_by_a_tenth_of_an_entry():
    # torch.nn.functional.interpolate(x, scale_factor=(7 + 0.1) / 4, mode="bicubic")
    wanted = [-0.3001409, 0.807225, 2.6063106, 4.4365527, 6.1556938, 8.0483222, 9.2559406]
    got = resize_matrix(4, 7, "bicubic_dinov2") @ [0.0, 3.0, 6.0, 9.0]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("method", RESIZERS)
def test_every_method_keeps_constants_and_a_grid_of_the_same_size(method):
    for size, target in ((3, 8), (8, 3), (1, 4), (5, 1)):
        np.testing.assert_allclose(resize_matrix(size, target, method).sum(1), 1, atol=1e-12)
    x = grid(3, 4, 2)
    np.testing.assert_array_equal(resize_grid(x, (3, 4), method), x)
    if method != "bicubic_dinov2":  # which stretches, but leaves a grid of the same size alone
        np.testing.assert_allclose(resize_matrix(6, 6, method), np.eye(6), atol=1e-12)


def test_an_unknown_method_is_refused_even_where_nothing_is_resized():
    with pytest.raises(ValueError, match=r"resize='bicubictorch'.*'bicubic_torch'"):
        resize_grid(grid(2, 3, 1), (2, 3), "bicubictorch")


def test_learned_positions_are_resampled_and_tokens_keep_theirs():
    layer = LearnedPositions((2, 3), 4, tokens=2)
    made, variables = layer.init_with_output(jax.random.key(0), (2, 3))
    params = variables["params"]
    assert {name: p.shape for name, p in params.items()} == {"grid": (2, 3, 4), "token": (2, 4)}
    np.testing.assert_array_equal(made[:2], params["token"])
    np.testing.assert_array_equal(made[2 + 3], params["grid"][1, 0])
    larger = layer.apply(variables, (3, 5))
    assert larger.shape == (2 + 15, 4)
    np.testing.assert_array_equal(larger[:2], params["token"])
    # Corners stay, and the new middle is the mean of its neighbours.
    np.testing.assert_allclose(larger[2 + 4], params["grid"][0, 2], rtol=1e-6)
    np.testing.assert_allclose(larger[2 + 5], params["grid"][:, 0].mean(0), rtol=1e-5)


def test_learned_positions_start_with_a_deviation_of_0_02():
    made, variables = LearnedPositions((20, 30), 8).init_with_output(jax.random.key(0), (20, 30))
    assert set(variables["params"]) == {"grid"}
    np.testing.assert_allclose([made.mean(), made.std()], [0, 0.02], atol=1e-3)


def test_gradients_of_resampled_positions_reach_every_place():
    gradient = jax.grad(lambda x: resize_grid(x, (4, 6)).sum())(jnp.asarray(grid(2, 3, 1)))
    assert (gradient > 0).all()
    np.testing.assert_allclose(gradient.sum(), 24, rtol=1e-6)


def test_sincos_has_the_column_in_the_first_half_and_the_row_in_the_second():
    made = sincos_positions(2, 3, 8).reshape(2, 3, 8)
    np.testing.assert_array_equal(made[0, :, :4], made[1, :, :4])
    np.testing.assert_array_equal(made[:, 0, 4:], made[:, 2, 4:])
    x, y = 2, 1  # frequencies 1 and 1/100
    wanted = [wave(p * f) for p in (x, y) for wave in (math.sin, math.cos) for f in (1, 0.01)]
    np.testing.assert_allclose(made[y, x], wanted, rtol=1e-6)


def test_closed_frequencies_end_at_the_lowest():
    made = sincos_positions(1, 2, 12, closed=True)[1]  # column 1, frequencies 1, 1/100, 1/10000
    np.testing.assert_allclose(made[:3], np.sin([1, 1e-2, 1e-4]), rtol=1e-5)
    np.testing.assert_array_equal(made[6:], [0, 0, 0, 1, 1, 1])


def test_sincos_refuses_a_width_that_4_does_not_divide():
    with pytest.raises(ValueError, match="4 divides, not 10"):
        sincos_positions(2, 3, 10)
