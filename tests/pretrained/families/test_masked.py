import json
from functools import partial
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import vit_jax
from tests.golden import masked as golden
from vit_jax.build import build
from vit_jax.errors import ConfigError
from vit_jax.pretrained import hf, names
from vit_jax.pretrained.families import masked
from vit_jax.pretrained.load import open_checkpoint
from vit_jax.pretrained.opened import backbone_fields

ARRAYS = np.load(Path(__file__).parents[2] / "golden" / "masked_tiny.npz")
MODELS = ("mae", "vit", "swin", "beit")


def config_of(name):
    return json.loads(str(ARRAYS[f"{name}/config"]))


def state_of(name):
    start = f"{name}/state/"
    found = (k for k in ARRAYS.files if k.startswith(start))
    return {k.removeprefix(start): ARRAYS[k].astype(np.float32) for k in found}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model as its publisher saves it."""
    root = tmp_path_factory.mktemp("published")
    for name in MODELS:
        (root / name).mkdir()
        save_file(state_of(name), root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps(config_of(name)))
    return root


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: vit_jax.load(folders / name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", [0, 1], ids=["square", "wide"])
def test_a_published_model_restores_what_its_publisher_s_code_does(loaded, name, case):
    image, mask, wanted = (ARRAYS[f"{name}/{case}/{k}"] for k in ("image", "mask", "output"))
    if (name, case) == ("mae", 1):
        # The peer has it made for that size, and so must be ours, or it would resample.
        model = loaded[name].module
        wide = model.clone(backbone=model.backbone.clone(image_size=golden.WIDE))
        variables = regridded(loaded[name].variables, golden.grid(name, golden.WIDE))
        got = jax.jit(partial(wide.apply, train=False))(variables, image.astype(np.float32), mask)
    else:
        got = loaded[name](image=image.astype(np.float32), patch_mask=mask)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def regridded(variables, grid):
    """The same positions, row by row, on another grid of as many."""
    flat = names.flat(variables)
    shaped = {
        k: v.reshape(*grid, -1) if k.endswith("position/grid") else v for k, v in flat.items()
    }
    return names.nested(shaped)


@pytest.mark.parametrize("name", ["mae", "vit", "swin"])
def test_its_task_computes_its_publisher_s_loss(loaded, name):
    image, mask, wanted = (ARRAYS[f"{name}/0/{k}"] for k in ("image", "mask", "loss"))
    batch = {"image": image.astype(np.float32), "patch_mask": mask}
    task = build(loaded[name].recipe.task)
    loss, sums = task.score(loaded[name](**batch), batch)
    # Up to the 1e-5 that the authors of SimMIM add to the number of pixels.
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert sums["count"] == mask.sum()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_has_the_published_names_and_reads_back(loaded, folders, name, tmp_path):
    config, recipe = hf.published(loaded[name].module)
    theirs = config_of(name)
    assert config["architectures"] == theirs["architectures"]
    assert config["model_type"] == theirs["model_type"]
    written = dict(names.write(recipe.table, loaded[name].variables))
    wanted = {k.replace("decoder_encoder.layer", "decoder_layers") for k in state_of(name)}
    assert set(written) == wanted
    hf.save(loaded[name], tmp_path)
    again = vit_jax.load(tmp_path)
    assert (again.module, again.recipe.task) == (loaded[name].module, loaded[name].recipe.task)
    chex.assert_trees_all_equal(again.variables, loaded[name].variables)


def test_what_is_drawn_is_unstandardised_as_the_checkpoint_standardises(folders, tmp_path):
    for file in (folders / "mae").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"size": 24, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    task = build(open_checkpoint(tmp_path).recipe.task)
    assert (task.mean, task.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (task.loss, task.normalized) == ("l2", True)


def test_an_encoder_that_was_published_alone_is_opened_as_a_backbone():
    state = {k: v for k, v in state_of("mae").items() if k.startswith("vit.")}
    recipe = masked.from_hf(config_of("mae"), {k: v.shape for k, v in state.items()})
    assert (recipe.num_classes, recipe.backbone["target"]) == (0, "models.vit.ViT")


def test_predict_asks_with_the_published_share_of_hidden_patches(loaded):
    steps = {name: build(loaded[name].recipe.beside)[0] for name in MODELS}
    image = {"image": np.zeros((24, 24, 3), np.float32)}
    hidden = {k: s(image, np.random.default_rng(0))["patch_mask"] for k, s in steps.items()}
    shapes = {name: mask.shape for name, mask in hidden.items()}
    assert shapes == {"mae": (6, 6), "vit": (6, 6), "swin": (12, 12), "beit": (6, 6)}
    assert {name: int(mask.sum()) for name, mask in hidden.items()} == {
        "mae": 27,  # 0.75 of 36
        "vit": 22,  # 0.6, rounded up
        "swin": 87,
        "beit": 15,
    }


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("vit", {"encoder_stride": 8}, "encoder_stride=8"),
        ("swin", {"encoder_stride": 2}, "encoder_stride=2"),
        ("beit", {"use_mean_pooling": False}, "use_mean_pooling=False"),
        ("beit", {"use_relative_position_bias": True}, "use_relative_position_bias=True"),
        ("mae", {"hidden_act": "gelo"}, "hidden_act='gelo'"),
    ],
)
def test_a_config_that_no_model_here_can_be_is_refused(name, entries, said):
    with pytest.raises(ConfigError, match=said):
        masked.from_hf(config_of(name) | entries, {})


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("mae", {"positions": "sincos"}, "keeps its positions in the file"),
        ("swin", {"backbone": {"norm_map": False}}, "norm_map=False"),
        ("beit", {"backbone": {"shared_positions": False}}, "shares its positions"),
        ("mae", {"backbone": {"target": "models.cvt.CvT"}}, "no models.masked.MAE on models.cvt"),
    ],
)
def test_a_model_that_transformers_has_not_is_not_written(loaded, name, fields, said):
    module = loaded[name].module
    spec = backbone_fields(module) | {"backbone": backbone_fields(module.backbone)}
    spec |= fields | {"backbone": spec["backbone"] | fields.get("backbone", {})}
    with pytest.raises(ConfigError, match=said):
        masked.to_hf(spec, 0)
