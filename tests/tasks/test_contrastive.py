import json
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax import main
from vit_jax.data.text import train_tokenizer
from vit_jax.errors import ConfigError, DataError
from vit_jax.tasks.contrastive import Contrastive, probabilities_of, recalls

ROWS, WIDTH = 5, 3
TINY = "--config=configs/clip.py:tiny"
TOGETHER = "--config.mesh.data=1 --config.mesh.tensor=2"  # both devices share one row


def outputs(seed=0, rows=ROWS, bias=None):
    """Embeddings of length one, and a scale."""
    random = np.random.default_rng(seed)
    found = {"logit_scale": jnp.float32(1.5)}
    for name in ("image_embedding", "text_embedding"):
        x = random.normal(size=(rows, WIDTH)).astype(np.float32)
        found[name] = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))
    return found | ({} if bias is None else {"logit_bias": jnp.float32(bias)})


def batch(*valid):
    rows = len(valid) or ROWS
    mask = np.array(valid, bool) if valid else np.ones(rows, bool)
    return {"valid": mask, "tokens": np.arange(2 * rows).reshape(rows, 2)}


def without(x, *rows):
    return np.delete(np.asarray(x), rows, 0)


def test_the_loss_is_the_mean_of_both_directions_cross_entropies():
    found = outputs()
    loss, sums = Contrastive().score(found, batch())
    image, text = (np.asarray(found[f"{k}_embedding"], np.float64) for k in ("image", "text"))
    logits = np.exp(1.5) * image @ text.T

    def cross_entropy(logits):
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return -np.log(np.diagonal(shares)).mean()

    wanted = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], wanted * ROWS, rtol=1e-5)
    assert float(sums["count"]) == ROWS
    assert float(sums["image_to_text"]) == (logits.argmax(1) == np.arange(ROWS)).sum()
    assert float(sums["text_to_image"]) == (logits.argmax(0) == np.arange(ROWS)).sum()


def test_the_sigmoid_loss_adds_up_the_decisions_on_all_pairs():
    found = outputs(bias=-2.0)
    loss, _ = Contrastive(loss="sigmoid").score(found, batch())
    image, text = (np.asarray(found[f"{k}_embedding"], np.float64) for k in ("image", "text"))
    logits = np.exp(1.5) * image @ text.T - 2.0
    sign = 2 * np.eye(ROWS) - 1
    np.testing.assert_allclose(loss, np.log1p(np.exp(-sign * logits)).sum() / ROWS, rtol=1e-5)


@pytest.mark.parametrize("task", [Contrastive(), Contrastive(loss="sigmoid")], ids=lambda t: t.loss)
def test_rows_that_are_not_valid_are_as_if_they_were_not_there(task):
    found = outputs(bias=-2.0)
    found["image_embedding"] = found["image_embedding"].at[1].set(jnp.nan)
    two = {k: without(v, 1, 3) if jnp.ndim(v) else v for k, v in found.items()}
    loss = jax.jit(lambda out, b: task.score(out, b)[0])
    part = batch(True, False, True, False, True)
    np.testing.assert_allclose(loss(found, part), loss(two, batch(*[True] * 3)), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda out: task.score(out, part)[0]))(found)
    for name in ("image_embedding", "text_embedding"):
        assert not np.asarray(gradient[name])[[1, 3]].any()
        assert np.isfinite(gradient[name]).all()
        assert np.asarray(gradient[name]).any()
    empty = jax.jit(jax.grad(lambda out: task.score(out, batch(*[False] * ROWS))[0]))(found)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(empty))


@pytest.mark.parametrize(
    ("task", "found", "said"),
    [
        (Contrastive(), outputs(rows=1), "batch_size=1: .* it needs at least 2"),
        (Contrastive(), {"image_embedding": 0}, "there are no tokens in the batch.*captions"),
        (Contrastive(loss="sigmoid"), outputs(), "needs the model's bias.*--config.model.bias=-10"),
    ],
)
def test_a_batch_that_cannot_be_scored_is_refused_with_what_is_missing(task, found, said):
    with pytest.raises(ValueError, match=said):
        task.score(found, {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loss": "softmx"}, "Did you mean 'softmax'"),
        ({"among": 1}, "among=1 must be 0"),
        ({"among": -3}, "among=-3 must be 0"),
    ],
)
def test_a_task_that_cannot_be_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Contrastive(**arguments)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"--config.batch_size=1 {TOGETHER}", "batch_size=1: a contrastive loss"),
        ("--config.accumulate=2", "accumulate=2: Contrastive compares all rows"),
        ("--config.task.loss=sigmoid", "set --config.model.bias=-10.0"),
        ("--config.model.text.vocabulary=300", "347 entries and .* is 300"),
    ],
)
def test_a_wrong_line_is_one_sentence_and_leaves_nothing(override, said, tmp_path, capsys):
    workdir = tmp_path / "run"
    status = main.main([TINY, *override.split(), f"--workdir={workdir}"])
    error = capsys.readouterr().err
    assert status in (2, 3)
    assert error.count("\n") == 1
    assert "error: " in error
    assert re.search(said, error), error
    assert not workdir.exists()


def test_recall_counts_the_share_of_queries_with_a_right_one_among_the_nearest():
    # Pictures point along the axes; the third text points where the first picture does.
    image = np.eye(4, dtype=np.float32)
    text = image[[0, 1, 0, 3]] + np.float32([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0.5, 0], [0] * 4])
    found = recalls(image, text, [("a",), ("b",), ("c",), ("d",)])
    assert found["text_to_image_r1"] == 0.75
    assert found["text_to_image_r5"] == 1.0
    # The first picture has its own and the third text equally near, which counts as nearer.
    assert found["image_to_text_r1"] == 0.75


def test_equal_captions_are_right_for_each_other_and_nothing_told_apart_is_nothing():
    image = np.eye(3, dtype=np.float32)
    text = image[[1, 0, 2]]
    assert recalls(image, text, [("a",), ("b",), ("c",)])["text_to_image_r1"] == pytest.approx(
        1 / 3
    )
    same = recalls(image, text, [("a",), ("a",), ("c",)])
    assert same["text_to_image_r1"] == same["image_to_text_r1"] == 1.0
    # The second text is the first picture's other caption.
    other = recalls(image, text, [("a", "b"), ("b",), ("c",)])
    assert other["text_to_image_r1"] == pytest.approx(2 / 3)
    flat = recalls(np.ones((20, 3)), np.ones((20, 3)), [(str(i),) for i in range(20)])
    assert set(flat.values()) == {0.0}


def test_recall_does_not_depend_on_how_many_queries_are_ranked_at_once(monkeypatch):
    random = np.random.default_rng(0)
    image, text = random.normal(size=(2, 21, 4))
    captions = [(f"{i % 17}",) for i in range(21)]
    whole = recalls(image, text, captions)
    monkeypatch.setattr("vit_jax.tasks.contrastive.ROWS", 4)
    assert recalls(image, text, captions) == whole


def summarized(task, examples):
    found = outputs(rows=examples)
    _, sums = task.score(found, {})
    rows = [
        (
            {k: np.asarray(found[k])[i] for k in ("image_embedding", "text_embedding")},
            {"captions": (f"text {i}",)},
        )
        for i in range(examples)
    ]
    return task.summarize(sums, rows)


def test_a_summary_is_the_mean_over_whole_groups():
    numbers = summarized(Contrastive(), 7)
    assert numbers["logit_scale"] == pytest.approx(1.5)
    assert {"loss", "text_to_image_r1", "image_to_text_r10", "batch_text_to_image"} <= set(numbers)
    found = outputs(rows=7)
    image, text = (np.asarray(found[f"{k}_embedding"]) for k in ("image", "text"))
    parts = [
        recalls(image[g], text[g], [(str(i),) for i in range(3)])
        for g in (slice(0, 3), slice(3, 6))
    ]
    wanted = np.mean([p["text_to_image_r1"] for p in parts])
    assert summarized(Contrastive(among=3), 7)["text_to_image_r1"] == pytest.approx(wanted)
    with pytest.raises(DataError, match="among=8, but only 7 held-out examples"):
        summarized(Contrastive(among=8), 7)
    sums = {k: np.zeros(()) for k in ("loss", "image_to_text", "text_to_image", "count")}
    with pytest.raises(DataError, match="no valid example"):
        Contrastive().summarize(sums | {"logit_scale": np.zeros(())})


def test_probabilities_add_up_over_texts_or_stand_for_each_pair():
    found = outputs(bias=-2.0)
    shares = np.asarray(probabilities_of(found, "softmax"))
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    pairs = np.asarray(probabilities_of(found, "sigmoid"))
    logits = np.exp(1.5) * np.asarray(found["image_embedding"] @ found["text_embedding"].T) - 2
    np.testing.assert_allclose(pairs, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    some = np.asarray(probabilities_of(found, "softmax", np.arange(ROWS) < 2))
    np.testing.assert_allclose(some[:, :2].sum(1), 1, rtol=1e-6)
    assert not some[:, 2:].any()


def test_a_drawn_picture_has_the_likeliest_caption_of_its_batch_and_the_truth_if_that_is_wrong():
    words = ("a red six", "a blue one")
    tokenizer = train_tokenizer(words * 3, 300)
    task = Contrastive(tokenizer=tokenizer)
    rows = np.stack([tokenizer.fill(text, 12) for text in words])
    near = jnp.eye(2)
    found = {"image_embedding": near, "text_embedding": near[::-1], "logit_scale": jnp.float32(3)}
    told = task.predict(found, {"tokens": rows, "valid": np.ones(2, bool)})
    first = {k: np.asarray(v)[0] for k, v in told.items()}
    image = np.zeros((2, 3, 3), np.uint8)
    _, title, right = task.draw(image, {"captions": ("a red six",)}, first, ())
    assert (title, right) == ("a blue one (100 %), is a red six", False)
    _, title, right = task.draw(image, {"captions": ("other", "a blue one")}, first, ())
    assert (title, right) == ("a blue one (100 %)", True)
    assert task.draw_target(image, {"tokens": rows[0]}, ())[1] == "a red six"
    alone = task.predict(found, {"tokens": rows, "valid": np.array([True, False])})
    assert np.asarray(alone["best_tokens"][0]).tolist() == rows[0].tolist()


def gradients(loss, devices):
    """Of embeddings whose rows lie on so many devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    found = outputs(rows=6, bias=-2.0)
    placed = {k: jax.device_put(v, rows if jnp.ndim(v) else whole) for k, v in found.items()}
    valid = jax.device_put(np.arange(6) != 4, rows)
    task = Contrastive(loss=loss)
    return jax.jit(jax.grad(lambda out, valid: task.score(out, {"valid": valid})[0]))(placed, valid)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_rows_on_two_devices_are_compared_with_each_other(loss):
    one, two = gradients(loss, 1), gradients(loss, 2)
    chex.assert_trees_all_close(jax.device_get(two), jax.device_get(one), atol=1e-6)
    assert np.abs(one["logit_scale"]) > 1e-3


@pytest.mark.slow
def test_gradients_of_eight_devices_equal_those_of_one():
    arguments = [
        TINY,
        "--config.batch_size=16",
        # One step of plain gradient descent at a rate of 1: parameters differ as gradients do.
        "--config.optimizer.name=sgd",
        "--config.optimizer.momentum=0.0",
        "--config.optimizer.weight_decay=0.0",
        "--config.optimizer.clip=1.0",
        "--config.learning_rate=1.0",
        "--config.schedule.name=constant",
    ]
    meshes = ("data=1", "data=8")
    command = [sys.executable, "-m", "tests.devices", " ".join(arguments), "1", *meshes]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    one, eight = (json.loads(line) for line in done.stdout.splitlines())
    assert (one["mesh"], eight["mesh"]) == meshes
    assert 0 < eight["gap"] < 1e-5
    assert eight["losses"] == pytest.approx(one["losses"], abs=1e-5)
