"""Models that restore hidden patches, as transformers publishes them: ViT-MAE, and the masked
image models of ViT, Swin and BEiT.
"""

from collections.abc import Mapping
from typing import Any

from vit_jax.errors import ConfigError, nearest
from vit_jax.pretrained.families import beit, swin, vit
from vit_jax.pretrained.names import Leaf, Row, Shapes, Table
from vit_jax.pretrained.preprocess import HALF, IMAGENET
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("vit_mae",)
# Of a type that another family has: only with this model on it.
HF_CLASSES = (
    "ViTForMaskedImageModeling",
    "SwinForMaskedImageModeling",
    "BeitForMaskedImageModeling",
)
TARGETS = ("models.masked.MAE", "models.masked.SimMIM", "models.masked.MaskedPatches")
MAE, SIMMIM, PATCHES = TARGETS
# What SimMIM and BEiT hide of a picture, where a file does not say: squares, and their share.
SQUARE, SIMMIM_RATIO, BEIT_RATIO = 32, 0.6, 0.4


def _below(prefix: str, rows: Mapping) -> dict:
    """Rows whose names start with `prefix`."""

    def longer(row: Row) -> Row:
        if isinstance(row, Leaf):
            return Leaf(longer(row.name), row.leading, row.trailing)
        return prefix + row if isinstance(row, str) else tuple(prefix + name for name in row)

    return {ours: longer(row) for ours, row in rows.items()}


# The Hub's spelling, what transformers 5 writes, and what it calls them in memory.
_LAYERS = ("decoder_layers.{i}.", "decoder_encoder.layer.{i}.")


def _layer(old: str, new: str = "") -> tuple[str, ...]:
    names = [layer + old for layer in _LAYERS] + [_LAYERS[0] + (new or old)]
    return tuple("decoder." + name for name in names)


MAE_TABLE = Table(
    vit.HF.backbone,
    {
        "mask_token": Leaf("decoder.mask_token", leading=2),
        "decoder/embed": "decoder.decoder_embed",
        tuple(f"decoder/{path}" for path in vit.POSITIONS): Leaf(
            "decoder.decoder_pos_embed", leading=1
        ),
        **{
            f"decoder/block_{{i}}/attention/{part}": _layer(
                f"attention.attention.{part}", f"attention.{part[0]}_proj"
            )
            for part in vit.PARTS
        },
        "decoder/block_{i}/attention/out": _layer("attention.output.dense", "attention.o_proj"),
        "decoder/block_{i}/norm1": _layer("layernorm_before"),
        "decoder/block_{i}/norm2": _layer("layernorm_after"),
        "decoder/block_{i}/mlp/fc1": _layer("intermediate.dense", "mlp.fc1"),
        "decoder/block_{i}/mlp/fc2": _layer("output.dense", "mlp.fc2"),
        "decoder/norm": "decoder.decoder_norm",
        "decoder/predict": "decoder.decoder_pred",
    },
    prefix="vit.",
)


def _simmim(prefix: str, rows: Mapping, unused: Mapping[str, str]) -> Table:
    head = {
        "mask_token": Leaf(prefix + "embeddings.mask_token", leading=2),
        "decoder": Leaf("decoder.0", trailing=2),
    }
    return Table(_below(prefix, rows), head, unused=unused)


VIT_TABLE = _simmim("vit.", vit.HF.backbone, {})
SWIN_TABLE = _simmim(
    "swin.", swin.HF.backbone, {r".*\.relative_position_index": "a constant of the window"}
)
_SHARED = "relative_position_bias.relative_position_bias_table"
BEIT_TABLE = Table(
    _below(
        "beit.",
        {k: row for k, row in beit.HF.backbone.items() if k not in ("norm",)}
        | {
            "relative_position_bias": Leaf(
                ("encoder." + _SHARED, _SHARED.replace("relative", "shared", 1))
            )
        },
    )
    | {"norm": "layernorm"},  # the head's there
    {
        "mask_token": Leaf("beit.embeddings.mask_token", leading=2),
        "decoder": "lm_head",
    },
    unused={r".*\.relative_position_index": "a constant of the grid"},
)


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what the models here cannot do."""
    kind = config["model_type"]
    if kind == "vit_mae":
        return _mae(config, shapes)
    return {"vit": _of_vit, "swin": _of_swin, "beit": _of_beit}[kind](config)


def _mae(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    fields = vit.hf_fields(config, 1e-12) | {
        "mlp_ratio": vit.mlp_ratio(config["intermediate_size"], config["hidden_size"]),
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "pooling": "token",
        "position_resize": "bicubic_torch",
    }
    whole = "decoder.decoder_pred.weight" in shapes
    if not shapes:
        whole = "ViTMAEForPreTraining" in (config.get("architectures") or ())
    backbone = {"target": vit.TARGETS[0]} | fields
    shared = {"preprocessing": vit.squashed(fields["image_size"], "bicubic")}
    if not whole:
        return Recipe("transformers", backbone, vit.HF, 0, **shared)
    ratio = config.get("mask_ratio", 0.75)
    return Recipe(
        origin="transformers",
        backbone=backbone,
        table=MAE_TABLE,
        num_classes=None,
        classifier={
            "target": MAE,
            "ratio": ratio,
            "decoder_width": config["decoder_hidden_size"],
            "decoder_depth": config["decoder_num_hidden_layers"],
            "decoder_heads": config["decoder_num_attention_heads"],
            "decoder_hidden": config["decoder_intermediate_size"],
            "positions": "learned",
        },
        task=_pixels("l2", bool(config.get("norm_pix_loss", False))),
        beside=(_hidden(fields["patch"], ratio),),
        **shared,
    )


def _of_vit(config: Mapping[str, Any]) -> Recipe:
    backbone = vit.from_hf(config, {}).backbone
    return _with_one_layer(config, backbone, VIT_TABLE, vit.squashed(backbone["image_size"]))


def _of_swin(config: Mapping[str, Any]) -> Recipe:
    backbone = swin.from_hf(config, {}).backbone | {"norm_map": True}
    stride = backbone["patch"] * 2 ** (len(backbone["depths"]) - 1)
    swin.demand(config, encoder_stride=stride)
    size = config.get("image_size", 224)
    return _with_one_layer(config, backbone, SWIN_TABLE, swin.squashed(size))


def _with_one_layer(
    config: Mapping[str, Any], backbone: dict[str, Any], table: Table, preprocessing: tuple
) -> Recipe:
    if config["model_type"] == "vit":
        swin.demand(config, encoder_stride=backbone["patch"])
    patch, size = backbone["patch"], config.get("image_size", 224)
    sides = (size, size) if isinstance(size, int) else size
    square = SQUARE if all(n % SQUARE == 0 for n in sides) and SQUARE % patch == 0 else patch
    return Recipe(
        origin="transformers",
        backbone=backbone,
        table=table,
        num_classes=None,
        classifier={"target": SIMMIM},
        preprocessing=preprocessing,
        task=_pixels("l1", False),
        beside=(_hidden(patch, SIMMIM_RATIO, square),),
    )


def _of_beit(config: Mapping[str, Any]) -> Recipe:
    swin.demand(
        config,
        use_absolute_position_embeddings=False,
        use_relative_position_bias=False,
        use_shared_relative_position_bias=True,
        use_mean_pooling=True,
    )
    scale = float(config.get("layer_scale_init_value", 0.1))
    fields = vit.hf_fields(config, 1e-12) | {
        "mlp_ratio": vit.mlp_ratio(config["intermediate_size"], config["hidden_size"]),
        "layer_scale": scale if scale > 0 else None,
        "drop_path": float(config.get("drop_path_rate", 0.1)),
        "position_resize": "bilinear_torch",
        "shared_positions": True,
        "pooling": "mean",
    }
    return Recipe(
        origin="transformers",
        backbone={"target": beit.TARGETS[0]} | fields,
        table=BEIT_TABLE,
        num_classes=None,
        classifier={"target": PATCHES, "classes": config.get("vocab_size", 8192)},
        preprocessing=vit.squashed(fields["image_size"], "bicubic"),
        task={"target": "tasks.masked.MaskedColours", "mean": HALF, "std": HALF},
        beside=(_hidden(fields["patch"], BEIT_RATIO),),
    )


def _pixels(loss: str, normalized: bool) -> dict[str, Any]:
    task = {"target": "tasks.masked.MaskedPixels", "loss": loss, "normalized": normalized}
    return task | dict(zip(("mean", "std"), IMAGENET, strict=True))


def _hidden(patch: int, ratio: float, unit: int = 0) -> dict[str, Any]:
    return {"target": "data.patches.HidePatches", "patch": patch, "ratio": ratio, "unit": unit}


def to_hf(model: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the whole model -> config.json; ConfigError if transformers has no such model."""
    backbone = model["backbone"]
    kinds = {
        (MAE, vit.TARGETS[0]): _to_mae,
        (SIMMIM, vit.TARGETS[0]): _to_vit,
        (SIMMIM, swin.TARGETS[0]): _to_swin,
        (PATCHES, beit.TARGETS[0]): _to_beit,
    }
    pair = (model["target"], backbone["target"])
    if pair not in kinds:
        some = [f"{of} on {on}" for of, on in kinds]
        raise ConfigError(
            f"transformers has no {pair[0]} on {pair[1]}.{nearest(' on '.join(pair), some)}"
        )
    return kinds[pair](model, backbone)


def _to_mae(model: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    if backbone["positions"] != "learned" or model["positions"] != "learned":
        raise ConfigError(
            "positions='sincos': transformers' ViT-MAE keeps its positions in the file, here they "
            "are fixed"
        )
    settings = vit.to_hf(backbone, 0)
    settings.pop("architectures")
    return settings | {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "mask_ratio": model["ratio"],
        "decoder_hidden_size": model["decoder_width"],
        "decoder_num_hidden_layers": model["decoder_depth"],
        "decoder_num_attention_heads": model["decoder_heads"],
        "decoder_intermediate_size": model["decoder_hidden"],
    }


def _to_vit(model: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    settings = vit.to_hf(backbone, 0) | {"encoder_stride": backbone["patch"]}
    return settings | {"architectures": [HF_CLASSES[0]]}


def _to_swin(model: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    if not backbone["norm_map"]:
        raise ConfigError("norm_map=False: transformers' masked Swin reads the normalised map")
    stride = backbone["patch"] * 2 ** (len(backbone["depths"]) - 1)
    settings = swin.to_hf(backbone, 0) | {"encoder_stride": stride}
    return settings | {"architectures": [HF_CLASSES[1]]}


def _to_beit(model: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    if not backbone["shared_positions"] or backbone["pooling"] != "mean":
        raise ConfigError(
            "transformers' masked BEiT shares its positions among the blocks and normalises the "
            "tokens: shared_positions=True and pooling='mean'"
        )
    settings = beit.to_hf(backbone, 0) | {
        "architectures": [HF_CLASSES[2]],
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": True,
        "use_mask_token": True,
        "vocab_size": model["classes"],
    }
    return settings


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """No state dict of another publisher: None."""
    return None
