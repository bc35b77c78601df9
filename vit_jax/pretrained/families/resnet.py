"""ResNet v1.5, as transformers, timm and torchvision publish it."""

import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import ConfigError
from vit_jax.pretrained.families import swin
from vit_jax.pretrained.names import Shapes, Table
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("resnet",)
TARGETS = ("models.resnet.ResNet",)

_BLOCK = "stage_{i}/block_{j}/"
_HF = "encoder.stages.{i-1}.layers.{j}."
HF = Table(
    prefix="resnet.",
    backbone={
        "root_conv": "embedder.embedder.convolution",
        "root_norm": "embedder.embedder.normalization",
        _BLOCK + "shortcut_conv": _HF + "shortcut.convolution",
        _BLOCK + "shortcut_norm": _HF + "shortcut.normalization",
        **{_BLOCK + f"conv{n}": _HF + f"layer.{n - 1}.convolution" for n in (1, 2, 3)},
        **{_BLOCK + f"norm{n}": _HF + f"layer.{n - 1}.normalization" for n in (1, 2, 3)},
    },
    head={"head": "classifier.1"},
)

TORCHVISION = Table(  # and timm
    backbone={
        "root_conv": "conv1",
        "root_norm": "bn1",
        _BLOCK + "shortcut_conv": "layer{i}.{j}.downsample.0",
        _BLOCK + "shortcut_norm": "layer{i}.{j}.downsample.1",
        **{_BLOCK + f"conv{n}": f"layer{{i}}.{{j}}.conv{n}" for n in (1, 2, 3)},
        **{_BLOCK + f"norm{n}": f"layer{{i}}.{{j}}.bn{n}" for n in (1, 2, 3)},
    },
    head={"head": "fc"},
)


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what the model here cannot do."""
    block = config.get("layer_type", "bottleneck")
    if block not in ("bottleneck", "basic"):
        raise ConfigError(f"config.json: layer_type={block!r} is not known here")
    width = config.get("embedding_size", 64)
    depths = tuple(config["depths"])
    channels = [width * (4 if block == "bottleneck" else 1) * 2**i for i in range(len(depths))]
    swin.demand(
        config,
        num_channels=3,
        hidden_act="relu",
        downsample_in_first_stage=False,
        downsample_in_bottleneck=False,
        hidden_sizes=channels,
    )
    return Recipe(
        origin="transformers",
        backbone={"target": TARGETS[0], "depths": depths, "block": block, "width": width},
        table=HF,
        num_classes=swin.classes(config, shapes, "classifier.1"),
        preprocessing=swin.cropped(224),
    )


def to_hf(backbone: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the backbone -> config.json; ConfigError if transformers has no such model."""
    for name, wanted in (("dilation", 1), ("epsilon", 1e-5)):
        if backbone[name] != wanted:
            raise ConfigError(f"{name}={backbone[name]}: transformers' ResNet has {wanted}")
    depths, block = backbone["depths"], backbone["block"]
    first = backbone["width"] * (4 if block == "bottleneck" else 1)
    return swin.hf_config("resnet", "ResNet", num_classes) | {
        "num_channels": 3,
        "embedding_size": backbone["width"],
        "hidden_sizes": [first * 2**i for i in range(len(depths))],
        "depths": list(depths),
        "layer_type": block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """A state dict of timm or torchvision -> a recipe; None if it is no ResNet.

    Raises:
      ConfigError: if it is one of another form: wide, grouped, with another root.
    """
    if not {"conv1.weight", "bn1.weight", "layer1.0.conv2.weight"} <= set(shapes):
        return None
    width, _, side, _ = shapes["conv1.weight"]
    features, inside = shapes["layer1.0.conv2.weight"][:2]
    if side != 7 or (features, inside) != (width, width):
        raise ConfigError(
            f"{name}: a ResNet whose root is {side}x{side} and whose first 3x3 has {features} "
            f"features, of {inside} each; only 7x7, then {width} of {width}, is known here"
        )
    blocks: dict[int, int] = {}
    for key in shapes:
        if found := re.match(r"layer(\d+)\.(\d+)\.", key):
            stage, block = int(found[1]), int(found[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    # torchvision's files end in the first digits of their hash, and names alone are timm's.
    ours = re.match(r"resnet\d+-[0-9a-f]{8}\b", name)
    return Recipe(
        origin="torchvision" if ours else "timm",
        backbone={
            "target": TARGETS[0],
            "depths": tuple(blocks[stage] for stage in sorted(blocks)),
            "block": "bottleneck" if "layer1.0.conv3.weight" in shapes else "basic",
            "width": width,
        },
        table=TORCHVISION,
        num_classes=shapes.get("fc.weight", (0,))[0],
        preprocessing=swin.cropped(224, interpolation="bilinear"),
    )
