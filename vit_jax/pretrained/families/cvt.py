"""CvT, as transformers and Microsoft publish it."""

import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import ConfigError
from vit_jax.pretrained.families import swin
from vit_jax.pretrained.names import Leaf, Shapes, Table
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("cvt",)
TARGETS = ("models.cvt.CvT",)
PARTS = ("query", "key", "value")

_BLOCK = "stage_{i}/block_{j}/"


def _spelled(name: str) -> tuple[str, str]:
    """In a classifier and alone. The last norm is outside, so that a table's prefix is too much."""
    return "cvt." + name, name


def _hf_block(name: str) -> tuple[str, str]:
    return _spelled("encoder.stages.{i-1}.layers.{j}." + name)


_HF_STAGE = "encoder.stages.{i-1}.embedding.convolution_embeddings."
_HF_CONV = "attention.attention.convolution_projection_{}.convolution_projection."
HF = Table(
    backbone={
        "stage_{i}/embed": _spelled(_HF_STAGE + "projection"),
        "stage_{i}/embed_norm": _spelled(_HF_STAGE + "normalization"),
        "stage_{i}/class_token": Leaf(_spelled("encoder.stages.{i-1}.cls_token")),
        _BLOCK + "norm1": _hf_block("layernorm_before"),
        _BLOCK + "norm2": _hf_block("layernorm_after"),
        _BLOCK + "mlp/fc1": _hf_block("intermediate.dense"),
        _BLOCK + "mlp/fc2": _hf_block("output.dense"),
        _BLOCK + "attention/out": _hf_block("attention.output.dense"),
        **{
            _BLOCK + f"attention/{part}": _hf_block(f"attention.attention.projection_{part}")
            for part in PARTS
        },
        **{
            _BLOCK + f"conv_{part}/conv": _hf_block(_HF_CONV.format(part) + "convolution")
            for part in PARTS
        },
        **{
            _BLOCK + f"conv_{part}/norm": _hf_block(_HF_CONV.format(part) + "normalization")
            for part in PARTS
        },
        "norm": "layernorm",
    },
    head={"head": "classifier"},
)

_MS = "stage{i-1}.blocks.{j}."
MICROSOFT = Table(
    backbone={
        "stage_{i}/embed": "stage{i-1}.patch_embed.proj",
        "stage_{i}/embed_norm": "stage{i-1}.patch_embed.norm",
        "stage_{i}/class_token": Leaf("stage{i-1}.cls_token"),
        _BLOCK + "norm1": _MS + "norm1",
        _BLOCK + "norm2": _MS + "norm2",
        _BLOCK + "mlp/fc1": _MS + "mlp.fc1",
        _BLOCK + "mlp/fc2": _MS + "mlp.fc2",
        _BLOCK + "attention/out": _MS + "attn.proj",
        **{_BLOCK + f"attention/{part}": _MS + f"attn.proj_{part[0]}" for part in PARTS},
        **{_BLOCK + f"conv_{part}/conv": _MS + f"attn.conv_proj_{part[0]}.conv" for part in PARTS},
        **{_BLOCK + f"conv_{part}/norm": _MS + f"attn.conv_proj_{part[0]}.bn" for part in PARTS},
        "norm": "norm",
    },
    head={"head": "head"},
)


def _same(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """The one value that all stages share; ConfigError if they do not."""
    values = list(config.get(name) or [default])
    if any(value != values[0] for value in values):
        raise ConfigError(f"config.json: {name}={values}: CvT here has one for all stages")
    return values[0]


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what the model here cannot do."""
    widths = tuple(config.get("embed_dim", (64, 192, 384)))
    stages = len(widths)
    # Its `layer_norm_eps` is used nowhere there: all norms have PyTorch's.
    swin.demand(
        config,
        num_channels=3,
        qkv_bias=[True] * stages,
        cls_token=[False] * (stages - 1) + [True],
        qkv_projection_method=["dw_bn"] * stages,
        kernel_qkv=[3] * stages,
        padding_kv=[1] * stages,
        padding_q=[1] * stages,
        stride_q=[1] * stages,
    )
    rates = list(config.get("drop_path_rate") or [0.0])
    return Recipe(
        origin="transformers",
        backbone={
            "target": TARGETS[0],
            "widths": widths,
            "depths": tuple(config.get("depth", (1, 2, 10))),
            "heads": tuple(config.get("num_heads", (1, 3, 6))),
            "kernels": tuple(config.get("patch_sizes", (7, 3, 3))),
            "strides": tuple(config.get("patch_stride", (4, 2, 2))),
            "paddings": tuple(config.get("patch_padding", (2, 1, 1))),
            "key_stride": _same(config, "stride_kv", 2),
            "mlp_ratio": float(_same(config, "mlp_ratio", 4.0)),
            "activation": "gelu",
            "epsilon": 1e-5,
            "drop_path": float(rates[-1]),
            "dropout": float(_same(config, "drop_rate", 0.0)),
            "attention_dropout": float(_same(config, "attention_drop_rate", 0.0)),
        },
        table=HF,
        num_classes=swin.classes(config, shapes),
        preprocessing=swin.cropped(224),
        remarks=(
            "activation='gelu' as transformers computes; the authors trained with 'quick_gelu'",
        ),
    )


def to_hf(backbone: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the backbone -> config.json; ConfigError if transformers has no such model."""
    for name, wanted in (("activation", "gelu"), ("epsilon", 1e-5)):
        if backbone[name] != wanted:
            raise ConfigError(f"{name}={backbone[name]!r}: transformers' CvT always has {wanted!r}")
    if any(depth != 1 for depth in backbone["embed_depths"]):
        depths = tuple(backbone["embed_depths"])
        raise ConfigError(
            f"embed_depths={depths}: transformers' CvT embeds by one convolution each"
        )
    if not num_classes:
        raise ConfigError("transformers' CvT has its last norm in the classifier: no head, no norm")
    stages = len(backbone["widths"])
    return swin.hf_config("cvt", "Cvt", num_classes) | {
        "num_channels": 3,
        "embed_dim": list(backbone["widths"]),
        "depth": list(backbone["depths"]),
        "num_heads": list(backbone["heads"]),
        "patch_sizes": list(backbone["kernels"]),
        "patch_stride": list(backbone["strides"]),
        "patch_padding": list(backbone["paddings"]),
        "mlp_ratio": [backbone["mlp_ratio"]] * stages,
        "drop_path_rate": [0.0] * (stages - 1) + [backbone["drop_path"]],
        "drop_rate": [backbone["dropout"]] * stages,
        "attention_drop_rate": [backbone["attention_dropout"]] * stages,
        "qkv_bias": [True] * stages,
        "cls_token": [False] * (stages - 1) + [True],
        "qkv_projection_method": ["dw_bn"] * stages,
        "kernel_qkv": [3] * stages,
        "padding_kv": [1] * stages,
        "stride_kv": [backbone["key_stride"]] * stages,
        "padding_q": [1] * stages,
        "stride_q": [1] * stages,
    }


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """Microsoft's state dict -> a recipe; None if it is no CvT.

    The shapes do not tell the heads, nor strides and padding: they are the published ones.
    """
    if "stage0.blocks.0.attn.conv_proj_q.conv.weight" not in shapes:
        return None
    depths: dict[int, int] = {}
    for key in shapes:
        if found := re.match(r"stage(\d+)\.blocks\.(\d+)\.", key):
            stage, block = int(found[1]), int(found[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
    embeds = [shapes[f"stage{stage}.patch_embed.proj.weight"] for stage in sorted(depths)]
    widths = tuple(shape[0] for shape in embeds)
    if any(width % 64 for width in widths):
        raise ConfigError(
            f"{name}: widths {widths} are of no published CvT: heads have 64 channels"
        )
    hidden = shapes["stage0.blocks.0.mlp.fc1.weight"][0]
    size = re.search(r"(\d{3})x\1", name)
    side = int(size[1]) if size else 224
    return Recipe(
        origin="Microsoft",
        backbone={
            "target": TARGETS[0],
            "widths": widths,
            "depths": tuple(depths[stage] for stage in sorted(depths)),
            "heads": tuple(width // 64 for width in widths),
            "kernels": tuple(shape[2] for shape in embeds),
            "strides": (4, 2, 2)[: len(widths)],
            "paddings": (2, 1, 1)[: len(widths)],
            "key_stride": 2,
            "mlp_ratio": hidden / widths[0],
            "activation": "quick_gelu",
            "epsilon": 1e-5,
        },
        table=MICROSOFT,
        num_classes=shapes.get("head.weight", (0,))[0],
        preprocessing=swin.squashed(side) if side >= 384 else swin.cropped(side),
        remarks=("heads are not in the file: 64 channels each, as published",),
    )
