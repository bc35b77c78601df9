import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import boxes

NAMESPACES = pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
A = np.float32([0, 0, 4, 2])


def random_boxes(*shape, seed=0):
    """Corners in the unit square."""
    sides = np.random.default_rng(seed).uniform(size=(*shape, 2, 2)).astype(np.float32)
    return np.concatenate([sides.min(-1), sides.max(-1)], -1)


@NAMESPACES
def test_formats_are_each_other_s_inverse(xp):
    assert boxes.to_corners(xp.asarray([3.0, 5.0, 2.0, 4.0])).tolist() == [2, 3, 4, 7]
    assert boxes.to_centres(xp.asarray([2.0, 3.0, 4.0, 7.0])).tolist() == [3, 5, 2, 4]
    assert boxes.to_pixels(xp.asarray([0.5, 0.25, 1.0, 0.5]), (40, 200)).tolist() == [
        *(100, 10, 200, 20)
    ]
    corners = xp.asarray(random_boxes(3, 5))
    again = boxes.to_corners(boxes.to_centres(corners))
    np.testing.assert_allclose(again, corners, atol=1e-6)
    again = boxes.to_fractions(boxes.to_pixels(corners, (37, 411)), (37, 411))
    np.testing.assert_allclose(again, corners, atol=1e-6)
    assert isinstance(again, jax.Array) == (xp is jnp)


@NAMESPACES
def test_each_picture_of_a_batch_may_have_its_own_size(xp):
    height, width = xp.asarray([[10.0], [20.0]]), xp.asarray([[30.0], [40.0]])
    found = boxes.to_pixels(xp.ones((2, 3, 4)), (height, width))
    assert found[:, 0].tolist() == [[30, 10, 30, 10], [40, 20, 40, 20]]


@NAMESPACES
def test_areas_and_overlaps_are_those_counted_by_hand(xp):
    a, b = xp.asarray(A), xp.asarray(np.float32([2, 1, 6, 4]))
    assert boxes.areas(a) == 8
    assert boxes.intersections(a, b) == 2
    np.testing.assert_allclose(boxes.iou(a, b), 2 / (8 + 12 - 2), rtol=1e-6)
    np.testing.assert_allclose(boxes.giou(a, b), 2 / 18 - (24 - 18) / 24, rtol=1e-6)
    apart = xp.asarray(np.float32([10, 0, 12, 2]))
    assert boxes.iou(a, apart) == 0
    np.testing.assert_allclose(boxes.giou(a, apart), -(24 - 12) / 24, rtol=1e-6)


@NAMESPACES
def test_overlaps_are_symmetric_one_for_the_same_box_and_bounded(xp):
    a, b = random_boxes(40), random_boxes(40, seed=1)

    def both(a, b):
        return [boxes.pairwise(measure, a, b) for measure in (boxes.iou, boxes.giou)]

    both = jax.jit(both) if xp is jnp else both
    forth, back, same, scaled = both(a, b), both(b, a), both(a, a), both(100 * a + 7, 100 * b + 7)
    for i, low in enumerate((0, -1)):
        np.testing.assert_allclose(forth[i], back[i].T, atol=1e-6)
        np.testing.assert_allclose(np.diag(same[i]), 1, rtol=1e-6)
        np.testing.assert_allclose(scaled[i], forth[i], atol=1e-4)
        assert low <= forth[i].min()
        assert forth[i].max() <= 1
    assert (np.asarray(forth[1]) <= np.asarray(forth[0]) + 1e-6).all()


@NAMESPACES
def test_boxes_without_area_overlap_with_nothing_and_give_numbers(xp):
    point, line, inverted = (
        xp.asarray(np.float32(x)) for x in ([1] * 4, [0, 1, 4, 1], [3, 1, 1, 2])
    )
    a = xp.asarray(A)
    assert (boxes.areas(line), boxes.areas(inverted)) == (0, 0)
    for thin in (point, line, inverted):
        assert boxes.iou(thin, a) == 0
        assert boxes.iou(thin, thin) == 0
        assert boxes.giou(thin, a) == 0  # all of them lie in `a`
    assert boxes.giou(point, point) == 0


def test_a_nan_stays_a_nan():
    for xp in (np, jnp):
        for measure in (boxes.iou, boxes.giou):
            assert np.isnan(measure(xp.asarray(A), xp.full(4, np.nan)))


def test_gradients_are_finite_for_boxes_without_area_and_pull_boxes_together():
    gradient = jax.jit(jax.grad(boxes.giou))
    for thin in ([1.0] * 4, [0.0, 1.0, 4.0, 1.0]):
        assert np.isfinite(gradient(jnp.array(thin), jnp.array(thin))).all()
        assert np.isfinite(gradient(jnp.array(thin), jnp.array(A))).all()
    # Of a box to the right, whose GIoU is (4 + x1 - x0) / x1 - 1.
    x0, _, x1, _ = gradient(jnp.array([10.0, 0.0, 12.0, 2.0]), jnp.array(A)).tolist()
    np.testing.assert_allclose((x0, x1), (-1 / 12, 6 / 144), rtol=1e-5)
    assert x0 + x1 < 0


@NAMESPACES
def test_clipping_leaves_nothing_outside(xp):
    found = boxes.clipped(xp.asarray(np.float32([[-1, -2, 3, 9], [20, 3, 30, 4]])), (5, 10))
    assert found.tolist() == [[0, 0, 3, 5], [10, 3, 10, 4]]
    assert boxes.areas(found).tolist() == [15, 0]
    inside = xp.asarray(random_boxes(6))
    assert (boxes.clipped(inside) == inside).all()


@NAMESPACES
def test_no_boxes_are_no_error(xp):
    none = xp.zeros((2, 0, 4))
    assert boxes.pairwise(boxes.iou, none, xp.ones((2, 3, 4))).shape == (2, 0, 3)
    assert boxes.to_pixels(boxes.to_corners(none), (3, 4)).shape == (2, 0, 4)
    assert boxes.areas(none).shape == (2, 0)
