from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.build import build
from vit_jax.errors import ConfigError
from vit_jax.models.classifier import Classifier
from vit_jax.models.swin import Swin
from vit_jax.pretrained import names
from vit_jax.pretrained.families import swin
from vit_jax.pretrained.opened import backbone_fields

TINY = Swin(width=4, depths=(2, 1), heads=(1, 2), window=3, patch=2)


def random_variables(model, seed=0):
    pixels = jax.ShapeDtypeStruct((1, 16, 24, 3), jnp.float32)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), pixels)
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), dict(shapes))


@pytest.fixture(scope="module")
def variables():
    return random_variables(Classifier(TINY, 5))


def shapes_of(state):
    return {name: array.shape for name, array in state.items()}


@pytest.mark.parametrize("table", [swin.HF, swin.TIMM, swin.MICROSOFT], ids=["HF", "TIMM", "MS"])
def test_what_is_written_is_read_back(variables, table):
    state = dict(names.write(table, variables))
    again = names.read(table, variables, state)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_new_names_of_transformers_are_read_and_old_ones_written(variables):
    state = dict(names.write(swin.HF, variables))
    block = "swin.encoder.layers.0.blocks.1."
    assert state["classifier.weight"].shape == (5, 8)
    assert state["swin.layernorm.weight"].shape == (8,)
    assert state["swin.encoder.layers.0.downsample.reduction.weight"].shape == (8, 16)
    assert state[block + "attention.self.relative_position_bias_table"].shape == (25, 1)
    renamed = (
        ("attention.self.query", "attention.q_proj"),
        ("attention.self.key", "attention.k_proj"),
        ("attention.self.value", "attention.v_proj"),
        ("attention.self.rel", "attention.relative_position_bias.rel"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    )
    new = {}
    for name, array in state.items():
        for old, later in renamed:
            name = name.replace(old, later)
        new[name] = array
    assert {block + "mlp.fc1.weight", block + "attention.q_proj.bias"} <= set(new)
    new[block + "attention.relative_position_bias.relative_position_index"] = np.zeros((9, 9))
    jax.tree.map(np.testing.assert_array_equal, names.read(swin.HF, variables, new), variables)


def test_timm_merges_at_the_start_of_a_stage_and_microsoft_at_the_end(variables):
    timm, microsoft = (dict(names.write(t, variables)) for t in (swin.TIMM, swin.MICROSOFT))
    merging = variables["params"]["backbone"]["stage_2"]["merge"]["reduction"]["kernel"]
    np.testing.assert_array_equal(timm["layers.1.downsample.reduction.weight"], merging.T)
    np.testing.assert_array_equal(microsoft["layers.0.downsample.reduction.weight"], merging.T)
    assert timm["head.fc.bias"].shape == microsoft["head.bias"].shape == (5,)


def test_query_key_and_value_lie_in_one_array_in_this_order(variables):
    state = dict(names.write(swin.TIMM, variables))
    attention = variables["params"]["backbone"]["stage_1"]["block_1"]["attention"]
    for i, part in enumerate(("query", "key", "value")):
        rows = slice(4 * i, 4 * i + 4)
        weight, bias = (state[f"layers.0.blocks.1.attn.qkv.{leaf}"] for leaf in ("weight", "bias"))
        np.testing.assert_array_equal(weight[rows], attention[part]["kernel"].T)
        np.testing.assert_array_equal(bias[rows], attention[part]["bias"])


@pytest.mark.parametrize("origin", ["timm", "Microsoft"])
@pytest.mark.parametrize("head", [True, False])
def test_a_state_dict_is_recognised_by_its_shapes(variables, origin, head):
    table = swin.TIMM if origin == "timm" else swin.MICROSOFT
    mine = variables if head else random_variables(TINY)
    recipe = swin.from_state(shapes_of(dict(names.write(table, mine))), "model.pth")
    assert (recipe.origin, recipe.num_classes) == (origin, 5 * head)
    assert recipe.table is table
    assert build(recipe.backbone) == TINY


@pytest.mark.parametrize(
    ("origin", "window", "steps"),
    [
        ("timm", 7, {"size": (224, 224), "crop": 0.9}),
        ("timm", 12, {"size": (384, 384), "crop": 1.0}),
        ("Microsoft", 7, {"size": (224, 224), "crop": 0.875}),
        ("Microsoft", 12, {"size": (384, 384)}),
    ],
)
def test_the_usual_preprocessing_is_the_publishers(origin, window, steps):
    table = swin.TIMM if origin == "timm" else swin.MICROSOFT
    model = Swin(width=1, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), window=window)
    state = dict(names.write(table, random_variables(model)))
    first = swin.from_state(shapes_of(state), "x").preprocessing[0]
    assert {k: v for k, v in first.items() if k != "target"} == steps | {"interpolation": "bicubic"}


def test_other_state_dicts_are_left_to_others_and_several_windows_are_refused(variables):
    shapes = shapes_of(dict(names.write(swin.TIMM, variables)))
    assert swin.from_state({"patch_embed.proj.weight": (8, 3, 4, 4)}, "vit") is None
    shapes["layers.1.blocks.0.attn.relative_position_bias_table"] = (9, 2)
    with pytest.raises(ConfigError, match="windows of 3, 2 pixels"):
        swin.from_state(shapes, "x")


def test_a_config_goes_there_and_back():
    model = TINY.clone(activation="gelu_tanh", drop_path=0.2, attention_dropout=0.1)
    config = swin.to_hf(backbone_fields(model), 5)
    assert (config["model_type"], config["architectures"]) == (
        "swin",
        ["SwinForImageClassification"],
    )
    recipe = swin.from_hf(config, {})
    assert build(recipe.backbone) == model
    assert recipe.num_classes == 5
    assert swin.from_hf(swin.to_hf(backbone_fields(model), 0), {}).num_classes == 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"hidden_act": "gleu"}, "hidden_act='gleu' is not known here. Did you mean 'gelu'"),
        ({"qkv_bias": False}, "qkv_bias=False is not known here, only True"),
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings=True"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12"),
        ({"num_channels": 4}, "num_channels=4"),
        ({"patch_size": [4, 2]}, r"patch_size=\[4, 2\]"),
    ],
)
def test_settings_that_are_not_here_are_refused(setting, said):
    config = swin.to_hf(backbone_fields(TINY), 5) | setting
    with pytest.raises(ConfigError, match=said):
        swin.from_hf(config, {})


def test_a_model_that_transformers_lacks_is_refused():
    with pytest.raises(ConfigError, match="epsilon=1e-06"):
        swin.to_hf(backbone_fields(TINY.clone(epsilon=1e-6)), 5)
    with pytest.raises(ConfigError, match="always_shift=True"):
        swin.to_hf(backbone_fields(TINY.clone(always_shift=True)), 5)
