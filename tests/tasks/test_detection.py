import contextlib
import io
import json
import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vit_jax import boxes
from vit_jax.errors import ConfigError, DataError
from vit_jax.tasks import detection
from vit_jax.tasks.detection import Detection, average_precision, match

B, Q, M, K, H, W = 4, 7, 5, 3, 12, 20
match = jax.jit(match)
# One compilation for all tests: batches have one shape, masks and `valid` throughout.
score_and_gradient = jax.jit(
    jax.value_and_grad(Detection.score, argnums=1, has_aux=True), static_argnums=0
)


def score(task, outputs, batch):
    return score_and_gradient(task, outputs, batch)[0]


def random_boxes(random, *shape):
    """(cx, cy, w, h), inside the unit square."""
    size = random.uniform(0.1, 0.5, (*shape, 2))
    centre = random.uniform(size / 2, 1 - size / 2)
    return np.concatenate([centre, size], -1).astype(np.float32)


def random_outputs(random, rows=B):
    return {
        "logits": random.normal(size=(rows, Q, K + 1)).astype(np.float32),
        "boxes": random_boxes(random, rows, Q),
    }


def random_batch(seed=0):
    """Outputs with an auxiliary layer, and a batch of rows with 3, 0, 5 (all) and 1 objects."""
    random = np.random.default_rng(seed)
    outputs = random_outputs(random) | {"auxiliary": [random_outputs(random)]}
    label = np.full((B, M), -1, np.int32)
    for row, count in enumerate((3, 0, M, 1)):
        label[row, :count] = random.integers(0, K, count)
    outputs["masks"] = random.normal(size=(B, Q, H // 2, W // 2)).astype(np.float32)
    batch = {"boxes": random_boxes(random, B, M), "box_label": label, "valid": np.ones(B, bool)}
    batch["masks"] = random.uniform(size=(B, M, H, W)) < 0.3
    return outputs, batch


def corners(box):
    cx, cy, w, h = np.asarray(box, np.float64)
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def giou(a, b):
    (a0, a1, a2, a3), (b0, b1, b2, b3) = corners(a), corners(b)
    shared = max(min(a2, b2) - max(a0, b0), 0) * max(min(a3, b3) - max(a1, b1), 0)
    union = (a2 - a0) * (a3 - a1) + (b2 - b0) * (b3 - b1) - shared
    around = (max(a2, b2) - min(a0, b0)) * (max(a3, b3) - min(a1, b1))
    return shared / union - (around - union) / around


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def reference(outputs, batch):
    """One layer's parts, row by row and object by object."""
    total = dict.fromkeys(
        ("class_loss", "class_weight", "l1_loss", "giou_loss", "class_wrong"), 0.0
    )
    pairs = []
    for logits, found, label, truth, valid in zip(
        outputs["logits"].astype(np.float64),
        outputs["boxes"],
        *(batch[k] for k in ("box_label", "boxes", "valid")),
    ):
        if not valid:
            continue
        p = softmax(logits)
        label, truth = label[label >= 0], truth[label >= 0]
        cost = np.array(
            [
                [
                    5 * np.abs(found[q] - truth[m]).sum()
                    - p[q, label[m]]
                    - 2 * giou(found[q], truth[m])
                    for m in range(len(label))
                ]
                for q in range(len(logits))
            ]
        ).reshape(len(logits), len(label))
        taken = dict(zip(*linear_sum_assignment(cost)))
        pairs.append(taken)
        for q in range(len(logits)):
            weight, wanted = (1, label[taken[q]]) if q in taken else (0.1, K)
            total["class_loss"] -= weight * math.log(p[q, wanted])
            total["class_weight"] += weight
        for q, m in taken.items():
            total["l1_loss"] += np.abs(found[q] - truth[m]).sum()
            total["giou_loss"] += 1 - giou(found[q], truth[m])
            total["class_wrong"] += p[q].argmax() != label[m]
    return total, pairs


def whole(total, number):
    objects = 5 * total["l1_loss"] + 2 * total["giou_loss"]
    return total["class_loss"] / total["class_weight"] + objects / max(number, 1)


def test_matching_equals_scipy_s_for_any_number_of_targets_and_padding_takes_no_query():
    random = np.random.default_rng(0)
    cost = random.normal(size=(10_000, 12, 8)).astype(np.float32)
    counts = np.arange(10_000) % 9  # 0 .. M
    present = np.array([random.permutation(8) < count for count in counts])
    cost[~np.broadcast_to(present[:, None], cost.shape)] = -50  # padding that would like to
    found = np.asarray(match(cost, present))
    for matrix, mask, queries in zip(cost, present, found):
        assert (queries[~mask] == 12).all()
        chosen = queries[mask]
        assert len(set(chosen.tolist())) == len(chosen)
        rows, columns = linear_sum_assignment(matrix[:, mask])
        best = matrix[:, mask][rows, columns].sum()
        np.testing.assert_allclose(matrix[chosen, np.flatnonzero(mask)].sum(), best, atol=1e-4)
        wanted = np.full(12, -1)
        wanted[rows] = columns
        assert (wanted[chosen] == np.arange(len(chosen))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_costs_that_are_no_numbers_neither_hang_the_search_nor_spoil_other_rows(value):
    random = np.random.default_rng(1)
    cost, present = random.normal(size=(3, 12, 8)).astype(np.float32), np.ones((3, 8), bool)
    wanted = np.asarray(match(cost, present))
    cost[0] = value
    cost[1, 5, 3] = value
    found = np.asarray(match(cost, present))
    assert all(sorted(set(row.tolist())) == sorted(row.tolist()) for row in found)
    assert found.max() < 12
    assert (found[2] == wanted[2]).all()
    assert (found[1, 3] == 5) == (value < 0)


def test_a_batch_without_room_for_objects_is_matched_too():
    assert detection.match(jnp.zeros((2, 4, 0)), jnp.zeros((2, 0), bool)).shape == (2, 0)


def test_the_loss_and_its_parts_are_those_of_a_plain_reference():
    outputs, batch = random_batch()
    loss, sums = score(Detection(), outputs, batch)
    last, _ = reference(outputs, batch)
    for name, value in last.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    assert (float(sums["boxes"]), float(sums["count"])) == (9, 4)
    earlier, _ = reference(outputs["auxiliary"][0], batch)
    masks = (sums["mask_loss"] + sums["dice_loss"]) / 9
    np.testing.assert_allclose(loss - masks, whole(last, 9) + whole(earlier, 9), rtol=1e-5)
    np.testing.assert_allclose(sums["auxiliary_class_loss"], earlier["class_loss"], rtol=1e-5)
    np.testing.assert_allclose(
        sums["auxiliary_box_loss"],
        5 * earlier["l1_loss"] + 2 * earlier["giou_loss"],
        rtol=1e-5,
    )
    np.testing.assert_allclose(sums["loss"], 4 * loss, rtol=1e-6)
    assert {v.dtype for v in sums.values()} == {jnp.dtype("float32")}


def test_the_order_of_objects_and_queries_changes_nothing():
    outputs, batch = random_batch()
    loss, _ = score(Detection(), outputs, batch)
    objects, queries = np.array([4, 2, 0, 1, 3]), np.random.default_rng(2).permutation(Q)
    turned = jax.tree.map(lambda x: x[:, queries], outputs)
    mixed = {k: v if k == "valid" else v[:, objects] for k, v in batch.items()}
    np.testing.assert_allclose(score(Detection(), turned, mixed)[0], loss, rtol=1e-6)


def test_mask_losses_are_those_of_the_matched_queries():
    outputs, batch = random_batch()
    _, sums = score(Detection(), outputs, batch)
    _, pairs = reference(outputs, batch)
    focal = dice = 0.0
    for row, taken in enumerate(pairs):
        for q, m in taken.items():
            x = cv2.resize(outputs["masks"][row, q].astype(np.float64), (W, H))
            t = batch["masks"][row, m]
            p = 1 / (1 + np.exp(-x))
            each = np.where(t, 0.25 * (1 - p) ** 2 * -np.log(p), 0.75 * p**2 * -np.log(1 - p))
            focal += each.mean()
            dice += 1 - (2 * p[t].sum() + 1) / (p.sum() + t.sum() + 1)
    np.testing.assert_allclose(sums["mask_loss"], focal, rtol=1e-5)
    np.testing.assert_allclose(sums["dice_loss"], dice, rtol=1e-5)
    numbers = Detection().summarize(sums)
    np.testing.assert_allclose(numbers["mask_loss"], focal / 9, rtol=1e-5)
    np.testing.assert_allclose(numbers["loss"], float(sums["loss"]) / 4, rtol=1e-5)


@pytest.mark.parametrize("garbage", [0.0, 1e30, np.nan, np.inf])
def test_rows_that_are_not_valid_change_nothing_whatever_they_hold(garbage):
    outputs, batch = random_batch()
    batch["valid"] = np.array([True, True, False, True])
    last, pairs = reference(outputs, batch)
    for array in [*jax.tree.leaves(outputs), batch["boxes"]]:
        array[2] = garbage
    (loss, sums), gradient = score_and_gradient(Detection(), outputs, batch)
    assert (float(sums["boxes"]), float(sums["count"])) == (4, 3)
    for name, value in last.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    assert np.isfinite(loss)
    for array in jax.tree.leaves(gradient):
        assert np.isfinite(array).all()
        assert (array[2] == 0).all()
    assert (gradient["logits"][1] != 0).all()  # it has no object: all queries learn that
    assert (gradient["boxes"][1] == 0).all()
    unmatched = np.array([q not in pairs[0] for q in range(Q)])
    assert (gradient["boxes"][0][unmatched] == 0).all()
    assert (gradient["masks"][0][unmatched] == 0).all()
    assert (gradient["boxes"][0][~unmatched] != 0).any(-1).all()


def test_the_sums_of_two_halves_give_the_summary_of_the_whole():
    outputs, batch = random_batch()
    halves = [
        score(Detection(), outputs, batch | {"valid": np.array(valid)})[1]
        for valid in ([True, False, True, False], [False, True, False, True])
    ]
    loss, sums = score(Detection(), outputs, batch)
    added = {name: halves[0][name] + halves[1][name] for name in sums}
    numbers, wanted = (Detection().summarize(s) for s in (added, sums))
    assert next(iter(numbers)) == "loss"
    for name, value in wanted.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(wanted["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(wanted["class_error"], float(sums["class_wrong"]) / 9)


def test_a_batch_without_any_object_teaches_that_there_is_none():
    outputs, batch = random_batch()
    batch["box_label"][:] = -1
    (loss, sums), gradient = score_and_gradient(Detection(), outputs, batch)
    layers = outputs, *outputs["auxiliary"]
    wanted = sum(-np.log(softmax(layer["logits"])[..., K]).mean() for layer in layers)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert sums["boxes"] == 0
    assert (gradient["boxes"] == 0).all()
    assert Detection().summarize(sums)["class_error"] == 0
    (loss, _), gradient = score_and_gradient(
        Detection(), outputs, batch | {"valid": np.zeros(B, bool)}
    )
    assert loss == 0
    assert all((array == 0).all() for array in jax.tree.leaves(gradient))


def test_a_prediction_that_is_no_number_makes_the_loss_none():
    outputs, batch = random_batch()
    outputs["boxes"][0] = np.nan
    assert math.isnan(score(Detection(), outputs, batch)[0])


def test_a_class_beyond_the_head_cannot_pass_unseen():
    outputs, batch = random_batch()
    batch["box_label"][0, 0] = K
    assert math.isnan(score(Detection(), outputs, batch)[0])


def test_more_boxes_than_queries_are_refused_before_anything_runs():
    outputs, batch = random_batch()
    few = jax.tree.map(lambda x: x[:, :4], outputs)
    with pytest.raises(ConfigError, match=r"5 boxes .* 4 queries"):
        Detection().score(few, batch)


def test_a_prediction_lists_the_surest_boxes_without_the_class_for_nothing():
    logits = np.full((1, 3, 3), -10, np.float32)
    logits[0, 0] = 1, 0, 5  # most likely nothing
    logits[0, 1] = 0, 4, 0
    logits[0, 2] = 3, 0, 1
    box = np.float32([[[0.5, 0.5, 1, 1], [0.5, 0.25, 0.5, 0.5], [0.1, 0.1, 0.2, 0.4]]])
    masks = np.arange(3, dtype=np.float32)[None, :, None, None] + np.zeros((1, 3, 2, 2), np.float32)
    mask = np.zeros((1, 6, 8), bool)
    mask[0, :4, :7] = True
    outputs = {"logits": logits, "boxes": box, "masks": masks}
    found = jax.jit(Detection(detections=2).predict)(outputs, {"image_mask": mask})
    assert found["label"].tolist() == [[1, 0]]
    wanted = np.exp(4) / (2 + np.exp(4)), np.exp(3) / (np.exp(3) + 1 + np.exp(1))
    np.testing.assert_allclose(found["score"][0], wanted, rtol=1e-5)
    np.testing.assert_allclose(found["boxes"][0, 0], [0.25, 0, 0.75, 0.5])
    assert found["masks"][0, :, 0, 0].tolist() == [1, 2]
    assert (found["padded"].tolist(), found["size"].tolist()) == ([[6, 8]], [[4, 7]])
    assert Detection().predict(outputs, {"image_mask": mask})["label"].shape == (1, 3)


def results_of(seed=0, pictures=12, noise=0.02):
    """(prediction, example) pairs: found boxes are the true ones, moved, and some more."""
    random = np.random.default_rng(seed)
    for _ in range(pictures):
        size = tuple(random.integers(60, 300, 2).tolist())
        m = int(random.integers(0, 7))
        truth = boxes.to_corners(random_boxes(random, m).astype(np.float64))
        label = random.integers(0, K, m)
        extra = boxes.to_corners(random_boxes(random, 4).astype(np.float64))
        found = np.concatenate([truth + random.normal(scale=noise, size=truth.shape), extra])
        found = np.concatenate([np.minimum(found[:, :2], found[:, 2:] - 0.01), found[:, 2:]], 1)
        guess = np.concatenate([label, random.integers(0, K, 4)])
        example = {
            "image": np.zeros((*size, 3), np.uint8),
            "boxes": boxes.to_pixels(truth, size).astype(np.float32),
            "box_label": label,
            "crowd": random.uniform(size=m) < 0.2,
        }
        scores = np.sort(random.uniform(size=len(guess)))[::-1]
        yield {"boxes": found, "label": guess, "score": scores}, example


def test_the_twelve_numbers_are_those_that_pycocotools_prints_for_plain_coco_files(tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = average_precision(results_of())
    truth = {"images": [], "annotations": [], "categories": [{"id": k} for k in range(K)]}
    found = []
    for picture, (prediction, example) in enumerate(results_of()):
        h, w = example["image"].shape[:2]
        truth["images"].append({"id": picture, "height": h, "width": w})
        for (x0, y0, x1, y1), label, crowd in zip(
            example["boxes"].tolist(), example["box_label"].tolist(), example["crowd"].tolist()
        ):
            box = [x0, y0, x1 - x0, y1 - y0]
            entry = {"id": len(truth["annotations"]) + 1, "image_id": picture, "bbox": box}
            entry |= {"category_id": label, "iscrowd": int(crowd), "area": box[2] * box[3]}
            truth["annotations"].append(entry)
        pixels = prediction["boxes"] * [w, h, w, h]
        for (x0, y0, x1, y1), label, probability in zip(
            pixels.tolist(), prediction["label"].tolist(), prediction["score"].tolist()
        ):
            entry = {"image_id": picture, "category_id": label, "score": probability}
            found.append(entry | {"bbox": [x0, y0, x1 - x0, y1 - y0]})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    wanted = dict(zip(detection.NUMBERS, evaluation.stats.tolist()))
    assert 0.1 < numbers["ap"] < 0.9
    assert len({round(v, 6) for v in numbers.values()}) > 8
    for name, value in wanted.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-9, err_msg=name)


def perfect(*sides, **more):
    """One picture of 200 x 300 with squares of class 0, all of them found."""
    truth = np.array([[10 * i, 5, 10 * i + side, 5 + side] for i, side in enumerate(sides)])
    truth = truth.reshape(-1, 4).astype(float)
    example = {"image": np.zeros((200, 300, 3), np.uint8), "boxes": truth}
    example |= {"box_label": np.zeros(len(sides), int)} | more
    prediction = {"boxes": boxes.to_fractions(truth, (200, 300))}
    prediction |= {"label": np.zeros(len(sides), int), "score": np.linspace(0.9, 0.8, len(sides))}
    return prediction, example


def test_everything_found_is_an_ap_of_one_and_sizes_without_an_object_have_no_number(capsys):
    numbers = average_precision([perfect(20, 120)])
    one = {"ap", "ap50", "ap75", "ap_small", "ap_large", "ar10", "ar100", "ar_small", "ar_large"}
    assert {k for k, v in numbers.items() if math.isclose(v, 1, rel_tol=1e-9)} == one
    assert set(numbers) == one | {"ar1"}
    assert numbers["ar1"] == 0.5
    assert capsys.readouterr().out == ""


def test_an_object_s_size_is_its_area_or_its_mask_s_or_its_box_s_in_that_order():
    mask = np.zeros((1, 200, 300), bool)
    mask[0, 5:45, 0:40] = True  # 1600 pixels: medium, in a box that is large
    assert "ap_large" in average_precision([perfect(100)])
    assert "ap_medium" in average_precision([perfect(100, masks=mask)])
    assert "ap_small" in average_precision([perfect(100, masks=mask, area=np.array([900.0]))])


def test_a_crowd_is_neither_missed_nor_a_mistake_to_find():
    prediction, example = perfect(20, 120, crowd=np.array([False, True]))
    assert average_precision([(prediction, example)])["ap"] == pytest.approx(1)
    missed = {k: v[:1] for k, v in prediction.items()}
    assert average_precision([(missed, example)])["ap"] == pytest.approx(1)


def test_the_size_of_a_picture_is_read_from_its_file():
    prediction, example = perfect(20, 120)
    example["image"] = cv2.imencode(".png", example["image"])[1].tobytes()
    assert average_precision(iter([(prediction, example)]))["ap"] == pytest.approx(1)


def test_masks_have_an_ap_of_their_own_on_the_picture_s_own_pixels():
    prediction, example = perfect(60, 100)
    example["masks"] = np.zeros((2, 200, 300), bool)
    example["masks"][0, 6:64, 2:60] = example["masks"][1, 6:104, 12:110] = True
    # The model saw the picture at half its size, with padding to the right and below.
    small = np.where(example["masks"][:, ::2, ::2], 8.0, -8.0).astype(np.float32)
    small = np.pad(small, ((0, 0), (0, 12), (0, 20)), constant_values=9.0)
    sizes = {"padded": np.array([112, 170]), "size": np.array([100, 150])}
    numbers = average_precision([(prediction | sizes | {"masks": small}, example)])
    assert numbers["mask_ap"] == pytest.approx(1)
    other = example | {"box_label": np.array([0, 1])}
    swapped = prediction | sizes | {"masks": small[::-1], "label": np.array([0, 1])}
    numbers = average_precision([(swapped, other)])
    assert numbers["ap"] == pytest.approx(1)
    assert numbers["mask_ap"] < 0.1


def test_pictures_without_objects_or_without_predictions_are_measured():
    none = {"boxes": np.zeros((0, 4)), "label": np.zeros(0, int), "score": np.zeros(0)}
    empty = perfect()[1]
    found, example = perfect(50)
    assert average_precision([(none, empty), (found, example)])["ap"] == pytest.approx(1)
    assert average_precision([(none, example)])["ap"] == 0
    with pytest.raises(DataError, match="no object to measure"):
        average_precision([(found, empty)])


def test_a_summary_has_the_ap_if_there_are_results_and_needs_a_valid_row():
    _, sums = score(Detection(), *random_batch())
    numbers = Detection().summarize(sums, [perfect(20)])
    assert numbers[Detection.headline] == pytest.approx(1)
    assert "ap" not in Detection().summarize(sums)
    assert {type(v) for v in numbers.values()} == {float}
    with pytest.raises(DataError, match="no valid example"):
        Detection().summarize(sums | {"count": 0.0})


NAMES = ("red cell", "Zellkörper", "platelet")


@pytest.mark.parametrize("size", [(24, 40), (96, 96), (900, 1400)])
def test_a_drawing_says_what_was_found_and_is_large_enough_to_read(size):
    image = np.full((*size, 3), 90, np.uint8)
    truth = np.array([[0.1, 0.1, 0.5, 0.6], [0.6, 0.5, 0.9, 0.95]])
    example = {"boxes": boxes.to_pixels(truth, size), "box_label": np.array([0, 1])}
    prediction = {"boxes": truth, "label": np.array([0, 1]), "score": np.array([0.97, 0.6])}
    picture, title, right = Detection().draw(image, example, prediction, NAMES)
    assert (title, right) == ("2 of 2 found", True)
    assert picture.dtype == np.uint8
    assert max(picture.shape) >= 400
    assert (picture != 90).any()
    assert (image == 90).all()
    _, title, right = Detection(threshold=0.7).draw(image, example, prediction, NAMES)
    assert (title, right) == ("1 of 2 found", False)
    wrong = prediction | {"label": np.array([0, 2])}
    _, title, right = Detection().draw(image, example, wrong, NAMES)
    assert (title, right) == ("1 of 2 found, 1 wrong", False)
    _, title, right = Detection().draw(image, {}, prediction, NAMES)
    assert (title, right) == ("2 found", True)


def test_two_boxes_on_one_object_are_one_too_many_and_one_in_a_crowd_is_none():
    image = np.zeros((100, 100, 3), np.uint8)
    example = {"boxes": np.array([[10.0, 10, 50, 50]]), "box_label": np.array([1])}
    twice = np.array([[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.48]])
    prediction = {"boxes": twice, "label": np.array([1, 1]), "score": np.array([0.9, 0.8])}
    assert Detection().draw(image, example, prediction, NAMES)[1:] == (
        "1 of 1 found, 1 wrong",
        False,
    )
    example = {
        "boxes": np.array([[10.0, 10, 50, 50], [0, 0, 60, 60]]),
        "box_label": np.array([1, 1]),
    }
    example["crowd"] = np.array([False, True])
    assert Detection().draw(image, example, prediction, NAMES)[1:] == ("1 of 1 found", True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"box_weight": -1.0}, "box_weight=-1.0 must be 0 or more"),
        ({"nothing_weight": math.nan}, "nothing_weight=nan must be 0 or more"),
        ({"detections": 0}, "detections=0 must be at least 1"),
        ({"threshold": 1.5}, "threshold=1.5 must be in 0..1"),
    ],
)
def test_a_wrong_setting_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Detection(**values)
