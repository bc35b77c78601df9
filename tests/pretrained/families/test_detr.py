from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.golden import detr as golden
from vit_jax.build import build
from vit_jax.errors import ConfigError
from vit_jax.pretrained import names
from vit_jax.pretrained.families import detr
from vit_jax.pretrained.names import shapes_of
from vit_jax.pretrained.opened import backbone_fields

GOLDEN = Path(__file__).parents[2] / "golden" / "detr_tiny.npz"
CONFIG = {
    "architectures": ["DetrForSegmentation"],
    "model_type": "detr",
    "d_model": golden.WIDTH,
    "num_queries": golden.QUERIES,
    "use_timm_backbone": False,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": golden.ROOT,
        "hidden_sizes": [4 * golden.ROOT * 2**i for i in range(4)],
        "depths": list(golden.DEPTHS),
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    **{f"{side}_layers": golden.LAYERS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": golden.HIDDEN for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": golden.HEADS for side in ("encoder", "decoder")},
}
# What published files have: facebook/detr-resnet-50.
PUBLISHED = {
    "architectures": ["DetrForObjectDetection"],
    "model_type": "detr",
    "activation_function": "relu",
    "use_timm_backbone": True,
    "backbone": "resnet50",
    "backbone_config": None,
    "dilation": False,
    "id2label": {str(i): f"class {i}" for i in range(91)},
}
# Old names of transformers 4 for those of transformers 5, in the order in which they are replaced.
OLD = (
    ("model.backbone.model.", "model.backbone.conv_encoder.model."),
    ("o_proj.", "out_proj."),
    (".mlp.fc", ".fc"),
    ("bbox_attention.q_proj", "bbox_attention.q_linear"),
    ("bbox_attention.k_proj", "bbox_attention.k_linear"),
    ("mask_head.output_conv", "mask_head.out_lay"),
    *((f"mask_head.conv{i}.conv", f"mask_head.lay{i}") for i in (1, 2)),
    *((f"mask_head.conv{i}.norm", f"mask_head.gn{i}") for i in (1, 2)),
    *((f"mask_head.fpn_stages.{i}.fpn_adapter", f"mask_head.adapter{i + 1}") for i in range(3)),
    *((f"mask_head.fpn_stages.{i}.refine.conv", f"mask_head.lay{i + 3}") for i in range(3)),
    *((f"mask_head.fpn_stages.{i}.refine.norm", f"mask_head.gn{i + 3}") for i in range(3)),
)


def model_of(recipe):
    """As `Opened.module` builds it."""
    head = recipe.classifier | {"num_classes": recipe.num_classes}
    return build(head | {"backbone": recipe.backbone})


def shapes(module):
    pixels = jax.ShapeDtypeStruct((1, 64, 96, 3), np.float32)
    return shapes_of(jax.eval_shape(partial(module.init, train=False), jax.random.key(0), pixels))


@pytest.fixture(scope="module")
def state():
    arrays = np.load(GOLDEN)
    return {k.removeprefix("state/"): arrays[k] for k in arrays if k.startswith("state/")}


def bound(recipe, state):
    """The match of a file with the model that its recipe builds."""
    theirs = {k: v.shape for k, v in state.items()}
    return recipe.table.bind(shapes(model_of(recipe)), theirs)


def old_names(state):
    renamed = {}
    for name, array in state.items():
        for new, old in OLD:
            name = name.replace(new, old)
        renamed[name] = array
    return renamed


@pytest.mark.parametrize("old", [False, True], ids=["new names", "old names"])
@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_every_array_of_transformers_has_its_place(state, masks, old):
    if not masks:
        state = {k.removeprefix("detr."): v for k, v in state.items() if k.startswith("detr.")}
    found = old_names(state) if old else state
    assert old == (found.keys() != state.keys())
    recipe = detr.from_hf(CONFIG, {k: v.shape for k, v in found.items()})
    assert recipe.classifier["target"] == detr.TARGETS[masks]
    assert recipe.num_classes == golden.CLASSES
    assert bound(recipe, found).complete


def facebook_names(state):
    """The same arrays as Facebook's code would save them."""
    found = {}
    for name, array in old_names(state).items():
        for new, old in (
            ("detr.model.backbone.conv_encoder.model.", "detr.backbone.0.body."),
            ("detr.model.input_projection", "detr.input_proj"),
            ("detr.model.query_position_embeddings", "detr.query_embed"),
            ("detr.class_labels_classifier", "detr.class_embed"),
            ("detr.bbox_predictor", "detr.bbox_embed"),
            ("detr.model.", "detr.transformer."),
            ("decoder.layernorm", "decoder.norm"),
            ("self_attn_layer_norm", "norm1"),
            ("encoder_attn_layer_norm", "norm2"),
            ("final_layer_norm", "norm3" if ".decoder." in name else "norm2"),
            ("encoder_attn", "multihead_attn"),
            (".fc1.", ".linear1."),
            (".fc2.", ".linear2."),
            ("embedder.embedder.convolution", "conv1"),
            ("embedder.embedder.normalization", "bn1"),
            ("shortcut.convolution", "downsample.0"),
            ("shortcut.normalization", "downsample.1"),
            *((f"layer.{i}.convolution", f"conv{i + 1}") for i in range(3)),
            *((f"layer.{i}.normalization", f"bn{i + 1}") for i in range(3)),
            *((f"encoder.stages.{i}.layers.", f"layer{i + 1}.") for i in range(4)),
        ):
            name = name.replace(new, old)
        found[name] = array
    for name in [n for n in found if ".q_proj." in n]:
        parts = [found.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        found[name.replace(".q_proj.", ".in_proj_")] = np.concatenate(parts)
    return found


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_facebooks_file_gives_the_same_numbers(state, masks):
    theirs = facebook_names(state)
    assert "detr.transformer.decoder.layers.1.multihead_attn.in_proj_weight" in theirs
    if not masks:
        prefix = "detr."
        state, theirs = (
            {k.removeprefix(prefix): v for k, v in tree.items() if k.startswith(prefix)}
            for tree in (state, theirs)
        )
    recipe = detr.from_state({k: v.shape for k, v in theirs.items()}, "detr-r50-dc5-f0fb7ef5.pth")
    assert (recipe.origin, recipe.backbone["dilation"]) == ("Facebook", 2)
    ours = shapes(model_of(recipe))
    got = names.flat(names.read(recipe.table, _nested(ours), theirs))
    wanted = names.flat(names.read(detr.HF[masks, False], _nested(ours), state))
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[path], wanted[path]) for path in got)


def _nested(shapes):
    return names.nested({k: jax.ShapeDtypeStruct(v, np.float32) for k, v in shapes.items()})


@pytest.mark.parametrize(
    ("more", "dilation"),
    [
        ({}, 1),
        ({"dilation": True}, 2),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50"}}, 1),
        (
            {
                "use_timm_backbone": None,
                "backbone": None,
                "backbone_config": {
                    "model_type": "timm_backbone",
                    "backbone": "resnet50",
                    "output_stride": 16,
                },
            },
            2,
        ),
    ],
)
def test_published_configs_have_timms_network_inside(more, dilation):
    recipe = detr.from_hf(PUBLISHED | more, {})
    assert recipe.num_classes == 91
    assert recipe.table is detr.HF[False, True]
    backbone = recipe.backbone
    assert (backbone["depths"], backbone["dilation"]) == ((3, 4, 6, 3), dilation)
    assert backbone["norm"] == "frozen"


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_what_is_written_is_read_back(masks):
    kind = "DetrForSegmentation" if masks else "DetrForObjectDetection"
    recipe = detr.from_hf(PUBLISHED | {"architectures": [kind], "dilation": True}, {})
    module = model_of(recipe)
    spec = backbone_fields(module) | {"backbone": backbone_fields(module.backbone)}
    config = detr.to_hf(spec, 91)
    again = detr.from_hf(config, {})
    assert (again.backbone, again.classifier) == (recipe.backbone, recipe.classifier)
    # As published: old names, with timm's network inside.
    written = {b.name for b in again.table.bind(shapes(module)).bindings}
    before = "detr." * masks
    assert before + "model.backbone.conv_encoder.model.layer4.2.conv3.weight" in written
    assert before + "model.decoder.layers.5.encoder_attn.out_proj.bias" in written
    assert ("mask_head.lay5.weight" in written) == masks


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"position_embedding_type": "learned"}, "position_embedding_type='learned' is not known"),
        (
            {"backbone": "resnet50d"},
            "backbone='resnet50d' is not known here. Did you mean 'resnet5",
        ),
        ({"activation_function": "silu"}, "hidden_act='silu' is not known here"),
        ({"encoder_ffn_dim": 1024}, "encoder_ffn_dim=1024 and decoder_ffn_dim=2048"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop=0.1 is not known here"),
        (
            {"use_timm_backbone": False, "backbone_config": {"model_type": "swin"}},
            "a backbone of model_type='swin' is not known here",
        ),
    ],
)
def test_what_cannot_be_is_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        detr.from_hf(PUBLISHED | more, {})


def test_other_state_dicts_are_left_to_other_families():
    assert detr.from_state({"conv1.weight": (64, 3, 7, 7)}, "resnet50.pth") is None
