"""BEiT after fine-tuning, as transformers, timm and Microsoft publish it."""

from collections.abc import Mapping
from typing import Any

from vit_jax.errors import ConfigError
from vit_jax.pretrained.families import swin, vit
from vit_jax.pretrained.names import Leaf, Shapes, Table
from vit_jax.pretrained.preprocess import HALF, standardize
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("beit",)
TARGETS = ("models.beit.Beit",)

_TABLE = "relative_position_bias.relative_position_bias_table"
_OLD, _NEW = "encoder.layer.{i}.", "layers.{i}."
UNUSED = {
    r".*\.relative_position_index": "a constant of the grid",
    r"(beit\.)?(embeddings\.)?mask_token": vit.MASK_TOKEN,
}
HF = Table(
    {
        "embed/proj": "embeddings.patch_embeddings.projection",
        "class_token": Leaf("embeddings.cls_token"),
        **{
            f"block_{{i}}/attention/{part}": (
                _OLD + f"attention.attention.{part}",
                _NEW + f"attention.{part[0]}_proj",
            )
            for part in vit.PARTS
        },
        "block_{i}/attention/out": (_OLD + "attention.output.dense", _NEW + "attention.o_proj"),
        "block_{i}/relative_position_bias": Leaf(
            (_OLD + "attention.attention." + _TABLE, _NEW + _TABLE)
        ),
        "block_{i}/norm1": (_OLD + "layernorm_before", _NEW + "layernorm_before"),
        "block_{i}/norm2": (_OLD + "layernorm_after", _NEW + "layernorm_after"),
        "block_{i}/layer_scale1/gamma": Leaf((_OLD + "lambda_1", _NEW + "lambda_1")),
        "block_{i}/layer_scale2/gamma": Leaf((_OLD + "lambda_2", _NEW + "lambda_2")),
        "block_{i}/mlp/fc1": (_OLD + "intermediate.dense", _NEW + "mlp.fc1"),
        "block_{i}/mlp/fc2": (_OLD + "output.dense", _NEW + "mlp.fc2"),
        "norm": "pooler.layernorm",
    },
    {"head": "classifier"},
    prefix="beit.",
    unused=UNUSED,
)
# One matrix for query, key and value, but biases of their own, and none for the key.
STATE = Table(
    {
        **vit.STATE_ROWS,
        "block_{i}/attention/query/bias": Leaf("blocks.{i}.attn.q_bias"),
        "block_{i}/attention/value/bias": Leaf("blocks.{i}.attn.v_bias"),
        "block_{i}/relative_position_bias": Leaf("blocks.{i}.attn.relative_position_bias_table"),
        "block_{i}/layer_scale1/gamma": Leaf("blocks.{i}.gamma_1"),
        "block_{i}/layer_scale2/gamma": Leaf("blocks.{i}.gamma_2"),
        "norm": "fc_norm",
    },
    {"head": "head"},
    unused=UNUSED,
)


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what Beit here cannot do."""
    fields = vit.hf_fields(config, 1e-12)
    if not config.get("use_relative_position_bias", False):
        raise ConfigError(
            "config.json: use_relative_position_bias is off: BEiT here, as it is fine-tuned, has a "
            "table of positions in each block; one shared table is pre-training's"
        )
    swin.demand(
        config,
        use_absolute_position_embeddings=False,
        use_shared_relative_position_bias=False,
        use_mean_pooling=True,
    )
    scale = float(config.get("layer_scale_init_value", 0.1))
    fields |= {
        "mlp_ratio": vit.mlp_ratio(config["intermediate_size"], config["hidden_size"]),
        "layer_scale": scale if scale > 0 else None,
        "drop_path": float(config.get("drop_path_rate", 0.1)),
        "position_resize": "bilinear_torch",
    }
    return Recipe(
        origin="transformers",
        backbone={"target": TARGETS[0]} | fields,
        table=HF,
        num_classes=swin.classes(config, shapes),
        preprocessing=vit.squashed(fields["image_size"], "bicubic"),
    )


def to_hf(backbone: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the backbone -> config.json."""
    settings = vit.hf_settings(backbone, {})
    return (
        swin.hf_config("beit", "Beit", num_classes)
        | settings
        | {
            "intermediate_size": int(backbone["width"] * backbone["mlp_ratio"]),
            "layer_scale_init_value": backbone["layer_scale"] or 0.0,
            "drop_path_rate": backbone["drop_path"],
            "use_relative_position_bias": True,
            "use_shared_relative_position_bias": False,
            "use_absolute_position_embeddings": False,
            "use_mean_pooling": True,
        }
    )


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """A state dict of timm or Microsoft -> a recipe; None if it is no BEiT.

    Raises:
      ConfigError: if it is a BEiT that is not fine-tuned.
    """
    if not {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "cls_token"} <= set(shapes):
        return None
    if "rel_pos_bias.relative_position_bias_table" in shapes:
        raise ConfigError(f"{name}: one table of positions for all blocks is pre-training's")
    first = shapes.get("blocks.0.attn.relative_position_bias_table")
    if first is None or "fc_norm.weight" not in shapes:
        return None
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    depth = sum(n.endswith("attn.relative_position_bias_table") for n in shapes)
    rows, heads = first
    side = (round((rows - 3) ** 0.5) + 1) // 2
    if (2 * side - 1) ** 2 + 3 != rows:
        raise ConfigError(f"{name}: its tables of {rows} positions are of no square grid")
    size = side * patch
    # Microsoft keeps a constant in each block that timm leaves out.
    microsoft = any(n.endswith(".relative_position_index") for n in shapes)
    crop = (0.875 if microsoft else 0.9) if size < 384 else 1.0
    return Recipe(
        origin="Microsoft" if microsoft else "timm",
        backbone={
            "target": TARGETS[0],
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": vit.mlp_ratio(shapes["blocks.0.mlp.fc1.weight"][0], width),
            "image_size": size,
            "activation": "gelu",
            "epsilon": 1e-6,
            "layer_scale": 0.1 if "blocks.0.gamma_1" in shapes else None,
        },
        table=STATE,
        num_classes=shapes.get("head.weight", (0,))[0],
        preprocessing=(swin.cropped(size, crop)[0], standardize(HALF, HALF)),
    )
