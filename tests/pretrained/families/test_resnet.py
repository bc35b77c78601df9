from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.build import build
from vit_jax.errors import ConfigError
from vit_jax.models.classifier import Classifier
from vit_jax.models.resnet import ResNet
from vit_jax.pretrained import names
from vit_jax.pretrained.families import resnet
from vit_jax.pretrained.opened import backbone_fields

TINY = {
    "bottleneck": ResNet(width=4, depths=(1, 2)),
    "basic": ResNet(width=4, depths=(1, 2), block="basic"),
}


def random_variables(model):
    pixels = jax.ShapeDtypeStruct((1, 16, 24, 3), jnp.float32)
    init = partial(Classifier(model, 5).init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), pixels)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), dict(shapes))


@pytest.mark.parametrize("block", TINY)
@pytest.mark.parametrize("table", [resnet.HF, resnet.TORCHVISION], ids=["HF", "TORCHVISION"])
def test_what_is_written_is_read_back(block, table):
    variables = random_variables(TINY[block])
    state = dict(names.write(table, variables)) | {"bn1.num_batches_tracked": np.zeros(())}
    again = names.read(table, variables, state)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_names_are_those_of_torchvision():
    state = dict(names.write(resnet.TORCHVISION, random_variables(TINY["bottleneck"])))
    assert state["conv1.weight"].shape == (4, 3, 7, 7)
    assert state["layer2.0.conv2.weight"].shape == (8, 8, 3, 3)
    assert state["layer2.0.downsample.0.weight"].shape == (32, 16, 1, 1)
    assert state["layer2.0.downsample.1.running_var"].shape == (32,)
    assert state["layer2.1.bn3.running_mean"].shape == (32,)
    assert state["fc.weight"].shape == (5, 32)


def test_a_frozen_backbone_reads_the_same_file():
    state = dict(names.write(resnet.TORCHVISION, random_variables(TINY["basic"])))
    frozen = random_variables(TINY["basic"].clone(norm="frozen"))
    found = names.read(resnet.TORCHVISION, frozen, state)
    scale = found["batch_stats"]["backbone"]["root_norm"]["scale"]
    np.testing.assert_array_equal(scale, state["bn1.weight"])


@pytest.mark.parametrize("block", TINY)
@pytest.mark.parametrize(
    ("name", "origin"), [("resnet50.a1_in1k", "timm"), ("resnet50-0676ba61.pth", "torchvision")]
)
def test_a_state_dict_is_recognised_by_its_shapes(block, name, origin):
    state = dict(names.write(resnet.TORCHVISION, random_variables(TINY[block])))
    recipe = resnet.from_state({k: v.shape for k, v in state.items()}, name)
    assert (recipe.origin, recipe.num_classes) == (origin, 5)
    assert build(recipe.backbone) == TINY[block]


def test_other_networks_are_left_to_others_and_other_resnets_refused():
    assert resnet.from_state({"patch_embed.proj.weight": (8, 3, 4, 4)}, "vit") is None
    state = dict(names.write(resnet.TORCHVISION, random_variables(TINY["bottleneck"])))
    shapes = {k: v.shape for k, v in state.items()}
    grouped = shapes | {"layer1.0.conv2.weight": (4, 1, 3, 3)}
    with pytest.raises(ConfigError, match="first 3x3 has 4 features, of 1 each"):
        resnet.from_state(grouped, "resnext50")
    with pytest.raises(ConfigError, match="root is 3x3"):
        resnet.from_state(shapes | {"conv1.weight": (4, 3, 3, 3)}, "resnet26t")


@pytest.mark.parametrize("block", TINY)
def test_a_config_goes_there_and_back(block):
    config = resnet.to_hf(backbone_fields(TINY[block]), 5)
    assert config["hidden_sizes"] == ([16, 32] if block == "bottleneck" else [4, 8])
    recipe = resnet.from_hf(config, {})
    assert (build(recipe.backbone), recipe.num_classes) == (TINY[block], 5)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"downsample_in_bottleneck": True}, "downsample_in_bottleneck=True is not known here"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not known here, only 'relu'"),
        ({"hidden_sizes": [16, 48]}, r"hidden_sizes=\[16, 48\]"),
        ({"layer_type": "other"}, "layer_type='other' is not known here"),
    ],
)
def test_settings_that_are_not_here_are_refused(setting, said):
    config = resnet.to_hf(backbone_fields(TINY["bottleneck"]), 5) | setting
    with pytest.raises(ConfigError, match=said):
        resnet.from_hf(config, {})


def test_a_dilated_network_has_no_config_there():
    with pytest.raises(ConfigError, match="dilation=2: transformers' ResNet has 1"):
        resnet.to_hf(backbone_fields(TINY["basic"].clone(dilation=2)), 5)
