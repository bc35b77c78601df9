"""Law 2: every config at its published size has the exact parameter count, and `tiny` trains."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vit_jax import main
from vit_jax.build import build
from vit_jax.report import read_metrics

CONFIGS = sorted(
    p.stem for p in (Path(__file__).parent.parent / "configs").glob("*.py") if p.stem[0] != "_"
)
CONFIGS.remove("common")
DENSE = ("detr", "setr", "upernet")  # their recipes are other ones
# Parameters of the `imagenet` recipe. ViT-S/16 here has no class token (384) and fixed positions
# (197 x 384) instead of the 22,050,664 of the published table.
PUBLISHED = {
    "vit": 22_050_664 - 384 - 197 * 384,
    "hybrid": 36_431_912,
    "swin": 28_288_354,
    "cvt": 19_997_480,
}


RECIPES = {
    name: ("scenes", "tiny")
    if name in DENSE
    else ("digits", "folder", "cifar10", "imagenet", "tiny")
    for name in CONFIGS
}


def parsed(name, recipe):
    return main.parse([f"--config=configs/{name}.py:{recipe}"])[0]


def test_no_config_is_without_its_row():
    assert set(CONFIGS) == {*PUBLISHED, *DENSE}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipe_has_the_published_number_of_parameters(name):
    config = parsed(name, "imagenet")
    image = jnp.zeros((1, config["image_size"], config["image_size"], 3))
    variables = jax.eval_shape(
        lambda: build(config["model"]).init(jax.random.key(0), image, train=False)
    )
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "recipe"), [(name, recipe) for name in CONFIGS for recipe in RECIPES[name]]
)
def test_every_recipe_names_things_that_exist(name, recipe):
    config = parsed(name, recipe)
    build(config["task"])
    for part in ("train", "eval"):
        assert build(config[part]["transforms"])
    if config["train"]["mix"]:
        build(config["train"]["mix"], num_classes=10)
    build(config["model"] | {"num_classes": 10})
    module = importlib.import_module(f"configs.{name}")
    assert recipe in module.get_config.__doc__


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in DENSE)) for n in CONFIGS]
)
def test_tiny_trains_two_steps_through_main(name, tmp_path, capsys):
    workdir = tmp_path / "run"
    argv = [f"--config=configs/{name}.py:tiny", f"--workdir={workdir}"]
    assert main.main(argv) == 0, capsys.readouterr().err
    rows = read_metrics(workdir)
    assert [(r["step"], r["split"]) for r in rows] == [(2, "train"), (2, "validation")]
    assert json.loads((workdir / "config.json").read_text())["steps"] == 2
    for file in ("curves.png", "predictions.png", "log.txt"):
        assert (workdir / file).stat().st_size > 0
    assert main.main(argv) == 0
    assert "finished already" in capsys.readouterr().out
