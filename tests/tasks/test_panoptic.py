import math

import numpy as np
import pytest

from vit_jax.errors import ConfigError, DataError
from vit_jax.tasks.panoptic import VOID, Panoptic, Quality, Segments, merged, true_segments

TASK = Panoptic(stuff=(2,), least_area=1)
SUMS = dict.fromkeys(
    ("class_loss", "class_weight", "l1_loss", "giou_loss", "class_wrong", "boxes", "count"), 1.0
)


def segments(rows, labels, crowd=()):
    """Of a picture drawn in letters: "a" is segment 0, "." is void."""
    ids = np.array([[VOID if c == "." else ord(c) - ord("a") for c in row] for row in rows])
    crowd = np.array([i in crowd for i in range(len(labels))], bool)
    return Segments(ids, np.array(labels, int), np.ones(len(labels)), crowd)


def prediction_of(logits, labels, scores):
    """A model's row, as large as the picture."""
    logits = np.array(logits, np.float32)
    size = np.array(logits.shape[1:])
    return {
        "masks": logits,
        "label": np.array(labels),
        "score": np.array(scores),
        "boxes": np.zeros((len(labels), 4)),
        "padded": size,
        "size": size,
    }


def drawn(found):
    return ["".join("." if i < 0 else chr(ord("a") + i) for i in row) for row in found.ids]


def test_pixels_go_to_the_largest_logit_of_the_queries_over_the_threshold():
    prediction = prediction_of(
        [[[5, 1, 1, 1]] * 2, [[1, 2, 2, 1]] * 2, [[9, 9, 9, 9]] * 2, [[0, 0, 0, 3]] * 2],
        [0, 1, 1, 0],
        [0.99, 0.95, 0.8, 0.9],  # the third is too unsure
    )
    found = merged(prediction, (2, 4), TASK)
    assert drawn(found) == ["abbc"] * 2
    assert (found.label.tolist(), found.score.tolist()) == ([0, 1, 0], [0.99, 0.95, 0.9])
    assert found.areas.tolist() == [2, 4, 2]


def test_stuff_of_one_class_is_one_segment_and_things_are_not():
    logits = [[[3, 0, 0, 0]] * 2, [[0, 3, 0, 0]] * 2, [[0, 0, 3, 0]] * 2, [[0, 0, 0, 3]] * 2]
    found = merged(prediction_of(logits, [2, 1, 2, 1], [0.9] * 4), (2, 4), TASK)
    assert drawn(found) == ["abac"] * 2
    assert found.label.tolist() == [2, 1, 1]


def test_a_small_segment_leaves_its_pixels_to_the_others():
    logits = [
        [[3, 3, 1, 1, 1], [3, 3, 2, 2, 2]],
        [[0, 0, 2, 2, 2], [0, 0, 1, 1, 1]],
        [[0, 0, 0, 0, 4], [0, 0, 0, 0, 0]],
    ]
    prediction = prediction_of(logits, [0, 1, 1], [0.9] * 3)
    assert drawn(merged(prediction, (2, 5), Panoptic(least_area=0))) == ["aabbc", "aaaaa"]
    # The third has one pixel, which the second one then gets.
    assert drawn(merged(prediction, (2, 5), Panoptic(least_area=1))) == ["aabbb", "aaaaa"]
    assert drawn(merged(prediction, (2, 5), Panoptic(least_area=2))) == ["aaaaa", "aaaaa"]
    found = merged(prediction, (2, 5), Panoptic(least_area=10))
    assert (drawn(found), len(found.label)) == ([".....", "....."], 0)


def test_masks_are_cut_to_the_real_part_and_brought_to_the_picture_s_size():
    logits = np.zeros((2, 4, 6), np.float32)
    logits[0, :, :2] = logits[1, :, 2:] = 8
    prediction = prediction_of(logits, [0, 1], [0.9, 0.9])
    prediction |= {"padded": np.array([8, 12]), "size": np.array([6, 8])}
    found = merged(prediction, (12, 16), TASK)
    assert drawn(found) == ["aaaaaaaabbbbbbbb"] * 12


def test_nothing_over_the_threshold_is_nothing_found():
    found = merged(prediction_of(np.zeros((2, 3, 4)), [0, 1], [0.2, 0.1]), (3, 4), TASK)
    assert (found.ids == VOID).all()
    assert len(found.label) == len(found.areas) == 0


def test_the_truth_has_small_masks_over_large_ones_and_stuff_together():
    masks = np.zeros((4, 2, 6), bool)
    masks[0, 0, 1] = True  # on the second one
    masks[1, :, :3] = True
    masks[2, :, 3] = masks[3, :, 5] = True
    example = {"image": np.zeros((2, 6, 3)), "masks": masks, "boxes": np.zeros((4, 4))}
    found = true_segments(example | {"box_label": np.array([0, 1, 2, 2])}, stuff=(2,))
    assert drawn(found) == ["babc.c", "bbbc.c"]
    assert found.label.tolist() == [0, 1, 2]
    apart = true_segments(example | {"box_label": np.array([0, 1, 2, 2])})
    assert apart.label.tolist() == [0, 1, 2, 2]
    with pytest.raises(DataError, match=r"masks of \(2, 6\) on a picture of \(3, 6\)"):
        true_segments(example | {"image": np.zeros((3, 6, 3)), "box_label": np.arange(4)})


def test_panoptic_quality_is_that_counted_by_hand():
    true = segments(["aaaab", "aaaab", "ccccb", "cccc."], [0, 0, 1])
    found = segments(["aaabb", "aaabb", "ddcc.", "ddccc"], [0, 0, 1, 1])
    quality = Quality()
    quality.add(found, true)
    # Class 0: a has IoU 6/8, b has 2/5, so it is wrong and the true b is missed. Class 1: c has
    # 4 of 8 pixels and one in the void, which counts nothing, so 4/8, as has d: both are wrong.
    numbers = quality.numbers()
    first, second = (6 / 8) / (1 + 0.5 + 0.5), 0
    np.testing.assert_allclose(numbers["pq"], (first + second) / 2)
    np.testing.assert_allclose(numbers["sq"], (6 / 8 + 0) / 2)
    np.testing.assert_allclose(numbers["rq"], (1 / 2 + 0) / 2)
    assert list(numbers) == ["pq", "sq", "rq"]


def test_things_and_stuff_are_also_measured_apart_and_pictures_add_up():
    true = segments(["aaab", "aaab"], [0, 2])
    quality = Quality()
    quality.add(true, true)
    quality.add(segments(["aaab", "aabb"], [0, 2]), true)
    numbers = quality.numbers(stuff=(2,))
    np.testing.assert_allclose(numbers["pq_things"], (1 + 5 / 6) / 2)
    np.testing.assert_allclose(numbers["pq_stuff"], (1 + 2 / 3) / 2)
    np.testing.assert_allclose(numbers["pq"], (numbers["pq_things"] + numbers["pq_stuff"]) / 2)
    assert numbers["rq"] == numbers["rq_stuff"] == 1
    for part in ("", "_things", "_stuff"):  # with one class each, PQ = SQ x RQ
        assert part == "" or math.isclose(
            numbers[f"pq{part}"], numbers[f"sq{part}"] * numbers[f"rq{part}"]
        )


def test_half_an_overlap_is_not_enough_and_a_wrong_class_is_two_mistakes():
    true = segments(["aabb"], [0, 1])
    half = Quality()
    half.add(segments(["a..."], [0]), true)
    assert half.numbers()["pq"] == 0
    wrong = Quality()
    wrong.add(segments(["aabb"], [0, 2]), true)
    np.testing.assert_allclose(wrong.numbers()["pq"], (1 + 0 + 0) / 3)


def test_what_lies_in_the_void_or_in_a_crowd_is_no_mistake():
    true = segments(["aabbb...", "aabbb..."], [0, 1], crowd=(1,))
    quality = Quality()
    quality.add(segments(["aabbbddd", "aaccbbdd"], [0, 1, 1, 0]), true)
    assert quality.numbers() == {"pq": 1.0, "sq": 1.0, "rq": 1.0}
    assert set(quality.classes) == {0}  # nobody has to find the crowd
    # In a crowd of another class it is one.
    quality.add(segments(["aabbb...", "aabbb..."], [0, 0]), true)
    assert quality.classes[0].wrong == 1


def test_a_summary_has_the_quality_if_there_are_results():
    masks = np.zeros((2, 2, 4), bool)
    masks[0, :, :2] = masks[1, :, 2:] = True
    example = {"image": np.zeros((2, 4, 3), np.uint8), "masks": masks, "boxes": np.zeros((2, 4))}
    example["box_label"] = np.array([0, 2])
    prediction = prediction_of(np.where(masks, 5.0, -5.0), [0, 2], [0.9, 0.95])
    numbers = TASK.summarize(SUMS, iter([(prediction, example)]))
    assert (numbers[TASK.headline], numbers["pq_stuff"]) == (1, 1)
    assert "loss" in numbers
    assert "pq" not in TASK.summarize(SUMS)
    with pytest.raises(DataError, match="no segment to measure"):
        TASK.summarize(SUMS, [])


@pytest.mark.parametrize("size", [(24, 40), (96, 96), (900, 1400)])
def test_a_drawing_shows_the_segments_and_says_which_were_found(size):
    H, W = size
    image = np.full((H, W, 3), 90, np.uint8)
    masks = np.zeros((2, H, W), bool)
    masks[0, : H // 2] = masks[1, H // 2 :] = True
    example = {"masks": masks, "boxes": np.zeros((2, 4)), "box_label": np.array([1, 2])}
    example["image"] = image
    logits = np.where(masks[:, :: H // 12, :: W // 20], 5.0, -5.0)
    prediction = prediction_of(logits, [1, 2], [0.99, 0.9])
    names = ("three", "four", "grass")
    picture, title, right = TASK.draw(image, example, prediction, names)
    assert (title, right) == ("2 of 2 found", True)
    assert picture.shape[0] * W > picture.shape[1] * H  # there is a legend, for the stuff
    prediction["label"] = np.array([0, 2])
    assert TASK.draw(image, example, prediction, names)[1:] == ("1 of 2 found, 1 wrong", False)
    assert TASK.draw(image, {}, prediction, names)[1:] == ("2 found", True)
    prediction["score"] = np.zeros(2)
    assert TASK.draw(image, example, prediction, names)[1:] == ("0 of 2 found", False)


def test_a_wrong_setting_is_refused():
    with pytest.raises(ConfigError, match="least_area=-1 must be 0 or more"):
        Panoptic(least_area=-1)
    with pytest.raises(ConfigError, match="threshold=2 must be in"):
        Panoptic(threshold=2)
