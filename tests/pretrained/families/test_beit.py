from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import beit as golden
from tests.golden import vit as shared
from vit_jax.build import build
from vit_jax.errors import ConfigError
from vit_jax.pretrained import names
from vit_jax.pretrained.families import beit
from vit_jax.pretrained.opened import backbone_fields

GOLDEN = Path(__file__).parents[2] / "golden"


def shapes_of(arrays):
    return {name: array.shape for name, array in arrays.items()}


@pytest.fixture(scope="module")
def tiny():
    arrays = np.load(GOLDEN / "beit_tiny.npz")
    state = shared.state_of(arrays)
    recipe = beit.from_hf(shared.config_of(arrays), shapes_of(state))
    pixels = jax.ShapeDtypeStruct((1, *golden.SIZES[0], 3), jnp.float32)
    init = partial(shared.model_of(recipe).init, train=False)
    wanted = jax.eval_shape(init, jax.random.key(0), pixels)
    return arrays, recipe, names.read(recipe.table, wanted, state), wanted


def test_what_is_written_has_the_published_names_and_reads_back(tiny):
    arrays, recipe, variables, wanted = tiny
    config = beit.to_hf(backbone_fields(build(recipe.backbone)), recipe.num_classes)
    again = beit.from_hf(config, {})
    assert (again.backbone, again.num_classes) == (recipe.backbone, recipe.num_classes)
    written = dict(names.write(again.table, variables))
    assert sorted(written) == list(arrays["names"])  # transformers still writes its old names
    chex.assert_trees_all_equal(names.read(again.table, wanted, written), variables)
    theirs = shared.config_of(arrays)
    for key in ("model_type", "architectures", "layer_scale_init_value", "intermediate_size"):
        assert config[key] == theirs[key]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"use_relative_position_bias": False}, "pre-training's"),
        ({"use_shared_relative_position_bias": True}, "use_shared_relative_position_bias=True"),
        ({"use_absolute_position_embeddings": True}, "use_absolute_position_embeddings=True"),
        ({"use_mean_pooling": False}, "use_mean_pooling=False"),
        ({"hidden_act": "gelo"}, "hidden_act='gelo'"),
    ],
)
def test_a_config_that_beit_cannot_be_is_refused(tiny, entries, said):
    with pytest.raises(ConfigError, match=said):
        beit.from_hf(shared.config_of(tiny[0]) | entries, {})


@pytest.mark.parametrize("origin", ["timm", "Microsoft"])
def test_a_state_dict_of_microsoft_or_timm_is_read(tiny, origin):
    _, recipe, variables, wanted = tiny
    params = variables["params"]["backbone"]["block_1"]["attention"]
    # What they have: one matrix, and a bias for query and value only.
    matrix = np.concatenate([params[p]["kernel"].T for p in ("query", "key", "value")])
    file = dict(names.write(beit.STATE, variables))
    np.testing.assert_array_equal(file["blocks.1.attn.qkv.weight"], matrix)
    np.testing.assert_array_equal(file["blocks.1.attn.q_bias"], params["query"]["bias"])
    assert not [n for n in file if n.endswith(("qkv.bias", "k_bias"))]
    if origin == "Microsoft":
        file["blocks.0.attn.relative_position_index"] = np.zeros((17, 17), np.int64)
    found = beit.from_state(shapes_of(file), "model.pth")
    assert (found.origin, found.num_classes) == (origin, 5)
    same = {"patch", "width", "depth", "heads", "mlp_ratio", "image_size"}
    assert {k: found.backbone[k] for k in same} == {k: recipe.backbone[k] for k in same}
    assert build(found.backbone).epsilon == 1e-6
    chex.assert_trees_all_equal(names.read(found.table, wanted, file), variables)


def test_what_is_no_fine_tuned_beit_is_refused_or_left_to_others():
    assert beit.from_state({"a": (1,)}, "beit") is None
    shared_table = {
        "patch_embed.proj.weight": (24, 3, 4, 4),
        "blocks.0.attn.qkv.weight": (72, 24),
        "cls_token": (1, 1, 24),
        "rel_pos_bias.relative_position_bias_table": (52, 3),
    }
    with pytest.raises(ConfigError, match="pre-training's"):
        beit.from_state(shared_table, "beit_base_patch16_224_pt22k.pth")
