import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import ConfigError, DataError
from vit_jax.tasks.segmentation import (
    COLOURS,
    Canvas,
    Segmentation,
    picture_size,
)

B, H, W, K = 4, 3, 5, 3
score_and_gradient = jax.jit(
    jax.value_and_grad(Segmentation.score, argnums=1, has_aux=True), static_argnums=0
)


def score(task, outputs, batch):
    return score_and_gradient(task, outputs, batch)[0]


def random_batch(seed=0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(2, B, H, W, K)).astype(np.float32)
    labels = random.integers(0, K, (B, H, W)).astype(np.int32)
    labels[random.uniform(size=labels.shape) < 0.3] = 255
    outputs = {"logits": logits[0], "auxiliary": [logits[1]]}
    return outputs, {"segmentation": labels, "valid": np.ones(B, bool)}


def entropies(logits, labels):
    """Of every pixel that counts."""
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    return np.array([-math.log(p[at][labels[at]]) for at in zip(*np.nonzero(labels != 255))])


def test_the_loss_is_the_mean_cross_entropy_of_the_pixels_that_count():
    outputs, batch = random_batch()
    labels = batch["segmentation"]
    loss, sums = score(Segmentation(), outputs, batch)
    main, auxiliary = (
        entropies(logits, labels) for logits in (outputs["logits"], outputs["auxiliary"][0])
    )
    np.testing.assert_allclose(loss, main.mean() + 0.4 * auxiliary.mean(), rtol=1e-5)
    assert sums["count"] == len(main)
    np.testing.assert_allclose(sums["loss"], loss * len(main), rtol=1e-6)
    plain, _ = Segmentation().score(outputs["logits"], batch)
    np.testing.assert_allclose(plain, main.mean(), rtol=1e-5)


def test_weights_of_classes_weigh_the_mean():
    outputs, batch = random_batch()
    labels, weights = batch["segmentation"], (0.5, 3.0, 0.0)
    task = Segmentation(class_weights=weights)
    loss, sums = score(task, outputs, batch)
    of_pixels = np.array([weights[label] for label in labels[labels != 255]])
    main, auxiliary = (
        (entropies(logits, labels) * of_pixels).sum() / of_pixels.sum()
        for logits in (outputs["logits"], outputs["auxiliary"][0])
    )
    np.testing.assert_allclose(loss, main + 0.4 * auxiliary, rtol=1e-5)
    np.testing.assert_allclose(sums["count"], of_pixels.sum())
    _, plain = score(Segmentation(), outputs, batch)
    np.testing.assert_array_equal(sums["confusion"], plain["confusion"])  # pixels, not weights
    with pytest.raises(ConfigError, match="class_weights has 2 numbers for 3 classes"):
        Segmentation(class_weights=(1.0, 2.0)).score(outputs, batch)
    with pytest.raises(ConfigError, match="class_weights"):
        Segmentation(class_weights=(1.0, math.nan, 1.0))


def test_the_confusion_counts_the_pixels_of_each_true_and_found_class():
    outputs, batch = random_batch()
    labels, found = batch["segmentation"], outputs["logits"].argmax(-1)
    wanted = [[((labels == t) & (found == f)).sum() for f in range(K)] for t in range(K)]
    _, sums = score(Segmentation(), outputs, batch)
    assert sums["confusion"].tolist() == wanted


def test_ignored_pixels_and_rows_that_are_not_valid_change_nothing_whatever_they_hold():
    outputs, batch = random_batch()
    valid = batch["valid"] = np.array([True, False, True, True])
    labels = batch["segmentation"]
    labels[2] = 255
    wanted, sums = score(Segmentation(), outputs, batch)
    for garbage in (1e30, np.nan, np.inf):
        out = (labels == 255) | ~valid[:, None, None]
        for array in jax.tree.leaves(outputs):
            array[out] = garbage
        (loss, new), gradient = score_and_gradient(Segmentation(), outputs, batch)
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        np.testing.assert_array_equal(new["confusion"], sums["confusion"])
        for array in jax.tree.leaves(gradient):
            assert (array[out] == 0).all()
            assert (np.abs(array[~out]) > 0).all()
            assert np.isfinite(array).all()
    (loss, _), gradient = score_and_gradient(
        Segmentation(), outputs, batch | {"valid": np.zeros(B, bool)}
    )
    assert loss == 0
    assert all((array == 0).all() for array in jax.tree.leaves(gradient))


def test_the_sums_of_two_halves_are_those_of_the_whole():
    outputs, batch = random_batch()
    _, whole = score(Segmentation(), outputs, batch)
    halves = [
        score(Segmentation(), outputs, batch | {"valid": np.array(valid)})[1]
        for valid in ([True, False, True, False], [False, True, False, True])
    ]
    for name, value in whole.items():
        np.testing.assert_allclose(halves[0][name] + halves[1][name], value, rtol=1e-5)


def test_a_class_beyond_the_head_cannot_pass_unseen():
    for wrong in (3, 254):
        outputs, batch = random_batch()
        batch["segmentation"][0, 0, 0] = wrong
        assert math.isnan(score(Segmentation(), outputs, batch)[0])


def test_a_prediction_is_the_likeliest_class_of_each_pixel_and_where_the_picture_ends():
    outputs, _ = random_batch()
    mask = np.zeros((B, H, W), bool)
    mask[:, :2, :4] = True
    mask[3] = False  # a row that only pads the batch
    found = jax.jit(Segmentation().predict)(outputs, {"image_mask": mask})
    assert found["segmentation"].dtype == jnp.uint8
    np.testing.assert_array_equal(found["segmentation"], outputs["logits"].argmax(-1))
    assert found["size"].tolist() == [[2, 4]] * 3 + [[1, 1]]
    found = Segmentation().predict(outputs["logits"], {})
    assert found["size"].tolist() == found["padded"].tolist() == [[H, W]] * B


def test_a_summary_takes_the_ratios_of_the_classes_that_there_are():
    confusion = np.zeros((4, 4))
    confusion[:3, :3] = [[6, 2, 0], [1, 3, 0], [0, 0, 0]]
    confusion[3, 0] = 4  # never found
    numbers = Segmentation().summarize({"loss": 8.0, "count": 16.0, "confusion": confusion})
    ious = {"iou_0": 6 / 13, "iou_1": 3 / 6, "iou_3": 0.0}
    wanted = {"loss": 0.5, "miou": sum(ious.values()) / 3, "pixel_accuracy": 9 / 16} | ious
    assert list(numbers) == list(wanted)
    np.testing.assert_allclose(list(numbers.values()), list(wanted.values()))
    assert {type(v) for v in numbers.values()} == {float}
    assert Segmentation.headline in numbers
    with pytest.raises(DataError, match="no pixel"):
        Segmentation().summarize({"loss": 0.0, "count": 0.0, "confusion": confusion})


def test_results_are_measured_on_the_pictures_own_pixels_without_the_padding():
    truth = np.repeat(np.array([[0, 1, 1], [0, 0, 255]], np.uint8), 10, 0).repeat(20, 1)
    found = np.array([[0, 1, 1, 9], [0, 0, 7, 9], [9, 9, 9, 9]], np.uint8)  # 9 is padding
    prediction = {"segmentation": found, "size": np.array([2, 3])}
    sums = {"loss": 1.0, "count": 1.0, "confusion": np.eye(10)}
    numbers = Segmentation().summarize(sums, iter([(prediction, {"segmentation": truth})]))
    assert numbers == {"loss": 1.0, "miou": 1.0, "pixel_accuracy": 1.0, "iou_0": 1.0, "iou_1": 1.0}
    found[0, 0] = 1
    numbers = Segmentation().summarize(sums, [(prediction, {"segmentation": truth})])
    assert numbers["pixel_accuracy"] == 4 / 5
    assert numbers["miou"] == (2 / 3 + 2 / 3) / 2


def test_a_picture_s_size_is_read_upright():
    file = cv2.imencode(".png", np.zeros((30, 50, 3), np.uint8))[1].tobytes()
    assert picture_size({"image": file}) == (30, 50)
    assert picture_size({"image": np.zeros((4, 6, 3), np.uint8)}) == (4, 6)


@pytest.mark.parametrize("size", [(24, 40), (96, 96), (900, 1400)])
def test_a_drawing_has_a_legend_and_says_how_much_is_right(size):
    image = np.full((*size, 3), 90, np.uint8)
    found = np.zeros((12, 16), np.uint8)
    found[:, 8:] = 2
    prediction = {"segmentation": found, "size": np.array([12, 16])}
    truth = np.zeros(size, np.uint8)
    truth[:, size[1] // 2 :] = 2
    names = ("road", "sky", "a tree, or several of them")
    task = Segmentation()
    picture, title, right = task.draw(image, {"segmentation": truth}, prediction, names)
    assert (title, right) == ("100 % of pixels", True)
    factor = picture.shape[1] // size[1]
    assert picture.shape[1] == factor * size[1] >= 400
    assert picture.shape[0] > factor * size[0]  # the legend
    assert (image == 90).all()
    for label, column in ((0, 0.25), (2, 0.75)):
        tinted = picture[factor * size[0] // 2, int(column * picture.shape[1])]
        np.testing.assert_allclose(tinted, 0.4 * 90 + 0.6 * np.array(COLOURS[label]), atol=1)
    truth[:, : size[1] // 4] = 1
    _, title, right = task.draw(image, {"segmentation": truth}, prediction, names)
    assert (title, right) == ("75 % of pixels", False)
    truth[:] = 255
    assert task.draw(image, {"segmentation": truth}, prediction, names)[2]
    assert task.draw(image, {}, prediction, names)[1:] == ("road", True)


def test_every_class_has_its_own_colour_always_the_same():
    colours = [Canvas.colour(k) for k in range(150)]
    assert len(set(colours)) > 140
    assert len(set(colours[:60])) == 60
    assert colours == [Canvas.colour(k) for k in range(150)]


def test_a_wrong_setting_is_refused():
    with pytest.raises(ConfigError, match="auxiliary_weight=-1 must be 0 or more"):
        Segmentation(auxiliary_weight=-1)
