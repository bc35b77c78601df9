"""The tokenizer of a run: where it comes from, where it stays, and what it must agree with."""

import json

import numpy as np
import pytest

from vit_jax import main, run, vocabulary
from vit_jax.data.text import LEAST, Tokenize, open_tokenizer, train_tokenizer
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.standin import StandIn
from vit_jax.tasks.classification import Classification

SAID = ["a dog runs", "a dog sleeps", "two dogs run and two sleep"]


class Told:
    """Blank pictures with captions."""

    class_names = ()

    def __init__(self, captions=SAID):
        self.texts = captions

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"image": np.zeros((4, 5, 3), np.uint8), "captions": (self.texts[index],)}

    def name(self, index):
        return f"told {index}"


def config_of(length=8, model=None, **data):
    step = {"target": "data.text.Tokenize", "tokenizer": data.get("tokenizer", "")}
    return {
        "data": {"tokenizer": "", "vocabulary": 300, "length": length} | data,
        "train": {"transforms": [step]},
        "eval": {"transforms": [step]},
        "model": {"target": "m", "text": {"vocabulary": 0}} if model is None else model,
    }


@pytest.fixture(scope="module")
def own():
    return train_tokenizer(SAID, 300)


@pytest.fixture
def folder(own, tmp_path):
    """A run folder, as `claim` leaves it."""
    run.claim(tmp_path / "run", {"data": {}}, (), own)
    return tmp_path / "run"


def test_without_a_source_it_is_trained_and_its_size_is_the_models(own):
    config = config_of(length=6)
    tokenizer, remarks = vocabulary.settle(config, Told())
    assert tokenizer == own
    assert config["model"]["text"]["vocabulary"] == own.size
    assert remarks == [
        f"a vocabulary of {own.size} entries, learned from 3 captions",
        "1 of 3 captions are longer than 6 tokens and are cut",
    ]


def test_where_only_some_captions_are_read_that_is_said():
    data = Told(SAID * 4)
    data.enough_captions = 6
    _, remarks = vocabulary.settle(config_of(length=6), data)
    assert remarks[1] == "2 of 6 captions looked at are longer than 6 tokens and are cut"


def test_a_repository_of_the_hub_is_asked_for_its_words_alone(own, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        vocabulary.hf, "download", lambda *arguments: asked.append(arguments) or tmp_path
    )
    with pytest.raises(ConfigError, match=r"hf:a/b has no tokenizer.json"):
        vocabulary.open_tokenizer("hf:a/b")
    own.save(tmp_path / "tokenizer.json")
    assert vocabulary.open_tokenizer("hf:a/b") == own
    assert asked[1] == ("a/b", ("tokenizer.json", "tokenizer_config.json", "config.json"))


def test_what_reads_no_text_has_no_tokenizer():
    config = config_of() | {"train": {"transforms": []}, "eval": {"transforms": []}}
    assert vocabulary.settle(config, Told()) == (None, [])
    assert config["model"]["text"]["vocabulary"] == 0


def test_a_source_may_be_a_file_a_folder_or_a_run(own, folder):
    for source in (folder / "tokenizer.json", folder):
        found, remarks = vocabulary.settle(config_of(tokenizer=str(source)), Told(["a cat"]))
        assert found == own
        assert remarks == []


def test_a_run_that_goes_on_has_its_own_tokenizer_whatever_the_captions_are_now(own, folder):
    found, _ = vocabulary.settle(config_of(), Told(["other words altogether"] * 3), folder)
    assert found == own
    (folder / "config.json").unlink()  # a run that was never begun
    found, _ = vocabulary.settle(config_of(), Told(["other words altogether"] * 3), folder)
    assert found != own


def test_another_tokenizer_than_the_runs_is_refused(own, folder, tmp_path):
    file = tmp_path / "tokenizer.json"
    own.save(file)
    config = config_of(tokenizer=str(file))
    assert vocabulary.settle(config, Told(), folder)[0] == own
    train_tokenizer(["other words altogether"] * 3, 300).save(file)
    with pytest.raises(CheckpointError, match=r"was trained with another tokenizer \(\d+ entries"):
        vocabulary.settle(config_of(tokenizer=str(file)), Told(), folder)
    file.unlink()  # what is gone is in the run folder still
    assert vocabulary.settle(config_of(tokenizer=str(file)), Told(), folder)[0] == own


def test_a_model_of_another_size_is_refused_with_both_sizes(own):
    config = config_of(model={"a": {"b": [1], "text": {"vocabulary": 49408}}})
    said = rf"the tokenizer has {own.size} entries and config.model.a.text.vocabulary is 49,408"
    with pytest.raises(ConfigError, match=said):
        vocabulary.settle(config, Told())
    config = config_of(model={"vocabulary": own.size})
    assert vocabulary.settle(config, Told())[0] == own


def test_marks_that_a_model_asks_for_are_filled_in():
    model = {"vocabulary": 0, "start": -1, "end": -1, "padding": -1, "depth": -1}
    config = config_of(model=model)
    tokenizer, _ = vocabulary.settle(config, Told())
    assert model == {"vocabulary": tokenizer.size, "start": 1, "end": 2, "padding": 0, "depth": -1}


def test_a_stand_in_counts_as_the_vocabulary_that_is_asked_for():
    config = config_of(vocabulary=8000)
    tokenizer, remarks = vocabulary.settle(config, StandIn(5, 0, "contrastive"))
    assert config["model"]["text"]["vocabulary"] == 8000
    assert tokenizer.size >= LEAST
    assert remarks == []


def test_parts_with_a_place_for_it_are_given_the_tokenizer(own):
    step = vocabulary.given(Tokenize(length=9), own)
    assert (step.tokenizer, step.length) == (own, 9)
    assert vocabulary.given(Classification(), own) == Classification()
    assert vocabulary.given(Tokenize(), None).tokenizer == ""


def test_a_run_folder_keeps_it_and_a_claim_cut_short_is_no_hindrance(own, tmp_path):
    (tmp_path / "tokenizer.json.tmp").write_text("half")
    run.claim(tmp_path, {"data": {}}, (), own)
    assert open_tokenizer(tmp_path) == own
    assert json.loads((tmp_path / "config.json").read_text()) == {"data": {}}


def test_a_batch_of_a_real_config_holds_tokens(tmp_path):
    config, *_ = main.parse(["--config=configs/clip.py:tiny"])
    found = run.set_up(config, workdir=tmp_path)
    length, size = config["data"]["length"], found.tokenizer.size
    assert found.abstract_batch["tokens"].shape == (config["batch_size"], length)
    assert config["model"]["text"]["vocabulary"] == size
    assert any(f"a vocabulary of {size} entries" in remark for remark in found.remarks)
    batch = next(found.validation())
    words = found.tokenizer.decode(batch["tokens"][0])
    assert words == found.eval_data[int(batch["index"][0])]["captions"][0]
    assert json.loads(json.dumps(config)) == config  # the run folder's config.json
