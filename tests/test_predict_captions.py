"""What `predict` says with a captioner: a sentence for each picture, and where each word looked."""

import csv
import io
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax import main, predict
from vit_jax.data.text import FILE, train_tokenizer
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.models.captioner import Captioner
from vit_jax.models.vit import ViT
from vit_jax.pretrained import load, names
from vit_jax.pretrained.load import Loaded
from vit_jax.pretrained.preprocess import HALF, Preprocessing, standardize, step
from vit_jax.pretrained.recipe import Recipe

CAPTIONS = ("a red seven above a blue one", "a blue one below a red seven")
LENGTH = 8
ONE = ["--batch_size=1"]  # one shape, compiled once
RECIPE = Recipe(
    "vit_jax",
    {},
    names.Ours(),
    None,
    task={"target": "tasks.captioning.Captioning"},
    inputs={"tokens": ((LENGTH,), "int32")},
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a tokenizer, and the size of its vocabulary."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = train_tokenizer(CAPTIONS * 3, 290)
    tokenizer.save(folder / FILE)
    return folder, tokenizer.size


def captioner(words, decoder="transformer"):
    """A small one that nobody trained, whose sentences depend on the picture."""
    folder, vocabulary = words
    eyes = ViT(patch=8, width=8, depth=0, pooling="mean", positions="sincos")
    sizes = {"width": 8, "depth": 1, "heads": 2, "length": LENGTH, "vocabulary": vocabulary}
    module = Captioner(eyes, decoder=decoder, **sizes)
    variables = jax.jit(lambda x: module.init(jax.random.key(0), x, train=False))(
        jnp.zeros((1, 16, 16, 3))
    )
    return Loaded(
        module=module,
        variables=jax.tree.map(lambda x: 4 * x, variables),
        preprocess=Preprocessing((step("Resize", size=(16, 16)), standardize(HALF, HALF))),
        labels=(),
        source="a test",
        recipe=RECIPE,
        words=folder,
    )


@pytest.fixture(scope="module")
def loaded(words):
    return captioner(words)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        image = np.random.default_rng(i).integers(0, 255, (20, 30 + i, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    (tmp_path / "broken.jpg").write_text("no picture")
    return tmp_path


def run(argv, monkeypatch, loaded):
    monkeypatch.setattr(load, "load", lambda ref, **_: loaded)
    return predict.main(["--checkpoint=x", *map(str, argv)])


def test_each_picture_gets_a_sentence_with_its_probability(folder, loaded, monkeypatch, capsys):
    assert run([folder, "--format=json", *ONE], monkeypatch, loaded) == 0
    results = [r for r in json.loads(capsys.readouterr().out) if "predictions" in r]
    told = [loaded.caption([r["picture"]])[0] for r in results]
    assert len(told) == 3
    for result, (text, probability) in zip(results, told, strict=True):
        (row,) = result["predictions"]
        assert row["name"] == text != ""
        assert row["probability"] == pytest.approx(probability, rel=1e-4)
        assert 0 < probability < 1
    assert run([folder, "--format=csv", *ONE], monkeypatch, loaded) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == [text for text, _ in told]


def test_a_beam_is_asked_for_and_changes_no_other_model(folder, loaded, monkeypatch, capsys):
    assert loaded.writing(1) is loaded
    assert loaded.writing(5).module.beams == 5
    assert loaded.module.beams == 1
    with pytest.raises(ConfigError, match="a beam of 0 must be at least 1"):
        loaded.writing(0)
    assert run([folder / "0.png", "--beam=0"], monkeypatch, loaded) == 2
    assert "--beam=0 must be at least 1" in capsys.readouterr().err


def test_draw_shows_each_picture_with_what_each_word_looked_at(folder, loaded, monkeypatch):
    out = folder / "drawn"
    assert run([folder, "--draw", out, *ONE], monkeypatch, loaded) == 0
    assert sorted(p.name for p in out.iterdir()) == ["0.png", "1.png", "2.png"]
    sheet = cv2.imread(str(out / "0.png"))
    sentence = loaded.caption([folder / "0.png"])[0][0]
    columns = min(len(sentence.split()) + 1, 5)
    assert sheet.shape[1] == columns * 172 + 12


def test_a_decoder_that_does_not_look_draws_the_picture_alone(folder, words, monkeypatch):
    out = folder / "drawn"
    blind = captioner(words, "lstm")
    assert run([folder / "0.png", "--draw", out], monkeypatch, blind) == 0
    drawn, picture = (cv2.imread(str(f)) for f in (out / "0.png", folder / "0.png"))
    np.testing.assert_array_equal(drawn, picture)


def test_a_beam_has_no_meaning_for_a_classifier(folder, words, monkeypatch, capsys):
    module = vit_jax.create("vit_ti16", 3, patch=8, width=8, depth=0, heads=1, pooling="mean")
    preprocess = Preprocessing((step("Resize", size=(8, 8)), standardize(HALF, HALF)))
    other = Loaded(module, {}, preprocess, (), "a test", Recipe("ours", {}, names.Ours(), 3))
    assert run([folder, "--beam=2"], monkeypatch, other) == 2
    assert "a test writes no sentences, so it has no beam" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="writes no sentences"):
        other.caption([folder / "0.png"])


def test_a_captioner_without_its_words_is_one_sentence(folder, loaded, words):
    mute = Loaded(
        loaded.module, loaded.variables, loaded.preprocess, (), "a test", RECIPE, words=None
    )
    with pytest.raises(CheckpointError, match=r"there is no tokenizer\.json"):
        mute.caption([folder / "0.png"])


@pytest.mark.slow
def test_a_run_of_ones_own_is_opened_with_its_words(tmp_path, folder, capsys):
    workdir = tmp_path / "run"
    argv = ["--config=configs/captioner.py:tiny", f"--workdir={workdir}"]
    argv += ["--config.model.decoder=attention"]
    assert main.main(argv) == 0, capsys.readouterr().err
    opened = vit_jax.load(workdir)
    ((text, probability),) = opened.caption([folder / "0.png"], beams=2)
    assert 0 < probability < 1
    capsys.readouterr()
    argv = [f"--checkpoint={workdir}", str(folder / "0.png"), "--beam=2", *ONE]
    assert predict.main(argv) == 0
    assert text in capsys.readouterr().out
