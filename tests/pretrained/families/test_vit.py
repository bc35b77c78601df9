from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import vit as golden
from vit_jax.build import build
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.pretrained import names
from vit_jax.pretrained.families import vit
from vit_jax.pretrained.opened import backbone_fields

GOLDEN = Path(__file__).parents[2] / "golden"


def abstract(module, size):
    pixels = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(partial(module.init, train=False), jax.random.key(0), pixels)


def shapes_of(arrays):
    return {name: array.shape for name, array in arrays.items()}


@pytest.fixture(scope="module")
def deit():
    arrays = np.load(GOLDEN / "deit_tiny.npz")
    state = golden.state_of(arrays)
    recipe = vit.from_hf(golden.config_of(arrays), shapes_of(state))
    model = golden.model_of(recipe)
    wanted = abstract(model, golden.DEIT_SIZES[0])
    return arrays, recipe, model, names.read(recipe.table, wanted, state), wanted


@pytest.mark.parametrize("i", range(len(golden.DEIT_SIZES)), ids=str)
def test_distilled_deit_equals_the_published_implementation(deit, i):
    arrays, _, model, variables, _ = deit
    apply = jax.jit(partial(model.apply, train=False, capture_intermediates=True))
    logits, seen = apply(variables, arrays[f"{i}/image"].astype(np.float32))
    blocks = seen["intermediates"]["backbone"]
    pairs = [(blocks[f"block_{n}"]["__call__"][0], f"block_{n}") for n in range(golden.DEPTH)]
    for got, name in [*pairs, (logits, "logits")]:
        wanted = arrays[f"{i}/{name}"]
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_what_is_written_has_the_published_names_and_reads_back(deit):
    arrays, recipe, _, variables, wanted = deit
    written = dict(names.write(recipe.table, variables))
    assert sorted(written) == list(arrays["names"])  # transformers still writes its old names
    chex.assert_trees_all_equal(names.read(recipe.table, wanted, written), variables)
    config = vit.to_hf(backbone_fields(build(recipe.backbone)), recipe.num_classes)
    again = vit.from_hf(config, {})
    assert (again.backbone, again.num_classes) == (recipe.backbone, recipe.num_classes)
    assert again.classifier == recipe.classifier
    published = golden.config_of(arrays)
    for key in ("model_type", "architectures", "hidden_size", "intermediate_size", "image_size"):
        assert config[key] == published[key]


def test_an_image_classifier_of_deit_reads_its_class_token_alone(deit):
    arrays, *_ = deit
    config = golden.config_of(arrays) | {"architectures": ["DeiTForImageClassification"]}
    recipe = vit.from_hf(config, {"classifier.weight": (5, 24)})
    assert recipe.backbone["pooling"] == "token"
    assert recipe.backbone["distilled"]
    assert "classifier" in recipe.table.head.values()
    alone = vit.from_hf(config | {"architectures": ["DeiTModel"]}, {"layernorm.bias": (24,)})
    assert (alone.num_classes, alone.backbone["pooling"]) == (0, "tokens")


HF = {
    "model_type": "vit",
    "architectures": ["ViTModel"],
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 25,
    "image_size": [8, 12],
    "patch_size": 4,
    "hidden_act": "gelu_new",
}


def test_a_pooler_is_unused_and_the_file_says_why():
    recipe = vit.from_hf(HF, {"layernorm.bias": (12,)})
    model = build(recipe.backbone)
    variables = jax.tree.map(lambda x: np.ones(x.shape), abstract(model, (8, 12)))
    file = dict(names.write(recipe.table, variables))
    assert file["encoder.layer.0.intermediate.dense.weight"].shape == (25, 12)
    file |= {"pooler.dense.weight": np.ones((12, 12)), "pooler.dense.bias": np.ones(12)}
    match = recipe.table.bind(names.shapes_of(variables), shapes_of(file))
    assert match.complete
    assert "no classifier reads" in match.unused["pooler.dense.weight"]
    assert (model.activation, model.epsilon) == ("gelu_tanh", 1e-12)
    file["layernorm.bais"] = file.pop("layernorm.bias")
    with pytest.raises(CheckpointError, match=r"layernorm\.bais"):
        names.read(recipe.table, variables, file)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"hidden_act": "gelo"}, "hidden_act='gelo' .*'gelu'"),
        ({"patch_size": [4, 8]}, r"patch_size=\[4, 8\]"),
        ({"num_channels": 1}, "num_channels=1"),
    ],
)
def test_a_config_that_vit_cannot_be_is_refused(entries, said):
    with pytest.raises(ConfigError, match=said):
        vit.from_hf(HF | entries, {})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer_scale": 0.1}, "layer_scale=0.1"),
        ({"stem": (1,)}, r"stem=\(1,\)"),
        ({"pooling": "mean"}, "pooling='mean'"),
        ({"pooling": "mean_norm", "distilled": True}, "reads its tokens"),
    ],
)
def test_what_transformers_lacks_is_not_written(fields, said):
    backbone = vars(build({"target": "models.vit.ViT"}))
    with pytest.raises(ConfigError, match=said):
        vit.to_hf(backbone | fields, 3)


def test_timms_distilled_deit_has_two_tokens_and_two_heads(deit):
    _, recipe, _, variables, wanted = deit
    table = vit.STATE
    file = dict(names.write(table, variables))
    assert file["pos_embed"].shape == (1, 2 + 16, 24)
    assert file["blocks.1.attn.qkv.bias"].shape == (72,)
    found = vit.from_state(shapes_of(file), "deit_base_distilled_patch16_224-df68dfff.pth")
    assert found.origin == "Facebook"
    assert found.classifier == vit.DISTILLED
    fields = {"patch": 4, "width": 24, "depth": 2, "pooling": "tokens", "image_size": 16}
    assert fields.items() <= found.backbone.items()
    assert found.backbone["position_resize"] == "bicubic_torch"
    assert "heads are not in the file" in found.remarks[0]
    chex.assert_trees_all_equal(names.read(table, wanted, file), variables)
    assert recipe.num_classes == found.num_classes == 5


def vit_state(width=384, depth=12, patch=16, positions=197, **more):
    state = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "norm.weight": (width,),
        "head.weight": (1000, width),
    }
    for i in range(depth):
        state[f"blocks.{i}.attn.qkv.weight"] = (3 * width, width)
        state[f"blocks.{i}.mlp.fc1.weight"] = (4 * width, width)
        state[f"blocks.{i}.mlp.fc2.weight"] = (width, 4 * width)
    return {k: v for k, v in (state | more).items() if v}


@pytest.mark.parametrize(
    ("state", "name", "fields"),
    [
        (vit_state(), "vit_small_patch16_224", {"heads": 6, "pooling": "token", "qkv_bias": False}),
        (vit_state(192, 12, positions=577), "vit.pth", {"heads": 3, "image_size": 384}),
        (vit_state(1280, 32, 14, 257), "vit_huge", {"heads": 16, "image_size": 224}),
        (vit_state(positions=196), "deit3_small", {"class_position": False, "image_size": 224}),
        (
            vit_state(**{"blocks.0.gamma_1": (384,), "blocks.0.attn.qkv.bias": (1152,)}),
            "deit_3_small_224_1k.pth",
            {"layer_scale": 1e-5, "qkv_bias": True, "position_resize": "bicubic_torch"},
        ),
        (
            vit_state(**{"fc_norm.weight": (384,), "norm.weight": None}),
            "mae_finetuned_vit_base.pth",
            {"pooling": "mean_norm"},
        ),
        (vit_state(positions=196, cls_token=None), "gap", {"pooling": "mean"}),
        (
            vit_state(positions=200, **{"reg_token": (1, 4, 384)}) | {"pos_embed": (1, 196, 384)},
            "vit_reg4",
            {"registers": 4, "class_position": False},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_tell_the_fields_and_known_sizes_the_heads(state, name, fields):
    recipe = vit.from_state(state, name)
    assert fields.items() <= recipe.backbone.items()
    assert recipe.num_classes == 1000
    assert recipe.remarks == ()
    build(recipe.backbone)


@pytest.mark.parametrize(
    ("name", "stem", "size"),
    [("vit_hybrid", (2, 1), 32), ("vit_root", (), 32), ("vit_root_timm", (), 16)],
)
def test_a_hybrid_of_timm_has_timms_epsilons(name, stem, size):
    state = golden.state_of(np.load(GOLDEN / f"{name}.npz"))
    backbone = vit.from_state(shapes_of(state), name).backbone
    assert (backbone["stem"], backbone["stem_width"]) == (stem, golden.STEM_WIDTH)
    assert (backbone["stem_source"], backbone["image_size"]) == ("timm", size)


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({"a": (1,)}, "a"),
        (vit_state(**{"norm_pre.weight": (384,)}), "vit_base_patch16_clip_224"),
        (vit_state(), "vit_relpos_base_patch16_rpn_224"),
        (vit_state(mask_token=(1, 384)), "dinov2_vits14_pretrain.pth"),
    ],
)
def test_other_architectures_are_left_to_others(state, name):
    assert vit.from_state(state, name) is None


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (vit_state(positions=200), "200 positions are of no square grid"),
        (vit_state(**{"blocks.0.mlp.fc1.weight": (3072, 384)}), "gated"),
        (vit_state(cls_token=None, **{"fc_norm.weight": (384,)}), "without a class token"),
        (vit_state(**{"patch_embed.backbone.conv1.0.weight": (9, 3, 3, 3)}), "CNN"),
    ],
)
def test_a_vit_that_cannot_be_is_refused(state, said):
    with pytest.raises(ConfigError, match=said):
        vit.from_state(state, "model.pth")


def google(variables, big_vision=False, heads=3):
    """Our variables as Google's code has them: its names, its axes, heads split."""
    found = {}
    for name, array in names.write(vit.NPZ, variables):
        part = f"/{name}".split("/")[-2]
        if part in ("query", "key", "value"):
            array = array.reshape(*array.shape[:-1], heads, -1)
        elif part == "out" and array.ndim == 2:
            array = array.reshape(heads, -1, array.shape[-1])
        elif part.startswith("gn"):
            array = array.reshape(1, 1, 1, -1)
        if big_vision:
            for old, new in (
                ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
                ("LayerNorm_2", "LayerNorm_1"),
                ("MlpBlock_3", "MlpBlock_0"),
                ("Transformer/posembed_input/", ""),
            ):
                name = name.replace(old, new)
        found[name] = array
    return found


@pytest.mark.parametrize("big_vision", [False, True])
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (32, 32)),
        ({"pooling": "mean"}, (32, 32)),
        ({"stem": (2, 1), "stem_width": 32, "patch": 1}, (24, 24)),
        ({"stem": (), "stem_width": 32, "patch": 2}, (24, 24)),
    ],
)
def test_googles_files_are_read_by_names_and_shapes(fields, size, big_vision):
    backbone = {"target": "models.vit.ViT", "patch": 8, "width": 24, "depth": 2, "heads": 3}
    backbone |= {"image_size": size[0], "activation": "gelu_tanh"} | fields
    head = {"target": "models.classifier.Classifier", "num_classes": 5, "representation": 7}
    wanted = abstract(build(head | {"backbone": backbone}), size)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), wanted)
    file = google(variables, big_vision)
    recipe = vit.from_npz(shapes_of(file))
    module = golden.model_of(recipe)
    assert module == build(head | {"backbone": backbone})
    chex.assert_trees_all_equal(names.read(recipe.table, abstract(module, size), file), variables)
    headless = {k: v for k, v in file.items() if not k.startswith("head")}
    alone = vit.from_npz(shapes_of(headless))
    assert alone.num_classes == 0
    params = names.shapes_of(abstract(build(alone.backbone), size))
    match = alone.table.bind(params, shapes_of(headless))
    assert match.complete
    assert set(match.unused) == {"pre_logits/kernel", "pre_logits/bias"}


def test_a_file_of_big_vision_without_positions_has_fixed_ones():
    backbone = {"target": "models.vit.ViT", "patch": 16, "width": 24, "depth": 1, "heads": 3}
    backbone |= {"pooling": "mean", "positions": "sincos_closed"}
    wanted = abstract(build(backbone), (32, 32))
    file = google(jax.tree.map(lambda x: np.ones(x.shape), wanted), big_vision=True)
    recipe = vit.from_npz(shapes_of(file))
    assert backbone.items() <= recipe.backbone.items()
    assert "big_vision's fixed ones" in recipe.remarks[0]
    assert vit.from_npz({"a": (1,)}) is None
    with pytest.raises(ConfigError, match="MAPHead"):
        vit.from_npz(shapes_of(file) | {"MAPHead_0/probe": (1, 1, 24)})
