"""Swin Transformer V2, as transformers, timm and Microsoft publish it."""

import re
from collections.abc import Mapping
from typing import Any

from vit_jax.pretrained.families import swin
from vit_jax.pretrained.names import Leaf, Shapes, Table
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("swinv2",)
TARGETS = ("models.swin_v2.SwinV2",)

UNUSED = swin.UNUSED | {r".*\.relative_coords_table": "a constant of the window"}

_BLOCK = "stage_{i}/block_{j}/"
_HF = "encoder.layers.{i-1}.blocks.{j}."
_ATTENTION = _HF + "attention.self."
HF = Table(
    prefix="swinv2.",
    backbone={
        "embed": "embeddings.patch_embeddings.projection",
        "embed_norm": "embeddings.norm",
        "stage_{i}/merge/norm": "encoder.layers.{i-2}.downsample.norm",
        "stage_{i}/merge/reduction": "encoder.layers.{i-2}.downsample.reduction",
        _BLOCK + "norm1": _HF + "layernorm_before",
        _BLOCK + "norm2": _HF + "layernorm_after",
        _BLOCK + "mlp/fc1": _HF + "intermediate.dense",
        _BLOCK + "mlp/fc2": _HF + "output.dense",
        _BLOCK + "attention/query": _ATTENTION + "query",
        _BLOCK + "attention/key": _ATTENTION + "key",
        _BLOCK + "attention/value": _ATTENTION + "value",
        _BLOCK + "attention/logit_scale": Leaf(_ATTENTION + "logit_scale", trailing=2),
        _BLOCK + "attention/out": _HF + "attention.output.dense",
        _BLOCK + "position/fc1": _ATTENTION + "continuous_position_bias_mlp.0",
        _BLOCK + "position/fc2": _ATTENTION + "continuous_position_bias_mlp.2",
        "norm": "layernorm",
    },
    head={"head": "classifier"},
    unused=UNUSED | {r"(swinv2\.)?embeddings\.mask_token": "only pre-training hides patches"},
)

_MS = "layers.{i-1}.blocks.{j}.attn."
_ROWS = {
    # The projections have one matrix, but biases of their own, and the key has none.
    _BLOCK + "attention/query/bias": Leaf(_MS + "q_bias"),
    _BLOCK + "attention/value/bias": Leaf(_MS + "v_bias"),
    _BLOCK + "attention/logit_scale": Leaf(_MS + "logit_scale", trailing=2),
    _BLOCK + "position/fc1": _MS + "cpb_mlp.0",
    _BLOCK + "position/fc2": _MS + "cpb_mlp.2",
}
MICROSOFT = Table(swin.state_rows("{i-2}") | _ROWS, {"head": "head"}, unused=UNUSED)
TIMM = Table(swin.state_rows("{i-1}") | _ROWS, {"head": "head.fc"}, unused=UNUSED)


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what the model here cannot do."""
    fields = swin.hf_fields(config)
    size = config.get("image_size", 224)
    windows = tuple(config.get("pretrained_window_sizes") or ())
    fields["pretrained_window"] = windows if any(windows) else ()
    fields["image_size"] = size if isinstance(size, int) else tuple(size)
    return Recipe(
        origin="transformers",
        backbone={"target": TARGETS[0]} | fields,
        table=HF,
        num_classes=swin.classes(config, shapes),
        preprocessing=swin.squashed(size),
    )


def to_hf(backbone: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the backbone -> config.json; ConfigError if transformers has no such model."""
    size = backbone["image_size"]
    windows = backbone["pretrained_window"] or [0] * len(backbone["depths"])
    return (
        swin.hf_config("swinv2", "Swinv2", num_classes)
        | swin.hf_settings(backbone)
        | {
            "image_size": size if isinstance(size, int) else list(size),
            "pretrained_window_sizes": list(windows),
        }
    )


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """A state dict of timm or Microsoft -> a recipe; None if it is no Swin V2.

    The windows are not in the shapes of the parameters: the name tells them, or the constants
    that Microsoft's files hold.
    """
    first = "layers.0.blocks.0.attn.cpb_mlp.0.weight"
    if not {first, "patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.weight"} <= set(shapes):
        return None
    fields = swin.state_fields(shapes)
    stages = len(fields["depths"])
    fields["heads"] = tuple(
        shapes[f"layers.{stage}.blocks.0.attn.logit_scale"][0] for stage in range(stages)
    )
    remarks: tuple[str, ...] = ()
    window, size = _from_name(name)
    if not window:
        window, size = _from_constants(shapes, stages, fields["patch"])
    if not window:
        window, size = (0, 8), (0, 256)
        remarks = (
            "neither the file nor its name tells the windows: 8 pixels, for images of 256 pixels, "
            "are assumed; else give window=, image_size= and pretrained_window=",
        )
    before, after = window
    fields |= {"window": after, "image_size": size[1], "pretrained_window": ()}
    if before:
        sides = [size[0] // (fields["patch"] * 2**stage) for stage in range(stages)]
        fields["pretrained_window"] = tuple(min(before, side) for side in sides)
    origin = swin.dialect(shapes)
    return Recipe(
        origin=origin,
        backbone={"target": TARGETS[0]} | fields,
        table=TIMM if origin == "timm" else MICROSOFT,
        num_classes=swin.state_classes(shapes),
        preprocessing=swin.state_preprocessing(origin, size[1]),
        remarks=remarks,
    )


def _from_name(name: str) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """(window before and after, image before and after): `window12to16_192to256`; 0 is none."""
    found = re.search(r"window(?:(\d+)to)?(\d+)_(?:(\d+)to)?(\d+)", name)
    if not found:
        return None, (0, 0)
    window, later, image, side = (int(group or 0) for group in found.groups())
    return (window, later), (image or side, side)


def _from_constants(
    shapes: Shapes, stages: int, patch: int
) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """The same from the tables of offsets [1, 2M - 1, 2M - 1, 2] of the first and last stage.

    The last stage's window is its whole map in all published models. Of these, the one with
    windows of 24 was pre-trained with 12; of those with 16 some were, which nothing here tells.
    """
    names = [f"layers.{i}.blocks.0.attn.relative_coords_table" for i in (0, stages - 1)]
    if not all(name in shapes for name in names):
        return None, (0, 0)
    first, last = ((shapes[name][1] + 1) // 2 for name in names)
    side = last * patch * 2 ** (stages - 1)
    return ((12, first), (192, side)) if first == 24 else ((0, first), (0, side))
