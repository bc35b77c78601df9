"""Detectors and segmenters: opened, written, and opened again; and started from."""

import functools
import json
from functools import partial

import chex
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax import describe, export, main
from vit_jax.build import build
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.pretrained import finetune, hf, names
from vit_jax.pretrained.arrays import Arrays
from vit_jax.pretrained.load import Loaded
from vit_jax.pretrained.opened import Opened
from vit_jax.pretrained.preprocess import IMAGENET, Preprocessing, short_side, standardize, step
from vit_jax.pretrained.recipe import Recipe

LABELS = ("red cell", "white cell", "platelet")
RESNET = {
    "target": "models.resnet.ResNet",
    "depths": (1, 1, 1, 1),
    "width": 2,
    "norm": "frozen",
}
DETR = {
    "target": "models.detr.DETR",
    "num_classes": 3,
    "queries": 4,
    "width": 16,
    "heads": 2,
    "hidden": 8,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "backbone": RESNET,
}
PANOPTIC = DETR | {"target": "models.panoptic.DETRPanoptic", "heads": 8}
TIMM = RESNET | {"depths": (2, 2, 2, 2), "block": "basic", "width": 64, "dilation": 2}
UPERNET = {
    "target": "models.upernet.UPerNet",
    "num_classes": 3,
    "features": 4,
    "auxiliary_features": 3,
    "backbone": {
        "target": "models.swin.Swin",
        "width": 4,
        "depths": (1, 1, 1, 1),
        "heads": (1, 1, 2, 2),
        "window": 3,
        "always_shift": True,
    },
}
SHORT = (short_side(40, 60), standardize(*IMAGENET))
SQUARE = (step("Resize", size=(48, 48), interpolation="bilinear"), standardize(*IMAGENET))
TASKS = {
    "models.detr.DETR": "tasks.detection.Detection",
    "models.panoptic.DETRPanoptic": "tasks.panoptic.Panoptic",
    "models.upernet.UPerNet": "tasks.segmentation.Segmentation",
}


@functools.cache
def shapes_of(module):
    image = jax.ShapeDtypeStruct((1, 40, 48, 3), jnp.float32)
    return jax.eval_shape(partial(module.init, train=False), jax.random.key(0), image)


def drawn(module, seed=0):
    """Variables of a module, every number drawn."""
    random = np.random.default_rng(seed)

    def value(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 4
        return jnp.asarray(random.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map_with_path(value, shapes_of(module))


@functools.cache
def model_of(case):
    spec, steps, _ = CASES[case]
    return loaded_of(spec, steps)


def loaded_of(spec, steps):
    module = build(spec)
    task = {"target": TASKS[spec["target"]]}
    recipe = Recipe("ours", dict(spec["backbone"]), names.Ours(), 3, task=task)
    return Loaded(module, drawn(module), Preprocessing(steps), LABELS, "a test", recipe)


CASES = {
    "DETR": (DETR, SHORT, "DetrForObjectDetection"),
    "DETR-DC5": (DETR | {"backbone": TIMM}, SHORT, "DetrForObjectDetection"),
    "panoptic": (PANOPTIC, SHORT, "DetrForSegmentation"),
    "UPerNet": (UPERNET, SQUARE, "UperNetForSemanticSegmentation"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_whole_model_is_written_and_opens_again_unchanged(case, tmp_path):
    spec, _, architecture = CASES[case]
    loaded = model_of(case)
    hf.save(loaded, tmp_path)
    again = vit_jax.load(tmp_path)
    assert again.module == loaded.module
    chex.assert_trees_all_equal(again.variables, loaded.variables)
    assert again.preprocess == loaded.preprocess
    assert again.labels == LABELS
    assert again.recipe.task["target"] == TASKS[spec["target"]]
    assert architecture in again.source
    if spec["target"] != "models.upernet.UPerNet":
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["use_timm_backbone"] == (case == "DETR-DC5")  # timm has no narrow ones
        assert written["backbone"] == ("resnet18" if case == "DETR-DC5" else None)


def test_dense_layers_are_written_as_the_convolutions_they_are_there(tmp_path):
    from safetensors import safe_open

    wanted = {
        "DETR": {"model.input_projection.weight": (16, 64, 1, 1)},
        "UPerNet": {
            "decode_head.classifier.weight": (3, 4, 1, 1),
            "decode_head.lateral_convs.0.conv.weight": (4, 4, 1, 1),
            "decode_head.fpn_convs.0.conv.weight": (4, 4, 3, 3),
        },
    }
    for case, shapes in wanted.items():
        (folder := tmp_path / case).mkdir()
        hf.save(model_of(case), folder)
        with safe_open(folder / "model.safetensors", "numpy") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in shapes} == shapes


def test_batch_norms_of_a_trained_detector_are_written_and_come_back_frozen(tmp_path):
    loaded = loaded_of(DETR | {"backbone": RESNET | {"norm": "batch"}}, SHORT)
    hf.save(loaded, tmp_path)
    again = vit_jax.load(tmp_path)
    assert again.module.backbone.norm == "frozen"
    here, there = (v["backbone"]["root_norm"]["scale"] for v in (
        loaded.variables["params"], again.variables["batch_stats"]
    ))  # fmt: skip
    np.testing.assert_array_equal(here, there)


def test_what_transformers_has_not_is_refused_with_the_reason(tmp_path):
    swin = DETR | {"backbone": UPERNET["backbone"]}
    dilated = DETR | {"backbone": RESNET | {"dilation": 2}}
    plain = UPERNET | {"backbone": RESNET}
    for spec, said in (
        (swin, "stands on a ResNet here, not on models.swin.Swin"),
        (dilated, "dilation=2"),
        (plain, "on a Swin of 4 stages only"),
        (DETR | {"target": "models.setr.SETR"}, "transformers has no models.setr.SETR"),
    ):
        if "SETR" in spec["target"]:
            spec = {"target": spec["target"], "num_classes": 3, "backbone": RESNET}
        with pytest.raises(ConfigError, match=said):
            hf.published(build(spec))


def test_a_detector_is_no_program_yet(tmp_path):
    loaded = model_of("DETR")
    with pytest.raises(ConfigError, match=r"a models.detr.DETR: only a classifier"):
        export.export(loaded, "stablehlo", tmp_path / "out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published detector."""
    place = tmp_path_factory.mktemp("detr")
    hf.save(model_of("DETR"), place)
    return place


def test_a_detector_gives_logits_and_boxes_whatever_is_beside_it(folder):
    loaded = vit_jax.load(folder)
    assert loaded.reads == {"image", "image_mask"}
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (*s, 3), np.uint8) for s in ((30, 41), (50, 33), (40, 40))]
    batch = loaded.preprocess.batch(pictures[:2])
    assert batch["image"].shape == (2, 60, 54, 3)  # the short side 40, the long one at most 60
    out = loaded(**batch)
    assert {k: v.shape for k, v in out.items()} == {"logits": (2, 4, 4), "boxes": (2, 4, 4)}
    batch["image"][1] = random.normal(size=(60, 54, 3)) * batch["image_mask"][1, ..., None]
    other = loaded(**batch)
    chex.assert_trees_all_equal(*({k: v[0] for k, v in o.items()} for o in (out, other)))


def test_a_detector_is_described_with_what_stands_on_the_backbone(folder):
    found = describe.describe(folder)
    assert found["architecture"] == "models.resnet.ResNet"
    assert found["model"]["target"] == "models.detr.DETR"
    assert found["model"]["queries"] == 4
    assert found["classes"] == 3
    assert found["image_size"] == [64, 64]  # 40 x 53, in steps of 64
    told = dict(describe.sentences(found))
    assert told["architecture"].startswith("models.detr.DETR(queries=4, width=16")
    assert told["backbone"].startswith("models.resnet.ResNet(depths=[1, 1, 1, 1]")
    assert "short side to 40, the long one to at most 60" in told["preprocessing"]
    assert vit_jax.load(folder).preprocess.size is None


def checkpoint(spec, classifier=None):
    """An opened checkpoint of our own with drawn numbers, and those."""
    spec = dict(spec)
    backbone, classes = spec.pop("backbone", None), spec.pop("num_classes", 0)
    recipe = Recipe("ours", backbone or spec, names.Ours(), classes)
    if backbone:
        recipe = Recipe("ours", backbone, names.Ours(), classes, classifier=spec)
    empty = Opened("theirs", "a test", recipe, Arrays({}, {}, None), Preprocessing(SQUARE))
    variables = drawn(empty.module(), seed=1)
    flat = {k: np.asarray(v) for k, v in names.flat(variables).items()}
    arrays = Arrays({k: v.shape for k, v in flat.items()}, {}, flat.__getitem__)
    return Opened("theirs", "a test", recipe, arrays, empty.preprocessing), variables


def start(source, spec):
    module = build(spec)
    own = drawn(module)
    warm = finetune.warm_start(source, module, own)
    return warm.remarks, own, warm.fill(own)


def test_a_detector_starts_from_a_detector_but_for_the_classes():
    source, there = checkpoint(DETR | {"num_classes": 7})
    told, own, filled = start(source, DETR)
    assert any("class_head starts anew: [16, 4] here, [16, 8] there" in r for r in told)
    chex.assert_trees_all_equal(filled["params"]["class_head"], own["params"]["class_head"])
    chex.assert_trees_all_equal(filled["params"]["query"], there["params"]["query"])
    chex.assert_trees_all_equal(filled["batch_stats"], there["batch_stats"])  # frozen norms


CLASSIFIER = {"target": "models.classifier.Classifier", "num_classes": 5}


@pytest.mark.parametrize("whole", [{}, CLASSIFIER], ids=["a backbone", "a classifier"])
def test_a_detector_starts_from_a_backbone_that_learned_its_norms(whole):
    learned = RESNET | {"norm": "batch"}
    source, there = checkpoint(whole | {"backbone": learned} if whole else learned)
    told, own, filled = start(source, DETR)
    there = {k: v["backbone"] if whole else v for k, v in there.items()}
    norm = filled["batch_stats"]["backbone"]["stage_2"]["block_0"]["norm2"]
    given = there["params"]["stage_2"]["block_0"]["norm2"]
    given = given | there["batch_stats"]["stage_2"]["block_0"]["norm2"]
    chex.assert_trees_all_equal(norm, given)
    for kind in ("root_conv", "stage_4"):
        ours, theirs = (
            {k: v for k, v in names.flat(tree["params"]).items() if kind in k and "kernel" in k}
            for tree in (filled, there)
        )
        chex.assert_trees_all_equal(list(ours.values()), list(theirs.values()))
    chex.assert_trees_all_equal(filled["params"]["encoder_0"], own["params"]["encoder_0"])
    assert "scales and biases of norms are frozen here, learned in the checkpoint" in told
    anew = "box_head, class_head, decoder_0, decoder_norm, encoder_0, input_proj, query"
    assert f"not in the checkpoint, so they start anew: {anew}" in told
    assert ("left out of the checkpoint: head" in told) == bool(whole)


def test_frozen_norms_may_learn_again():
    source, there = checkpoint(DETR)
    told, _, filled = start(source, DETR | {"backbone": RESNET | {"norm": "batch"}})
    scale = filled["params"]["backbone"]["root_norm"]["scale"]
    np.testing.assert_array_equal(scale, there["batch_stats"]["backbone"]["root_norm"]["scale"])
    assert "scales and biases of norms are learned here, frozen in the checkpoint" in told


def test_a_backbone_of_another_depth_is_refused():
    source, _ = checkpoint(RESNET)
    with pytest.raises(CheckpointError, match=r"stage_2/block_1/.*absent"):
        start(source, DETR | {"backbone": RESNET | {"depths": (1, 2, 1, 1)}})


def test_a_config_takes_the_whole_model_and_the_task_of_its_checkpoint(folder):
    config = {
        "init": str(folder),
        "image_size": 48,
        "model": {
            "target": "init.model",
            "num_classes": 0,
            "queries": 6,
            "backbone": {"norm": "batch", "remat": True},
        },
        "task": {"target": "init.task", "detections": 5},
        "eval": {"transforms": [{"target": "init.standardize"}]},
    }
    finetune.resolve(config)
    assert config["model"]["target"] == "models.detr.DETR"
    assert (config["model"]["queries"], config["model"]["width"]) == (6, 16)
    assert config["model"]["num_classes"] == 0
    assert config["model"]["backbone"]["norm"] == "batch"
    assert config["model"]["backbone"]["depths"] == [1, 1, 1, 1]
    assert config["task"] == {"target": "tasks.detection.Detection", "detections": 5}
    assert config["eval"]["transforms"][0]["target"] == "data.transforms.Standardize"
    build(config["model"] | {"num_classes": 2})


WANTED = {"detr": ("DETR", "UPerNet"), "upernet": ("UPerNet", "DETR")}


@pytest.mark.parametrize("name", WANTED)
def test_a_recipe_takes_a_model_of_its_own_task_only(name, tmp_path, monkeypatch):
    config = main.parse([f"--config=configs/{name}.py:finetune", "--config.init=hf:a/b"])[0]
    task = config["task"]["target"]
    monkeypatch.setattr(hf, "download", lambda *_: tmp_path)
    case, other = WANTED[name]
    hf.save(model_of(other), tmp_path)
    with pytest.raises(ConfigError, match=f"config.task is {task}: a checkpoint of that task"):
        finetune.resolve(config)
    hf.save(model_of(case), tmp_path)
    finetune.resolve(config)
    assert (config["model"]["target"], config["model"]["num_classes"]) == (
        CASES[case][0]["target"],
        0,
    )
    assert all(build(config[part]["transforms"]) for part in ("train", "eval"))
    build(config["model"] | {"num_classes": 2})


def test_a_panoptic_detector_is_a_detector(tmp_path, monkeypatch):
    config = main.parse(["--config=configs/detr.py:finetune", "--config.init=hf:a/b"])[0]
    monkeypatch.setattr(hf, "download", lambda *_: tmp_path)
    hf.save(model_of("panoptic"), tmp_path)
    finetune.resolve(config)
    assert config["model"]["target"] == "models.panoptic.DETRPanoptic"


@pytest.mark.slow  # half a minute: published sizes of pictures; README's commands do the detector
def test_a_segmenter_goes_on_with_pictures_of_ones_own(tmp_path, monkeypatch, capsys):
    published, data, workdir = tmp_path / "published", tmp_path / "data", tmp_path / "run"
    published.mkdir()
    hf.save(model_of("UPerNet"), published)
    masked_pictures(data)
    monkeypatch.setattr(hf, "download", lambda *_: published)
    line = ["--config=configs/upernet.py:finetune", "--config.init=hf:a/published"]
    line += [f"--config.data.data_dir={data}", f"--workdir={workdir}"]
    line += ["--config.steps=1", "--config.batch_size=2", "--config.eval_every=1"]
    assert main.main(line) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "miou " in told
    assert "starts anew: [" in told
    assert vit_jax.load(workdir).labels == LABELS[:2]


def masked_pictures(folder):
    """Ten pictures of different sizes, with masks."""
    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(LABELS[:2]))
    for i in range(10):
        height, width = 40 + i, 60 - 3 * i
        mask = np.zeros((height, width), np.uint8)
        mask[6:20, 5:15] = 1
        cv2.imwrite(
            str(folder / "images" / f"{i}.png"), random.integers(0, 256, (*mask.shape, 3), np.uint8)
        )
        cv2.imwrite(str(folder / "masks" / f"{i}.png"), mask)


def test_a_backbone_alone_is_no_model_to_take(tmp_path):
    source, _ = checkpoint(RESNET)
    with pytest.raises(ConfigError, match="a backbone alone"):
        finetune._model(source, {})
