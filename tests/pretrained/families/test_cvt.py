from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.build import build
from vit_jax.errors import ConfigError
from vit_jax.models.classifier import Classifier
from vit_jax.models.cvt import CvT
from vit_jax.pretrained import names
from vit_jax.pretrained.families import cvt
from vit_jax.pretrained.opened import backbone_fields

TINY = CvT(widths=(4, 8, 12), depths=(1, 1, 2), heads=(1, 2, 3))


def random_variables(model):
    pixels = jax.ShapeDtypeStruct((1, 32, 40, 3), jnp.float32)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), pixels)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), dict(shapes))


@pytest.fixture(scope="module")
def variables():
    return random_variables(Classifier(TINY, 5))


@pytest.mark.parametrize("table", [cvt.HF, cvt.MICROSOFT], ids=["HF", "MICROSOFT"])
def test_what_is_written_is_read_back(variables, table):
    again = names.read(table, variables, dict(names.write(table, variables)))
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_names_are_those_of_transformers(variables):
    state = dict(names.write(cvt.HF, variables))
    assert state["layernorm.weight"].shape == (12,)  # outside the prefix there
    assert state["classifier.bias"].shape == (5,)
    block = "cvt.encoder.stages.1.layers.0."
    conv = "attention.attention.convolution_projection_key.convolution_projection."
    assert state[block + conv + "convolution.weight"].shape == (8, 1, 3, 3)
    assert state[block + conv + "normalization.running_var"].shape == (8,)
    assert state[block + "intermediate.dense.weight"].shape == (32, 8)
    assert state["cvt.encoder.stages.2.cls_token"].shape == (1, 1, 12)


def test_names_are_those_of_microsoft(variables):
    state = dict(names.write(cvt.MICROSOFT, variables))
    assert state["stage0.patch_embed.proj.weight"].shape == (4, 3, 7, 7)
    assert state["stage2.cls_token"].shape == (1, 1, 12)
    block = variables["params"]["backbone"]["stage_3"]["block_1"]
    for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
        weight = state[f"stage2.blocks.1.attn.proj_{letter}.weight"]
        np.testing.assert_array_equal(weight, block["attention"][part]["kernel"].T)
        assert state[f"stage2.blocks.1.attn.conv_proj_{letter}.conv.weight"].shape == (12, 1, 3, 3)
        assert state[f"stage2.blocks.1.attn.conv_proj_{letter}.bn.running_mean"].shape == (12,)
    assert state["norm.weight"].shape == (12,)
    assert state["head.weight"].shape == (5, 12)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("CvT-13-224x224-IN-1k.pth", {"size": (224, 224), "crop": 0.875}),
        ("CvT-13-384x384-IN-22k.pth", {"size": (384, 384)}),
    ],
)
def test_a_state_dict_is_recognised_by_its_shapes(name, first):
    model = CvT(widths=(64, 64, 128), depths=(1, 1, 2), heads=(1, 1, 2))
    shapes = jax.eval_shape(
        partial(Classifier(model, 5).init, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 32, 40, 3), jnp.float32),
    )
    empty = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), dict(shapes))
    state = {k: v.shape for k, v in names.write(cvt.MICROSOFT, empty)}
    recipe = cvt.from_state(state, name)
    assert (recipe.origin, recipe.num_classes) == ("Microsoft", 5)
    assert build(recipe.backbone) == model
    assert model.activation == "quick_gelu"  # as the authors trained
    resize = recipe.preprocessing[0]
    assert {k: v for k, v in resize.items() if k != "target"} == first | {
        "interpolation": "bicubic"
    }
    assert "64 channels each" in recipe.remarks[0]


def test_other_state_dicts_are_left_to_others(variables):
    assert cvt.from_state({"patch_embed.proj.weight": (8, 3, 4, 4)}, "vit") is None
    state = {k: v.shape for k, v in names.write(cvt.MICROSOFT, variables)}
    with pytest.raises(ConfigError, match=r"widths \(4, 8, 12\) are of no published CvT"):
        cvt.from_state(state, "x")


def test_a_config_goes_there_and_back():
    model = TINY.clone(activation="gelu", drop_path=0.1, mlp_ratio=2.0, paddings=(3, 1, 1))
    config = cvt.to_hf(backbone_fields(model), 5)
    recipe = cvt.from_hf(config, {})
    assert (build(recipe.backbone), recipe.num_classes) == (model, 5)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"cls_token": [False, True, True]}, "cls_token="),
        ({"qkv_projection_method": ["avg"] * 3}, "qkv_projection_method="),
        ({"stride_kv": [2, 2, 1]}, r"stride_kv=\[2, 2, 1\]: CvT here has one for all stages"),
        ({"qkv_bias": [False] * 3}, "qkv_bias="),
    ],
)
def test_settings_that_are_not_here_are_refused(setting, said):
    config = cvt.to_hf(backbone_fields(TINY.clone(activation="gelu")), 5) | setting
    with pytest.raises(ConfigError, match=said):
        cvt.from_hf(config, {})


@pytest.mark.parametrize(
    ("fields", "classes", "said"),
    [
        ({"activation": "gelu", "embed_depths": (2, 1, 1)}, 5, r"embed_depths=\(2, 1, 1\)"),
        ({}, 5, "activation='quick_gelu': transformers' CvT always has 'gelu'"),
        ({"activation": "gelu", "epsilon": 1e-6}, 5, "epsilon=1e-06"),
        ({"activation": "gelu"}, 0, "no head, no norm"),
    ],
)
def test_a_model_that_transformers_lacks_is_refused(fields, classes, said):
    with pytest.raises(ConfigError, match=said):
        cvt.to_hf(backbone_fields(TINY.clone(**fields)), classes)
