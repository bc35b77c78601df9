from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.golden import upernet as golden
from vit_jax.build import build
from vit_jax.errors import ConfigError
from vit_jax.pretrained.families import upernet
from vit_jax.pretrained.names import shapes_of
from vit_jax.pretrained.opened import backbone_fields

GOLDEN = Path(__file__).parents[2] / "golden" / "upernet_tiny.npz"
STAGES = ["stage1", "stage2", "stage3", "stage4"]
CONFIG = {
    "architectures": ["UperNetForSemanticSegmentation"],
    "model_type": "upernet",
    "hidden_size": golden.FEATURES,
    "auxiliary_channels": golden.HELP,
    "backbone_config": {
        "model_type": "swin",
        "embed_dim": golden.WIDTH,
        "depths": list(golden.DEPTHS),
        "num_heads": list(golden.HEADS),
        "window_size": golden.WINDOW,
        "out_features": STAGES,
    },
}


@pytest.fixture(scope="module")
def state():
    arrays = np.load(GOLDEN)
    return {k.removeprefix("state/"): arrays[k].shape for k in arrays if k.startswith("state/")}


def model_of(recipe):
    """As `Opened.module` builds it."""
    head = recipe.classifier | {"num_classes": recipe.num_classes}
    return build(head | {"backbone": recipe.backbone})


def shapes(module):
    pixels = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    return shapes_of(jax.eval_shape(partial(module.init, train=False), jax.random.key(0), pixels))


def test_every_array_of_transformers_has_its_place(state):
    recipe = upernet.from_hf(CONFIG, state)
    assert recipe.num_classes == golden.CLASSES
    ours = shapes(model_of(recipe))
    assert recipe.table.bind(ours, state).complete
    # Old files: no `swin` around the backbone, no norm of its last map, old names in the blocks.
    old = {
        k.replace("backbone.swin.", "backbone."): v
        for k, v in state.items()
        if ".swin.layernorm" not in k
    }
    for new, before in (
        ("attention.q_proj", "attention.self.query"),
        ("attention.k_proj", "attention.self.key"),
        ("attention.v_proj", "attention.self.value"),
        ("attention.o_proj", "attention.output.dense"),
        (
            "attention.relative_position_bias.relative_position_bias_table",
            "attention.self.relative_position_bias_table",
        ),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        old = {k.replace(new, before): v for k, v in old.items()}
    assert recipe.table.bind(ours, old).complete
    names = {b.name for b in recipe.table.bind(ours).bindings}
    assert set(old) <= names  # and they are what is written
    assert names - set(old) == {"backbone.swin.layernorm.weight", "backbone.swin.layernorm.bias"}


def test_a_file_without_auxiliary_head_gives_a_model_without(state):
    some = {k: v for k, v in state.items() if not k.startswith("auxiliary_head")}
    recipe = upernet.from_hf(CONFIG, some)
    assert recipe.classifier["auxiliary_features"] == 0
    assert recipe.table.bind(shapes(model_of(recipe)), some).complete


def test_what_is_written_is_read_back(state):
    recipe = upernet.from_hf(CONFIG | {"pool_scales": [1, 3]}, {})
    module = model_of(recipe)
    spec = backbone_fields(module) | {"backbone": backbone_fields(module.backbone)}
    again = upernet.from_hf(upernet.to_hf(spec, 2), {})
    assert (again.backbone, again.classifier) == (recipe.backbone, recipe.classifier)
    assert again.num_classes == 2


@pytest.mark.parametrize(
    ("more", "inside", "said"),
    [
        ({}, {"model_type": "convnext"}, "model_type='convnext' is not known here, only 'swin'"),
        ({}, {"out_features": STAGES[1:]}, "out_features="),
        ({}, {"depths": [2, 2]}, "a Swin of 2 stages is not known here"),
        ({"auxiliary_concat_input": True}, {}, "auxiliary_concat_input=True is not known here"),
        ({"auxiliary_in_channels": 7}, {}, "auxiliary_in_channels=7: the third map has 16"),
    ],
)
def test_what_cannot_be_is_refused(more, inside, said):
    config = CONFIG | {"backbone_config": CONFIG["backbone_config"] | inside} | more
    with pytest.raises(ConfigError, match=said):
        upernet.from_hf(config, {})
