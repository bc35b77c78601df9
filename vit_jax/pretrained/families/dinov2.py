"""DINOv2, with and without registers, as transformers, timm and Facebook publish it."""

from collections.abc import Mapping
from typing import Any

from vit_jax.errors import ConfigError
from vit_jax.pretrained.families import swin, vit
from vit_jax.pretrained.names import Leaf, Shapes, Table
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("dinov2", "dinov2_with_registers")
TARGETS = vit.TARGETS
SIZE = 224  # of the published preprocessing; positions are made for 518 pixels

_HF = "encoder.layer.{i}."
_HF_ROWS = {
    "embed/proj": "embeddings.patch_embeddings.projection",
    "class_token": Leaf("embeddings.cls_token"),
    "register_token": Leaf("embeddings.register_tokens"),
    vit.POSITIONS: Leaf("embeddings.position_embeddings", leading=1),
    **{
        f"block_{{i}}/attention/{part}": (
            _HF + f"attention.attention.{part}",
            _HF + f"attention.{part[0]}_proj",
        )
        for part in vit.PARTS
    },
    "block_{i}/attention/out": (_HF + "attention.output.dense", _HF + "attention.o_proj"),
    "block_{i}/norm1": _HF + "norm1",
    "block_{i}/norm2": _HF + "norm2",
    "block_{i}/layer_scale1/gamma": Leaf(_HF + "layer_scale1.lambda1"),
    "block_{i}/layer_scale2/gamma": Leaf(_HF + "layer_scale2.lambda1"),
    "block_{i}/mlp/fc1": _HF + "mlp.fc1",
    "block_{i}/mlp/fc2": _HF + "mlp.fc2",
    "block_{i}/mlp/down": (_HF + "mlp.weights_out", _HF + "mlp.down_proj"),
    "norm": "layernorm",
}
# transformers once kept both layers of a gated MLP in one, and still writes files so.
_JOINED = {("block_{i}/mlp/gate", "block_{i}/mlp/up"): _HF + "mlp.weights_in"}
_APART = {
    "block_{i}/mlp/gate": _HF + "mlp.gate_proj",
    "block_{i}/mlp/up": _HF + "mlp.up_proj",
}
_UNUSED = {r"(.*\.)?mask_token": vit.MASK_TOKEN}
STATE = Table(vit.STATE_ROWS, {"head": "head"}, unused=_UNUSED)


def hf_table(kind: str, apart: bool = False) -> Table:
    """The names of one of `HF_TYPES`; `apart` where a gated MLP's layers are."""
    rows = _HF_ROWS | (_APART if apart else _JOINED)
    return Table(rows, {"head": "classifier"}, prefix=f"{kind}.", unused=_UNUSED)


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what ViT here cannot do."""
    kind, fields = config["model_type"], vit.hf_fields(config, 1e-6)
    registers = config.get("num_register_tokens", 4) if kind != HF_TYPES[0] else 0
    classes = swin.classes(config, shapes)
    fields |= {
        "mlp_ratio": float(config.get("mlp_ratio", 4)),
        "feed_forward": "swiglu" if config.get("use_swiglu_ffn", False) else "mlp",
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "layer_scale": float(config.get("layerscale_value", 1.0)),
        "drop_path": float(config.get("drop_path_rate", 0.0)),
        "registers": registers,
        "pooling": "token+mean" if classes else "token",
        # Only the version with registers averages where it shrinks.
        "position_resize": _resize(kind),
    }
    return Recipe(
        origin="transformers",
        backbone={"target": TARGETS[0]} | fields,
        table=hf_table(kind, any(".mlp.gate_proj." in name for name in shapes)),
        num_classes=classes,
        preprocessing=swin.cropped(SIZE),
    )


def _resize(kind: str) -> str:
    return "bicubic_torch" if kind == HF_TYPES[0] else "bicubic"


def to_hf(backbone: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the backbone -> config.json; ConfigError if transformers has no such model."""
    if backbone["layer_scale"] is None:
        raise ConfigError("layer_scale=None: transformers' DINOv2 always has gains")
    kind = HF_TYPES[bool(backbone["registers"])]
    settings = vit.hf_settings(
        backbone,
        {
            "pooling": "token+mean" if num_classes else "token",
            "distilled": False,
            "positions": "learned",
            "class_position": True,
            "patch_bias": True,
            "pre_norm": False,
            "position_resize": _resize(kind),
            "stem": None,
        },
    )
    ratio = backbone["mlp_ratio"]
    if ratio != int(ratio):
        raise ConfigError(f"mlp_ratio={ratio}: transformers' DINOv2 has whole numbers only")
    settings |= {
        "mlp_ratio": int(ratio),
        "use_swiglu_ffn": backbone["feed_forward"] == "swiglu",
        "qkv_bias": backbone["qkv_bias"],
        "layerscale_value": backbone["layer_scale"],
        "drop_path_rate": backbone["drop_path"],
    }
    if backbone["registers"]:
        settings["num_register_tokens"] = backbone["registers"]
    else:
        settings["use_mask_token"] = False
    model = "Dinov2WithRegisters" if backbone["registers"] else "Dinov2"
    return swin.hf_config(kind, model, num_classes) | settings


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """A state dict of timm or Facebook -> a recipe; None if it is no DINOv2."""
    needed = {"patch_embed.proj.weight", "pos_embed", "blocks.0.ls1.gamma", "cls_token"}
    if not needed <= set(shapes):
        return None
    facebook = "mask_token" in shapes
    registers = {"reg_token", "register_tokens"} & set(shapes)
    if not facebook and "dinov2" not in name:
        # DeiT III has as many pixels in a patch in one size, and no position for its class token.
        square = round(shapes["pos_embed"][1] ** 0.5) ** 2 == shapes["pos_embed"][1]
        if shapes["patch_embed.proj.weight"][2] != 14 or (square and not registers):
            return None
    fields, remarks = vit.state_fields(shapes, name)
    if facebook:
        fields["position_resize"] = "bicubic" if registers else "bicubic_dinov2"
    return Recipe(
        origin="Facebook" if facebook else "timm",
        backbone={"target": TARGETS[0]} | fields,
        table=STATE,
        num_classes=shapes.get("head.weight", (0,))[0],
        preprocessing=swin.cropped(SIZE),
        remarks=remarks,
    )
