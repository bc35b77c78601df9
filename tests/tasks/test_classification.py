import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import ConfigError, DataError
from vit_jax.tasks.classification import Classification

LOGITS = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], np.float32)
LABELS = np.array([0, 1], np.int32)
# Compiled once for each task and shape.
score = jax.jit(Classification.score, static_argnums=0)
score_and_gradient = jax.jit(
    jax.value_and_grad(Classification.score, argnums=1, has_aux=True), static_argnums=0
)


def log_softmax(row):
    return [x - math.log(sum(math.exp(y) for y in row)) for x in row]


def random_batch():
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 7)).astype(np.float32)
    return logits, {"label": random.integers(0, 7, 6).astype(np.int32)}


def test_the_softmax_loss_is_the_mean_negative_log_probability_of_the_labels():
    loss, sums = score(Classification(), LOGITS, {"label": LABELS})
    by_hand = [-log_softmax(row)[k] for row, k in zip(LOGITS.tolist(), LABELS)]
    np.testing.assert_allclose(loss, sum(by_hand) / 2, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], sum(by_hand), rtol=1e-6)
    assert (float(sums["correct"]), float(sums["count"])) == (1, 2)
    assert {v.dtype for v in sums.values()} == {jnp.dtype("float32")}


def test_the_sigmoid_loss_adds_the_binary_cross_entropies_of_all_classes():
    loss, _ = score(Classification(loss="sigmoid"), LOGITS, {"label": LABELS})
    by_hand = sum(
        math.log1p(math.exp(-x if k == label else x))
        for row, label in zip(LOGITS.tolist(), LABELS)
        for k, x in enumerate(row)
    )
    np.testing.assert_allclose(loss, by_hand / 2, rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_smoothing_mixes_the_target_with_the_uniform_one(kind):
    plain, smooth = (Classification(label_smoothing=s, loss=kind) for s in (0.0, 0.3))
    target = 0.7 * np.eye(3, dtype=np.float32)[LABELS] + 0.1
    wanted, _ = score(plain, LOGITS, {"label_probs": target})
    loss, _ = score(smooth, LOGITS, {"label": LABELS})
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_a_mixed_target_weighs_the_losses_and_its_larger_share_counts_as_the_label():
    shares = np.array([[0.6, 0.4, 0.0], [0.0, 0.1, 0.9]], np.float32)
    batch = {"label": np.array([1, 0], np.int32), "label_probs": shares}
    loss, sums = score(Classification(), LOGITS, batch)
    first, second = (log_softmax(row) for row in LOGITS.tolist())
    by_hand = -(0.6 * first[0] + 0.4 * first[1] + 0.1 * second[1] + 0.9 * second[2])
    np.testing.assert_allclose(loss, by_hand / 2, rtol=1e-6)
    assert sums["correct"] == 2


def test_the_gradient_of_the_loss_is_probability_minus_target_over_the_rows():
    _, gradient = score_and_gradient(Classification(), LOGITS, {"label": LABELS})
    wanted = (np.exp([log_softmax(row) for row in LOGITS.tolist()]) - np.eye(3)[LABELS]) / 2
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("garbage", [0.0, 1e30, np.nan, np.inf])
def test_rows_that_are_not_valid_change_nothing_whatever_they_hold(kind, garbage):
    task = Classification(label_smoothing=0.1, loss=kind)
    logits, batch = random_batch()
    loss, sums = score(task, logits, batch)
    padded = np.concatenate([logits, np.full((2, 7), garbage, np.float32)])
    batch = {
        "label": np.append(batch["label"], [-1, 0]).astype(np.int32),
        "valid": np.arange(8) < 6,
    }
    (padded_loss, padded_sums), gradient = score_and_gradient(task, padded, batch)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-6)
    assert padded_sums.keys() == sums.keys()
    for name, value in sums.items():
        np.testing.assert_allclose(padded_sums[name], value, rtol=1e-6, err_msg=name)
    assert np.all(gradient[6:] == 0)
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[:6] != 0)


def test_the_sums_of_two_halves_are_those_of_the_whole():
    logits, batch = random_batch()
    valid = np.array([True, False, True, True, False, False])
    _, whole = score(Classification(), logits, {**batch, "valid": valid})
    halves = [
        score(
            Classification(), logits[part], {"label": batch["label"][part], "valid": valid[part]}
        )[1]
        for part in (slice(0, 3), slice(3, 6))
    ]
    added = {name: halves[0][name] + halves[1][name] for name in whole}
    assert set(whole) == {"loss", "correct", "correct_top5", "count"}
    for name, value in whole.items():
        np.testing.assert_allclose(added[name], value, rtol=1e-6, err_msg=name)


def test_a_batch_without_a_valid_row_has_loss_and_gradient_zero():
    batch = {"label": LABELS, "valid": np.zeros(2, bool)}
    (loss, _), gradient = score_and_gradient(Classification(), LOGITS, batch)
    assert loss == 0
    assert np.all(gradient == 0)


def test_a_label_that_no_class_has_cannot_pass_unseen():
    for wrong in (-1, 3):
        batch = {"label": np.array([0, wrong], np.int32)}
        loss, _ = score(Classification(), LOGITS, batch)
        assert math.isnan(loss), wrong


def test_the_true_class_among_the_likeliest_counts_where_there_are_more_classes():
    logits = np.arange(7, dtype=np.float32)[None]  # class 6 is the likeliest, 2 the fifth
    for label, correct, among in [(6, 1, 1), (2, 0, 1), (1, 0, 0)]:
        _, sums = score(Classification(), logits, {"label": np.array([label])})
        assert (sums["correct"], sums["correct_top5"]) == (correct, among)
    _, sums = score(Classification(), logits[:, :5], {"label": np.array([0])})
    assert "correct_top5" not in sums


def test_equal_logits_are_one_guess_and_not_always_right():
    _, sums = score(Classification(top=2), jnp.zeros((6, 3)), {"label": np.arange(6) % 3})
    assert sums["correct"] == 2
    assert sums["correct_top2"] == 4


def test_a_prediction_lists_the_likeliest_classes_with_their_probabilities():
    found = Classification(top=2).predict(jnp.asarray(LOGITS, jnp.bfloat16), {})
    assert found["label"].tolist() == [0, 2]
    assert found["label"].dtype == jnp.int32
    assert found["top_labels"].tolist() == [[0, 1], [2, 0]]
    wanted = np.exp([log_softmax(row) for row in LOGITS.tolist()])
    np.testing.assert_allclose(found["probability"], wanted.max(-1), rtol=1e-5)
    np.testing.assert_allclose(found["top_probabilities"][0], wanted[0, :2], rtol=1e-5)
    assert Classification().predict(jnp.asarray(LOGITS), {})["top_labels"].shape == (2, 3)
    found = Classification(loss="sigmoid").predict(jnp.asarray(LOGITS), {})
    np.testing.assert_allclose(found["probability"][0], 1 / (1 + math.exp(-2)), rtol=1e-6)


def test_a_summary_takes_the_ratios():
    sums = {"loss": np.float64(6), "correct": 3.0, "correct_top5": 4.0, "count": jnp.float32(4)}
    numbers = Classification().summarize(sums)
    assert numbers == {"loss": 1.5, "accuracy": 0.75, "accuracy_top5": 1.0}
    assert list(numbers)[:2] == ["loss", Classification().headline]
    assert {type(v) for v in numbers.values()} == {float}
    with pytest.raises(DataError, match="no valid example"):
        Classification().summarize({"loss": 0.0, "correct": 0.0, "count": 0.0})


def test_a_drawing_says_what_was_seen_and_what_it_is():
    image, names = np.zeros((2, 3, 3), np.uint8), ("cat", "100% wool")
    prediction = {"label": np.int32(1), "probability": np.float32(0.98)}
    drawn = Classification().draw(image, {"label": 1}, prediction, names)
    assert drawn[0] is image
    assert drawn[1:] == ("100% wool (98 %)", True)
    drawn = Classification().draw(image, {"label": np.int32(0)}, prediction, names)
    assert drawn[1:] == ("100% wool (98 %), is cat", False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "softmx"}, "no loss 'softmx'. Did you mean 'softmax'"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ({"top": 0}, "top=0 must be at least 1"),
    ],
)
def test_a_wrong_setting_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Classification(**values)
