"""Hugging Face's form: opened as published, and written so that it opens again."""

import json
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest

import vit_jax
from vit_jax import describe, predict
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.pretrained import hf, names
from vit_jax.pretrained.load import open_checkpoint

# Made by transformers' own `save_pretrained`: see tests/golden/hf.py.
TINY = Path(__file__).parent.parent / "golden" / "hf_vit_tiny"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def change(file, **entries):
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | entries))


def test_logits_are_those_of_transformers():
    want = np.load(TINY.parent / "hf_vit_tiny.npz")
    loaded = vit_jax.load(TINY)
    assert loaded.labels == ("cat", "dog", "owl")
    assert loaded.preprocess.size == (32, 48)
    chex.assert_trees_all_close(loaded.preprocess(want["picture"]), want["image"], atol=0.02)
    got = loaded(image=want["image"])
    np.testing.assert_allclose(got, want["logits"], atol=1e-5)


def test_what_is_written_opens_again_unchanged(tmp_path):
    loaded = vit_jax.load(TINY)
    hf.save(loaded, tmp_path)
    again = vit_jax.load(tmp_path)
    chex.assert_trees_all_equal(again.variables, loaded.variables)
    assert again.preprocess == loaded.preprocess
    assert again.labels == loaded.labels
    assert again.module == loaded.module
    theirs, ours = (open_checkpoint(place).arrays for place in (TINY, tmp_path))
    assert theirs.shapes == ours.shapes
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name])


def test_half_precision_is_written_as_such(tmp_path):
    hf.save(vit_jax.load(TINY, dtype="bfloat16"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert set(open_checkpoint(tmp_path).arrays.dtypes.values()) == {"bfloat16"}


def test_another_image_size_resamples_positions_and_says_so():
    loaded = vit_jax.load(TINY, image_size=(48, 48))
    assert loaded.module.backbone.image_size == (48, 48)
    assert loaded.preprocess.size == (48, 48)
    assert any("positions resampled from 4x6 to 6x6" in remark for remark in loaded.remarks)
    loaded(image=np.zeros((1, 48, 48, 3), np.float32))


def test_an_array_too_many_or_too_few_is_named(folder):
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["vit.strange.weight"] = np.zeros(3, np.float32)
    del weights["vit.layernorm.bias"]
    weights["classifier.bias"] = np.zeros(2, np.float32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        vit_jax.load(folder)
    for said in ("vit.strange.weight", "params/backbone/norm/bias", "classifier.bias (2,)"):
        assert said in str(caught.value)
    assert describe.main([str(folder)]) == 4


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "vits"}, "model_type='vits' is not known here. Did you mean 'vit'"),
        ({"hidden_act": "swishy"}, "hidden_act='swishy'"),
        ({"num_hidden_layers": 3}, "block_2"),
        ({"intermediate_size": 12}, "intermediate"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(folder, entries, said):
    change(folder / "config.json", **entries)
    with pytest.raises((CheckpointError, ConfigError), match=said):
        vit_jax.load(folder)


def test_a_config_that_lacks_an_entry_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lack 'hidden_size'"):
        vit_jax.load(folder)


def test_without_a_preprocessor_config_the_usual_one_is_assumed_aloud(folder):
    (folder / "preprocessor_config.json").unlink()
    assert any("no preprocessor_config.json" in r for r in vit_jax.load(folder).remarks)


def test_describe_says_what_it_is(capsys):
    assert describe.main([str(TINY), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    arrays = open_checkpoint(TINY).arrays
    assert found["parameters"] == sum(int(np.prod(s)) for s in arrays.shapes.values())
    assert found["arrays"]["mapped"] == len(arrays)
    assert (found["activation"], found["epsilon"], found["classes"]) == ("gelu", 1e-12, 3)
    assert describe.main([str(TINY)]) == 0
    text = capsys.readouterr().out
    assert "resize to 32x48, bilinear" in text
    assert "GFLOPs per image of 32x48 (2 x multiply-adds" in text


def test_predict_names_the_classes(tmp_path, capsys):
    import cv2

    picture = tmp_path / "a.png"
    cv2.imwrite(str(picture), np.load(TINY.parent / "hf_vit_tiny.npz")["picture"][..., ::-1])
    assert predict.main([f"--checkpoint={TINY}", str(picture), "--format=json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    want = np.load(TINY.parent / "hf_vit_tiny.npz")["logits"][0]
    assert result["predictions"][0]["name"] == ("cat", "dog", "owl")[int(want.argmax())]
    total = sum(row["probability"] for row in result["predictions"])
    assert abs(total - 1) < 1e-5


def test_a_model_that_transformers_lacks_is_not_written(tmp_path):
    loaded = vit_jax.load(TINY)
    other = vit_jax.create("vit_ti16", 3, positions="sincos", pooling="mean")
    import dataclasses

    with pytest.raises(ConfigError):
        hf.save(dataclasses.replace(loaded, module=other), tmp_path)
    assert not list(tmp_path.iterdir())
    assert names.flat(loaded.variables)
