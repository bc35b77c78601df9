"""Pictures restored, from the config to what starts from it: runs of two steps."""

import json

import numpy as np
import pytest
from PIL import Image

from vit_jax import evaluate, main, predict
from vit_jax.build import build
from vit_jax.checkpoint import read
from vit_jax.pretrained import names
from vit_jax.pretrained.load import open_checkpoint
from vit_jax.report import read_metrics

TINY = "--config=configs/masked.py:tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "mae"
    assert main.main([TINY, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("a", "b", "c"):
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def spec_of(config, recipe):
    return main.parse([f"--config=configs/{config}.py:{recipe}"])[0]["model"]["backbone"]


@pytest.mark.parametrize("recipe", ["digits", "cifar10", "folder"])
def test_a_recipe_s_encoder_is_the_one_that_configs_vit_starts_with(recipe):
    assert build(spec_of("masked", recipe)) == build(spec_of("vit", recipe))


def test_the_encoders_of_the_other_ways_are_those_of_configs_vit_and_swin():
    assert build(spec_of("masked", "colours")) == build(spec_of("vit", "digits"))
    swin = build(spec_of("swin", "digits")).clone(norm_map=True)
    assert build(spec_of("masked", "simmim")) == swin


def ratios_of(config):
    steps = (s for part in ("train", "eval") for s in config[part]["transforms"])
    return [s["ratio"] for s in steps if "ratio" in s] + [config["model"].get("ratio")]


def test_one_ratio_is_that_of_training_of_evaluation_and_of_the_model():
    for place, steps in (("model", ""), ("train.transforms[3]", ""), ("eval.transforms[2]", "")):
        config = main.parse([TINY, f"--config.{place}{steps}.ratio=0.5"])[0]
        assert ratios_of(config) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("ratio", ["0.0", "1.0"])
def test_a_ratio_of_nothing_or_all_ends_the_command_with_one_sentence(ratio, tmp_path, capsys):
    workdir = tmp_path / "run"
    status = main.main([TINY, f"--workdir={workdir}", f"--config.model.ratio={ratio}"])
    said = capsys.readouterr().err
    assert status == 2
    assert f"a mask ratio of {ratio} hides" in said
    assert said.count("\n") == 1
    assert not workdir.exists()


def test_a_run_draws_what_it_restores_and_says_one_number(run):
    rows = {row["split"]: row for row in read_metrics(run)}
    assert set(rows) == {"train", "validation"}
    assert "accuracy" not in rows["validation"]
    with Image.open(run / "predictions.png") as drawn:
        assert drawn.width > 1000  # three of three pictures each
    assert (run / "curves.png").stat().st_size > 0


def test_evaluation_gives_the_same_number_again(run):
    config = json.loads((run / "config.json").read_text())
    found = evaluate.evaluate(config, run)
    rows = {row["split"]: row for row in read_metrics(run)}
    wanted = rows["validation"]["loss"]
    assert next(iter(found.values()))["loss"] == pytest.approx(wanted, rel=1e-5)


def test_predict_hides_the_same_patches_of_a_picture_whatever_is_beside_it(run, pictures, tmp_path):
    command = [f"--checkpoint={run}", "--format=json"]
    for name, places in (("all", [str(pictures)]), ("one", [str(pictures / "b.png")])):
        drawn, file = tmp_path / name, tmp_path / f"{name}.json"
        assert predict.main([*command, *places, f"--draw={drawn}", f"--output={file}"]) == 0
    whole, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("all", "one"))
    (wanted,) = [row for row in whole if row["image"].endswith("b.png")]
    assert alone[0]["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert alone[0]["share"] == 0.625  # 10 of 16
    images = [np.asarray(Image.open(tmp_path / n / "b.png")) for n in ("all", "one")]
    np.testing.assert_array_equal(*images)
    assert images[0].shape == (96, 3 * 96 + 2 * 4, 3)
    other = np.asarray(Image.open(tmp_path / "all" / "a.png"))
    hidden = [(image[:, 100:196] == 128).all(-1) for image in (images[0], other)]
    assert (hidden[0] != hidden[1]).any()


def started(config, workdir, run, *more):
    """What a run of no learning, to speak of, has after two steps from `run`."""
    argv = [f"--config=configs/{config}", f"--workdir={workdir}", f"--config.init={run}", *more]
    still = ["--config.learning_rate=1e-12", "--config.steps=2", "--config.batch_size=8"]
    still += ["--config.schedule.warmup_epochs=0.0", "--config.optimizer.weight_decay=0.0"]
    still += ["--config.eval_every=2", "--config.data.options.share=0.02"]
    assert main.main([*argv, *still]) == 0
    return names.flat(read(workdir).params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("vit.py:finetune", ("--config.data.name=digits", "--config.image_size=16")),
        ("vit.py:probe", ("--config.data.name=digits", "--config.image_size=16")),
        ("vit.py:tiny", ()),
    ],
)
def test_what_was_learned_is_where_other_recipes_start(run, tmp_path, config, more):
    learned = names.flat(read(run).params)
    found = started(config, tmp_path / "run", run, *more)
    backbone = {k: v for k, v in learned.items() if k.startswith("backbone/")}
    assert set(backbone) == {k for k in found if k.startswith("backbone/")}
    for path, array in backbone.items():
        np.testing.assert_allclose(found[path], array, rtol=0, atol=1e-6)
    assert {k.partition("/")[0] for k in found} == {"backbone", "head"}
    steps = json.loads((tmp_path / "run" / "config.json").read_text())["eval"]["transforms"]
    assert not [s for s in steps if s["target"].startswith("data.patches")]


def test_a_run_s_preprocessing_is_that_of_its_pictures_alone(run):
    opened = open_checkpoint(run)
    targets = [s["target"].rpartition(".")[2] for s in opened.preprocessing.steps]
    assert targets == ["Resize", "Resize", "Standardize"]
    assert [s["target"] for s in opened.recipe.beside] == ["data.patches.HidePatches"]
