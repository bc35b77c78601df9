from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.build import build
from vit_jax.models.classifier import Classifier
from vit_jax.models.swin_v2 import SwinV2
from vit_jax.pretrained import names
from vit_jax.pretrained.families import swin, swin_v2
from vit_jax.pretrained.opened import backbone_fields

TINY = SwinV2(width=4, depths=(2, 1, 1, 1), heads=(1, 2, 2, 4))


@pytest.fixture(scope="module")
def variables():
    pixels = jax.ShapeDtypeStruct((1, 16, 24, 3), jnp.float32)
    init = partial(Classifier(TINY, 5).init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), pixels)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), dict(shapes))


TABLES = {"HF": swin_v2.HF, "TIMM": swin_v2.TIMM, "MICROSOFT": swin_v2.MICROSOFT}


@pytest.mark.parametrize("table", TABLES)
def test_what_is_written_is_read_back(variables, table):
    table = TABLES[table]
    again = names.read(table, variables, dict(names.write(table, variables)))
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_one_matrix_holds_the_projections_and_the_key_has_no_bias(variables):
    state = dict(names.write(swin_v2.TIMM, variables))
    block = variables["params"]["backbone"]["stage_1"]["block_1"]
    there = "layers.0.blocks.1.attn."
    for i, part in enumerate(("query", "key", "value")):
        weight = state[there + "qkv.weight"][4 * i : 4 * i + 4]
        np.testing.assert_array_equal(weight, block["attention"][part]["kernel"].T)
    np.testing.assert_array_equal(state[there + "v_bias"], block["attention"]["value"]["bias"])
    assert {name.removeprefix(there) for name in state if name.startswith(there)} == {
        "qkv.weight",
        "q_bias",
        "v_bias",
        "logit_scale",
        "cpb_mlp.0.weight",
        "cpb_mlp.0.bias",
        "cpb_mlp.2.weight",
        "proj.weight",
        "proj.bias",
    }
    assert state[there + "logit_scale"].shape == (1, 1, 1)


def test_constants_of_a_window_are_no_parameters(variables):
    state = dict(names.write(swin_v2.MICROSOFT, variables))
    for name in ("attn_mask", "attn.relative_coords_table", "attn.relative_position_index"):
        state["layers.0.blocks.1." + name] = np.zeros(3)
    names.read(swin_v2.MICROSOFT, variables, state)


@pytest.mark.parametrize(
    ("name", "window", "size", "before"),
    [
        ("swinv2_tiny_window8_256", 8, 256, ()),
        ("swinv2_tiny_patch4_window16_256.pth", 16, 256, ()),
        ("swinv2_base_patch4_window12_192_22k.pth", 12, 192, ()),
        ("swinv2_base_window12to16_192to256.ms_in22k_ft_in1k", 16, 256, (12, 12, 12, 6)),
        ("swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth", 24, 384, (12, 12, 12, 6)),
    ],
)
@pytest.mark.parametrize("origin", ["timm", "Microsoft"])
def test_the_name_tells_the_windows(variables, origin, name, window, size, before):
    table = swin_v2.TIMM if origin == "timm" else swin_v2.MICROSOFT
    shapes = {k: v.shape for k, v in names.write(table, variables)}
    recipe = swin_v2.from_state(shapes, name)
    wanted = TINY.clone(window=window, image_size=size, pretrained_window=before)
    assert build(recipe.backbone) == wanted
    assert (recipe.origin, recipe.num_classes, recipe.remarks) == (origin, 5, ())
    assert recipe.table is table
    assert recipe.preprocessing[0]["size"] == (size, size)


@pytest.mark.parametrize(
    ("sides", "window", "size", "before"),
    [((8, 8), 8, 256, ()), ((16, 8), 16, 256, ()), ((24, 12), 24, 384, (12, 12, 12, 6))],
)
def test_constants_tell_the_windows_where_the_name_does_not(variables, sides, window, size, before):
    shapes = {k: v.shape for k, v in names.write(swin_v2.MICROSOFT, variables)}
    for stage, side in zip((0, 3), sides, strict=True):
        table = f"layers.{stage}.blocks.0.attn.relative_coords_table"
        shapes[table] = (1, 2 * side - 1, 2 * side - 1, 2)
    recipe = swin_v2.from_state(shapes, "model.pth")
    wanted = TINY.clone(window=window, image_size=size, pretrained_window=before)
    assert build(recipe.backbone) == wanted


def test_what_nothing_tells_is_said(variables):
    shapes = {k: v.shape for k, v in names.write(swin_v2.TIMM, variables)}
    recipe = swin_v2.from_state(shapes, "model.safetensors")
    assert build(recipe.backbone) == TINY
    assert "windows: 8 pixels" in recipe.remarks[0]
    # The first version and this one do not take each other's.
    assert swin.from_state(shapes, "model.safetensors") is None
    assert swin_v2.from_state({"patch_embed.proj.weight": (8, 3, 4, 4)}, "vit") is None


@pytest.mark.parametrize("before", [(), (12, 12, 12, 6)])
def test_a_config_goes_there_and_back(before):
    model = TINY.clone(window=24, image_size=(384, 512), pretrained_window=before, drop_path=0.2)
    config = swin_v2.to_hf(backbone_fields(model), 5)
    assert config["pretrained_window_sizes"] == (list(before) or [0, 0, 0, 0])
    assert config["architectures"] == ["Swinv2ForImageClassification"]
    recipe = swin_v2.from_hf(config, {})
    assert (build(recipe.backbone), recipe.num_classes) == (model, 5)
