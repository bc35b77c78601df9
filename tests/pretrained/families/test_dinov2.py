from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import dinov2 as golden
from tests.golden import vit as shared
from vit_jax.build import build
from vit_jax.errors import ConfigError
from vit_jax.pretrained import names
from vit_jax.pretrained.families import dinov2, vit
from vit_jax.pretrained.opened import backbone_fields

GOLDEN = Path(__file__).parents[2] / "golden"


def abstract(module, size):
    pixels = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(partial(module.init, train=False), jax.random.key(0), pixels)


def shapes_of(arrays):
    return {name: array.shape for name, array in arrays.items()}


def opened(name):
    arrays = np.load(GOLDEN / f"{name}.npz")
    state = shared.state_of(arrays)
    recipe = dinov2.from_hf(shared.config_of(arrays), shapes_of(state))
    model = shared.model_of(recipe)
    wanted = abstract(model, golden.SIZES[0])
    return arrays, recipe, model, names.read(recipe.table, wanted, state), wanted


@pytest.mark.parametrize("i", range(len(golden.SIZES)), ids=str)
@pytest.mark.parametrize("name", golden.CASES)
def test_every_stage_equals_the_published_implementation(name, i):
    arrays, _, model, variables, _ = opened(name)
    apply = jax.jit(partial(model.apply, train=False, capture_intermediates=True))
    logits, seen = apply(variables, arrays[f"{i}/image"].astype(np.float32))
    blocks = seen["intermediates"]["backbone"]
    pairs = [(blocks[f"block_{n}"]["__call__"][0], f"block_{n}") for n in range(2)]
    for got, stage in [*pairs, (logits, "logits")]:
        wanted = arrays[f"{i}/{stage}"]
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", golden.CASES)
def test_what_is_written_has_the_published_names_and_reads_back(name):
    arrays, recipe, _, variables, wanted = opened(name)
    config = dinov2.to_hf(backbone_fields(build(recipe.backbone)), recipe.num_classes)
    again = dinov2.from_hf(config, {})
    assert (again.backbone, again.num_classes) == (recipe.backbone, recipe.num_classes)
    written = dict(names.write(again.table, variables))
    published = [n for n in arrays["names"] if not n.endswith("mask_token")]
    assert sorted(written) == published  # transformers still writes its old names
    chex.assert_trees_all_equal(names.read(again.table, wanted, written), variables)
    theirs = shared.config_of(arrays)
    for key in ("model_type", "architectures", "mlp_ratio", "layerscale_value", "patch_size"):
        assert config[key] == theirs[key]


def test_alone_the_class_token_describes_the_image():
    arrays = np.load(GOLDEN / "dinov2_tiny.npz")
    config = shared.config_of(arrays) | {"architectures": ["Dinov2Model"]}
    recipe = dinov2.from_hf(config, {"layernorm.weight": (24,)})
    assert (recipe.num_classes, recipe.backbone["pooling"]) == (0, "token")
    config = dinov2.to_hf(backbone_fields(build(recipe.backbone)), 0)
    assert dinov2.from_hf(config, {}).backbone == recipe.backbone


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer_scale": None}, "layer_scale=None"),
        ({"position_resize": "bicubic_dinov2"}, "'bicubic_torch' only"),
        ({"registers": 4}, "'bicubic' only"),
        ({"mlp_ratio": 2.5}, "mlp_ratio=2.5"),
    ],
)
def test_what_transformers_lacks_is_not_written(fields, said):
    backbone = vars(build({"target": "models.vit.dinov2_s14", "position_resize": "bicubic_torch"}))
    assert dinov2.to_hf(backbone, 0)["model_type"] == "dinov2"
    with pytest.raises(ConfigError, match=said):
        dinov2.to_hf(backbone | fields, 0)


@pytest.mark.parametrize(
    ("fields", "name", "resize"),
    [
        ({}, "dinov2_vits14_pretrain.pth", "bicubic_dinov2"),
        ({"registers": 3}, "dinov2_vits14_reg4_pretrain.pth", "bicubic"),
        ({"feed_forward": "swiglu"}, "dinov2_vitg14_pretrain.pth", "bicubic_dinov2"),
        ({}, "vit_small_patch14_dinov2", "bicubic"),
        ({"registers": 3, "class_position": False}, "vit_small_patch14_reg4_dinov2", "bicubic"),
        ({"feed_forward": "swiglu"}, "vit_giant_patch14_dinov2", "bicubic"),
    ],
)
def test_a_state_dict_of_facebook_or_timm_is_read(fields, name, resize):
    backbone = {"target": "models.vit.ViT", "patch": 14, "width": 24, "depth": 2, "heads": 1}
    backbone |= {"image_size": 42, "layer_scale": 1e-5, "position_resize": resize} | fields
    wanted = abstract(build(backbone), (42, 42))
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), wanted)
    file = dict(names.write(dinov2.STATE, variables))
    facebook = name.endswith(".pth")
    if facebook:
        spelled = {"reg_token": "register_tokens"}
        file = {spelled.get(k, k): v for k, v in file.items()} | {"mask_token": np.ones((1, 24))}
        if "swiglu" in fields.values():
            file = {
                k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v
                for k, v in file.items()
            }
    recipe = dinov2.from_state(shapes_of(file), name)
    assert recipe.origin == ("Facebook" if facebook else "timm")
    assert build(recipe.backbone) == build(backbone)
    chex.assert_trees_all_equal(names.read(recipe.table, wanted, file), variables)


def test_other_architectures_are_left_to_others():
    assert dinov2.from_state({"a": (1,)}, "dinov2") is None
    deit3 = {
        "patch_embed.proj.weight": (1280, 3, 14, 14),
        "pos_embed": (1, 256, 1280),
        "blocks.0.ls1.gamma": (1280,),
        "cls_token": (1, 1, 1280),
    }
    assert dinov2.from_state(deit3, "deit3_huge_patch14_224") is None
    assert set(dinov2.HF_TYPES).isdisjoint(vit.HF_TYPES)
