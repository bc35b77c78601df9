"""Law 2: every config at its published size has the exact parameter count, and `tiny` trains."""

import importlib
import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vit_jax import main, optim, step
from vit_jax.build import build
from vit_jax.report import read_metrics

CONFIGS = sorted(
    p.stem for p in (Path(__file__).parent.parent / "configs").glob("*.py") if p.stem[0] != "_"
)
CONFIGS.remove("common")
DENSE = ("detr", "setr", "upernet")
# Half a minute each: much to compile. What README's commands train in the slow suite is a long one.
MARKS = dict.fromkeys(("hybrid", "clip", "captioner", "masked"), pytest.mark.slow) | dict.fromkeys(
    ("swin", "cvt", *DENSE), pytest.mark.long
)
# Recipe and parameters. ViT-S/16 here has no class token (384) and fixed positions (197 x 384)
# instead of the 22,050,664 of the published table. DETR's authors count 41,302,368, without the
# 222,400 of the root and the first stage, which do not learn. SETR: 24 blocks, the patches, the
# positions, a norm, the published 5,268,630 of neck and decoder, and the auxiliary heads.
PUBLISHED = {
    "vit": ("imagenet", 22_050_664 - 384 - 197 * 384),
    "hybrid": ("imagenet", 36_431_912),
    "swin": ("imagenet", 28_288_354),
    "cvt": ("imagenet", 19_997_480),
    "detr": ("coco", 41_302_368 + 222_400),
    "setr": (
        "ade20k",
        24 * 12_596_224 + 787_456 + 1024 * 1024 + 2048 + 5_268_630 + 4 * (256 * 150 + 150),
    ),
    "upernet": ("ade20k", 59_943_398),
    # Its authors count their fixed positions too.
    "masked": ("imagenet", 111_907_840 - 197 * (768 + 512)),
    "clip": ("imagetext", 151_277_313),
    # ViT-B/16; its map brought to 512; 8,000 words and 31 places; 6 blocks, of two attentions, an
    # MLP and three norms; a norm; the words' logits.
    "captioner": (
        "coco",
        85_798_656
        + 768 * 512
        + 512
        + 8031 * 512
        + 6 * (8 * (512 * 512 + 512) + 8 * 512 * 512 + 5 * 512 + 6 * 512)
        + 1024
        + 512 * 8000
        + 8000,
    ),
}


RECIPES = dict.fromkeys(CONFIGS, ("digits", "folder", "cifar10", "imagenet", "tiny"))
RECIPES["detr"] = ("scenes", "folder", "bccd", "coco", "tiny")
RECIPES["clip"] = ("scenes", "folder", "shards", "coco", "imagetext", "tiny")
RECIPES["masked"] = (
    *("digits", "simmim", "colours", "cifar10", "folder", "tiny"),
    *("imagenet", "imagenet_l", "imagenet_h", "imagenet_simmim", "imagenet_colours"),
)
RECIPES["captioner"] = ("scenes", "folder", "coco", "tiny")
RECIPES["setr"] = RECIPES["upernet"] = ("scenes", "folder", "camvid", "ade20k", "tiny")


def parsed(name, recipe):
    return main.parse([f"--config=configs/{name}.py:{recipe}"])[0]


def test_no_config_is_without_its_row():
    assert set(CONFIGS) == set(PUBLISHED)


@cache
def shapes_of(name):
    """The published recipe's parameters."""
    config = parsed(name, PUBLISHED[name][0])
    size = 64 if name == "detr" else config["image_size"]  # whose parameters know no size
    batch = {
        "image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        "tokens": jax.ShapeDtypeStruct((1, config["data"]["length"]), jnp.int32),
    }
    model = config["model"]
    if model.get("vocabulary") == 0:  # of a tokenizer that is trained on the data
        model |= {"vocabulary": config["data"]["vocabulary"], "start": 1, "end": 2, "padding": 0}
    init = partial(step.init_variables, model=build(model))
    return jax.eval_shape(init, jax.random.key(0), batch)["params"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipe_has_the_published_number_of_parameters(name):
    assert sum(x.size for x in jax.tree.leaves(shapes_of(name))) == PUBLISHED[name][1]


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
    classes = {"num_classes": 10} if "num_classes" in config["model"] else {}
    model = build(config["model"] | classes)
    if "inference" in config["eval"]:
        build(config["eval"]["inference"], model=model)
    module = importlib.import_module(f"configs.{name}")
    assert recipe in module.get_config.__doc__


def test_the_recipe_of_the_published_detr_trains_what_its_authors_count():
    params = shapes_of("detr")
    spec = parsed("detr", "coco")["optimizer"]
    optimizer = optim.make(spec, params=params, schedule=lambda _: 1e-4)
    state = jax.eval_shape(optimizer.init, params)
    # Two moments of each parameter that learns, and counters.
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * 41_302_368


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, ())) for n in CONFIGS])
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
