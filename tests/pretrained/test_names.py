"""Tables of names are read in both directions, and speak of everything."""

import chex
import numpy as np
import pytest

from vit_jax.errors import CheckpointError
from vit_jax.pretrained import names
from vit_jax.pretrained.names import Leaf, Table

TORCH = Table(
    prefix="net.",
    backbone={
        "embed": "patch.proj",
        "class_token": Leaf("cls", leading=1),
        ("position/token", "position/grid"): Leaf("pos", leading=1),
        "stage_{i}/block_{j}/norm": ("layers.{i-1}.blocks.{j}.ln", "layers.{i-1}.{j}.old_ln"),
        (
            "stage_{i}/block_{j}/query",
            "stage_{i}/block_{j}/key",
            "stage_{i}/block_{j}/value",
        ): "layers.{i-1}.blocks.{j}.qkv",
        # An array by its own name comes before its module's row.
        "stage_{i}/block_{j}/value/bias": "layers.{i-1}.blocks.{j}.v_bias",
        "stage_{i}/block_{j}/scale_of_head": Leaf("layers.{i-1}.blocks.{j}.tau", trailing=2),
    },
    head={"head": "classifier"},
    unused={r".*\.mask": "a constant"},
)


def model():
    """Variables of a model with one of each kind of array, all numbers different."""
    random = np.random.default_rng(0)

    def array(*shape):
        return random.normal(size=shape).astype(np.float32)

    block = {
        "norm": {"scale": array(6), "bias": array(6)},
        "query": {"kernel": array(6, 4), "bias": array(4)},
        "key": {"kernel": array(6, 4)},
        "value": {"kernel": array(6, 8), "bias": array(8)},
        "scale_of_head": array(3),
    }
    return {
        "params": {
            "backbone": {
                "embed": {"kernel": array(2, 3, 5, 6), "bias": array(6)},
                "class_token": array(1, 6),
                "position": {"token": array(2, 6), "grid": array(3, 4, 6)},
                "stage_1": {"block_0": block},
            },
            "head": {"kernel": array(6, 7), "bias": array(7)},
        },
        "batch_stats": {"backbone": {"stage_1": {"block_0": {"norm": {"mean": array(6)}}}}},
    }


def published(variables):
    return dict(names.write(TORCH, variables))


def test_what_is_written_is_read_back_unchanged():
    variables = model()
    chex.assert_trees_all_equal(names.read(TORCH, variables, published(variables)), variables)


def test_arrays_lie_as_pytorch_has_them():
    variables = model()
    there, ours = published(variables), variables["params"]["backbone"]
    block = ours["stage_1"]["block_0"]
    assert there["net.patch.proj.weight"].shape == (6, 5, 2, 3)
    np.testing.assert_array_equal(
        there["net.patch.proj.weight"][4, 1], ours["embed"]["kernel"][:, :, 1, 4]
    )
    qkv = there["net.layers.0.blocks.0.qkv.weight"]  # 4 rows of queries, 4 of keys, 8 of values
    assert qkv.shape == (16, 6)
    np.testing.assert_array_equal(qkv[8:], block["value"]["kernel"].T)
    np.testing.assert_array_equal(there["net.layers.0.blocks.0.qkv.bias"], block["query"]["bias"])
    np.testing.assert_array_equal(there["net.layers.0.blocks.0.v_bias"], block["value"]["bias"])
    np.testing.assert_array_equal(
        there["net.pos"][0],
        np.concatenate([*[ours["position"]["token"]], *ours["position"]["grid"]]),
    )
    assert there["net.cls"].shape == (1, 1, 6)
    assert there["net.layers.0.blocks.0.tau"].shape == (3, 1, 1)
    assert "net.layers.0.blocks.0.ln.running_mean" in there
    np.testing.assert_array_equal(
        there["classifier.weight"], variables["params"]["head"]["kernel"].T
    )


def test_a_backbone_alone_is_written_without_the_prefix_and_read_with_or_without():
    whole = model()
    alone = {kind: tree["backbone"] for kind, tree in whole.items()}
    there = published(alone)
    assert not any(name.startswith("net.") for name in there)
    for prefix in ("", "net."):
        source = {prefix + name: array for name, array in there.items()}
        chex.assert_trees_all_equal(names.read(TORCH, alone, source), alone)


def test_the_second_spelling_is_read_too():
    variables = model()
    there = published(variables)
    for leaf in ("weight", "bias", "running_mean"):
        there[f"net.layers.0.0.old_ln.{leaf}"] = there.pop(f"net.layers.0.blocks.0.ln.{leaf}")
    chex.assert_trees_all_equal(names.read(TORCH, variables, there), variables)


def test_one_error_lists_what_does_not_fit_on_both_sides():
    variables = model()
    there = published(variables)
    there["net.strange.weight"] = np.zeros(3)
    there["net.other"] = np.zeros(3)
    there["classifier.weight"] = np.zeros((7, 5))
    del there["net.cls"], there["net.patch.proj.bias"]
    with pytest.raises(CheckpointError) as caught:
        names.read(TORCH, variables, there, name="my file")
    text = str(caught.value)
    assert text.startswith("my file does not fit")
    for said in (
        "2 arrays of the file have no place in the model: net.strange.weight, net.other",
        "params/backbone/class_token",
        "params/backbone/embed/bias",
        "classifier.weight (7, 5) for params/head/kernel (6, 7)",
    ):
        assert said in text


def test_known_constants_are_unused_with_a_reason():
    variables = model()
    there = published(variables) | {
        "net.layers.0.mask": np.zeros(3),
        "net.layers.0.blocks.0.ln.num_batches_tracked": np.zeros(()),
    }
    match = TORCH.bind(names.shapes_of(variables), {k: v.shape for k, v in there.items()})
    assert match.complete
    assert match.unused["net.layers.0.mask"] == "a constant"
    assert set(match.unused) == {
        "net.layers.0.mask",
        "net.layers.0.blocks.0.ln.num_batches_tracked",
    }


def test_a_parameter_without_a_row_cannot_be_written():
    with pytest.raises(CheckpointError, match="params/backbone/nobody/kernel"):
        published({"params": {"backbone": {"nobody": {"kernel": np.zeros((2, 3))}}}})


def test_flax_files_keep_the_orientation_and_may_split_heads():
    table = Table(
        {"block_{i}/query": "block_{i}/MHDPA_0/query", "block_{i}/norm": "block_{i}/GroupNorm_0"},
        layout="flax",
    )
    kernel, scale = np.arange(24.0).reshape(4, 6), np.arange(3.0)
    variables = {"params": {"block_1": {"query": {"kernel": kernel}, "norm": {"scale": scale}}}}
    there = {
        "block_1/MHDPA_0/query/kernel": kernel.reshape(4, 2, 3),
        "block_1/GroupNorm_0/scale": scale.reshape(1, 1, 1, 3),
    }
    chex.assert_trees_all_equal(names.read(table, variables, there), variables)


def test_a_dense_layer_may_be_a_convolution_of_one_pixel_there():
    table = Table({"dense": "conv"})
    kernel = np.arange(12.0).reshape(3, 4)
    variables = {"params": {"dense": {"kernel": kernel}}}
    there = {"conv.weight": kernel.T.reshape(4, 3, 1, 1)}
    chex.assert_trees_all_equal(names.read(table, variables, there), variables)


def test_own_names_must_be_the_same_on_both_sides():
    ours = {"params/a": (2,), "params/b": (3,)}
    match = names.Ours().bind(ours, {"params/a": (5,), "params/c": (3,)})
    assert (match.missing, match.unmapped) == (("params/b",), ("params/c",))
    assert match.wrong == ("params/a (5,) for (2,)",)
