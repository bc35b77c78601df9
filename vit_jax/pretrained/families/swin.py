"""Swin Transformer, as transformers, timm and Microsoft publish it."""

import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import ConfigError, nearest
from vit_jax.pretrained.names import Leaf, Shapes, Table
from vit_jax.pretrained.preprocess import IMAGENET, standardize, step
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("swin",)
TARGETS = ("models.swin.Swin",)

# What transformers calls the activations of `vit_jax.layers.transformer`; the first is written.
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
UNUSED = {
    r".*\.relative_position_index": "a constant of the window",
    r".*\.attn_mask": "a constant of the image's size",
}

_BLOCK = "stage_{i}/block_{j}/"
_HF = "encoder.layers.{i-1}.blocks.{j}."
HF = Table(
    prefix="swin.",
    backbone={
        "embed": "embeddings.patch_embeddings.projection",
        "embed_norm": "embeddings.norm",
        "stage_{i}/merge/norm": "encoder.layers.{i-2}.downsample.norm",
        "stage_{i}/merge/reduction": "encoder.layers.{i-2}.downsample.reduction",
        _BLOCK + "norm1": _HF + "layernorm_before",
        _BLOCK + "norm2": _HF + "layernorm_after",
        _BLOCK + "mlp/fc1": (_HF + "intermediate.dense", _HF + "mlp.fc1"),
        _BLOCK + "mlp/fc2": (_HF + "output.dense", _HF + "mlp.fc2"),
        _BLOCK + "attention/query": (_HF + "attention.self.query", _HF + "attention.q_proj"),
        _BLOCK + "attention/key": (_HF + "attention.self.key", _HF + "attention.k_proj"),
        _BLOCK + "attention/value": (_HF + "attention.self.value", _HF + "attention.v_proj"),
        _BLOCK + "attention/out": (_HF + "attention.output.dense", _HF + "attention.o_proj"),
        _BLOCK + "relative_position_bias": Leaf(
            (
                _HF + "attention.self.relative_position_bias_table",
                _HF + "attention.relative_position_bias.relative_position_bias_table",
            )
        ),
        "norm": "layernorm",
    },
    head={"head": "classifier"},
    unused={
        r".*\.relative_position_index": "a constant of the window",
        r"(swin\.)?embeddings\.mask_token": "only pre-training hides patches",
    },
)

_MS = "layers.{i-1}.blocks.{j}."


def state_rows(merge: str) -> dict:
    """Rows that both versions of Swin share at Microsoft and timm; `merge` is the stage's there."""
    return {
        "embed": "patch_embed.proj",
        "embed_norm": "patch_embed.norm",
        "stage_{i}/merge/norm": f"layers.{merge}.downsample.norm",
        "stage_{i}/merge/reduction": f"layers.{merge}.downsample.reduction",
        _BLOCK + "norm1": _MS + "norm1",
        _BLOCK + "norm2": _MS + "norm2",
        _BLOCK + "mlp/fc1": _MS + "mlp.fc1",
        _BLOCK + "mlp/fc2": _MS + "mlp.fc2",
        _BLOCK + "attention/out": _MS + "attn.proj",
        tuple(_BLOCK + f"attention/{part}" for part in ("query", "key", "value")): (
            _MS + "attn.qkv"
        ),
        "norm": "norm",
    }


_BIAS = {_BLOCK + "relative_position_bias": Leaf(_MS + "attn.relative_position_bias_table")}
MICROSOFT = Table(state_rows("{i-2}") | _BIAS, {"head": "head"}, unused=UNUSED)
TIMM = Table(state_rows("{i-1}") | _BIAS, {"head": "head.fc"}, unused=UNUSED)


def demand(config: Mapping[str, Any], **wanted: Any) -> None:
    """ConfigError if a setting of a config.json is there and is another than the one known here."""
    for name, value in wanted.items():
        found = config.get(name, value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ConfigError(f"config.json: {name}={found!r} is not known here, only {value!r}")


def activation(config: Mapping[str, Any]) -> str:
    """Our name of `hidden_act`; ConfigError if there is none."""
    name = config.get("hidden_act", "gelu")
    if name not in HF_ACTIVATIONS:
        raise ConfigError(
            f"config.json: hidden_act={name!r} is not known here.{nearest(name, HF_ACTIVATIONS)}"
        )
    return HF_ACTIVATIONS[name]


def hf_activation(name: str) -> str:
    """What transformers calls an activation of ours."""
    return next(theirs for theirs, ours in HF_ACTIVATIONS.items() if ours == name)


def classes(config: Mapping[str, Any], shapes: Shapes, head: str = "classifier") -> int:
    """K of the head called `head`, 0 without one; from config.json where there are no arrays."""
    if shapes:
        return shapes.get(f"{head}.weight", (0,))[0]
    if not any("ForImageClassification" in name for name in config.get("architectures") or ()):
        return 0
    return len(config.get("id2label") or ()) or config.get("num_labels", 2)


def hf_config(kind: str, model: str, num_classes: int) -> dict[str, Any]:
    """What each config.json has: the type, the class to build, a number for each label."""
    if not num_classes:
        return {"model_type": kind, "architectures": [f"{model}Model"]}
    labels = [f"LABEL_{i}" for i in range(num_classes)]
    return {
        "model_type": kind,
        "architectures": [f"{model}ForImageClassification"],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def squashed(size: int | tuple[int, int]) -> tuple[dict, ...]:
    """The whole picture at `size`, bicubic, with ImageNet's mean and deviation."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    return step("Resize", size=pair, interpolation="bicubic"), standardize(*IMAGENET)


def cropped(size: int, crop: float = 0.875, interpolation: str = "bicubic") -> tuple[dict, ...]:
    """The middle of the picture, with ImageNet's mean and deviation."""
    resize = step("ResizeCenterCrop", size=(size, size), crop=crop, interpolation=interpolation)
    return resize, standardize(*IMAGENET)


def state_preprocessing(origin: str, size: int) -> tuple[dict, ...]:
    """What a state dict of either Swin expects: from 384 pixels on, the whole picture."""
    if origin == "timm":
        return cropped(size, 0.9 if size < 384 else 1.0)
    return cropped(size) if size < 384 else squashed(size)


def state_fields(shapes: Shapes) -> dict[str, Any]:
    """Fields of either Swin that the shapes of its state dict tell, but for the heads."""
    blocks: dict[int, int] = {}
    for name in shapes:
        if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
            stage, block = int(found[1]), int(found[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    hidden, _ = shapes["layers.0.blocks.0.mlp.fc1.weight"]
    return {
        "width": width,
        "depths": tuple(blocks[stage] for stage in sorted(blocks)),
        "patch": patch,
        "mlp_ratio": hidden / width,
        "activation": "gelu",
        "epsilon": 1e-5,
    }


def dialect(shapes: Shapes) -> str:
    """Whose state dict it is: timm's patch merging is at the start of a stage."""
    return "Microsoft" if "layers.0.downsample.reduction.weight" in shapes else "timm"


def state_classes(shapes: Shapes) -> int:
    """K of the head, by either name; 0 without one."""
    return (shapes.get("head.fc.weight") or shapes.get("head.weight") or (0,))[0]


def hf_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that both versions of Swin read from config.json.

    Raises:
      ConfigError: on what the model here cannot do.
    """
    # The norms of the embedding and of the merging have PyTorch's epsilon there, whatever it says.
    demand(
        config, qkv_bias=True, use_absolute_embeddings=False, num_channels=3, layer_norm_eps=1e-5
    )
    patch = config.get("patch_size", 4)
    if not isinstance(patch, int):
        raise ConfigError(f"config.json: patch_size={patch} is not known here, only one number")
    depths, heads = (tuple(config[name]) for name in ("depths", "num_heads"))
    return {
        "width": config["embed_dim"],
        "depths": depths,
        "heads": heads,
        "window": config["window_size"],
        "patch": patch,
        "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
        "activation": activation(config),
        "epsilon": 1e-5,
        "drop_path": float(config.get("drop_path_rate", 0.1)),
        "dropout": float(config.get("hidden_dropout_prob", 0.0)),
        "attention_dropout": float(config.get("attention_probs_dropout_prob", 0.0)),
    }


def hf_settings(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """`hf_fields` the other way round; ConfigError if transformers has no such model."""
    if backbone["epsilon"] != 1e-5:
        raise ConfigError(
            f"epsilon={backbone['epsilon']}: some norms of transformers' Swin always have 1e-5"
        )
    return {
        "embed_dim": backbone["width"],
        "depths": list(backbone["depths"]),
        "num_heads": list(backbone["heads"]),
        "window_size": backbone["window"],
        "patch_size": backbone["patch"],
        "num_channels": 3,
        "mlp_ratio": backbone["mlp_ratio"],
        "qkv_bias": True,
        "hidden_act": hf_activation(backbone["activation"]),
        "layer_norm_eps": 1e-5,
        "use_absolute_embeddings": False,
        "drop_path_rate": backbone["drop_path"],
        "hidden_dropout_prob": backbone["dropout"],
        "attention_probs_dropout_prob": backbone["attention_dropout"],
    }


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what the model here cannot do."""
    return Recipe(
        origin="transformers",
        backbone={"target": TARGETS[0]} | hf_fields(config),
        table=HF,
        num_classes=classes(config, shapes),
        preprocessing=squashed(config.get("image_size", 224)),
    )


def to_hf(backbone: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the backbone -> config.json; ConfigError if transformers has no such model."""
    if backbone["always_shift"]:
        raise ConfigError(
            "always_shift=True: transformers' Swin for classification leaves small maps unshifted"
        )
    settings = hf_settings(backbone)
    # Only absolute positions would depend on the size; this one fills the last stage's window.
    size = backbone["window"] * backbone["patch"] * 2 ** (len(backbone["depths"]) - 1)
    return hf_config("swin", "Swin", num_classes) | settings | {"image_size": size}


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """A state dict of timm or Microsoft -> a recipe; None if it is no Swin."""
    first = "layers.0.blocks.0.attn.relative_position_bias_table"
    if not {first, "patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.weight"} <= set(shapes):
        return None
    fields = state_fields(shapes)
    tables = [
        shapes[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"]
        for stage in range(len(fields["depths"]))
    ]
    if len({rows for rows, _ in tables}) > 1:
        sides = ", ".join(str((round(rows**0.5) + 1) // 2) for rows, _ in tables)
        raise ConfigError(
            f"{name}: its stages have windows of {sides} pixels; Swin here has one window"
        )
    fields["heads"] = tuple(heads for _, heads in tables)
    fields["window"] = (round(tables[0][0] ** 0.5) + 1) // 2
    origin = dialect(shapes)
    size = fields["window"] * fields["patch"] * 2 ** (len(tables) - 1)
    return Recipe(
        origin=origin,
        backbone={"target": TARGETS[0]} | fields,
        table=TIMM if origin == "timm" else MICROSOFT,
        num_classes=state_classes(shapes),
        preprocessing=state_preprocessing(origin, size),
    )
