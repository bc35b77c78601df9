"""CLIP of OpenAI and LAION, as transformers publishes it."""

from collections.abc import Mapping
from typing import Any

from vit_jax.errors import ConfigError
from vit_jax.pretrained.families import swin, vit
from vit_jax.pretrained.names import Leaf, Shapes, Table
from vit_jax.pretrained.preprocess import standardize, step
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("clip",)
TARGETS = ("models.clip.CLIP",)
TEXT = "models.clip.TextTransformer"
TASK = {"target": "tasks.contrastive.Contrastive"}
STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LEGACY_END = 2  # of config.json: then the end is the greatest number of a row
# What transformers takes where config.json does not say.
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TEXT_DEFAULTS = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49_407,
}


def blocks(ours: str, theirs: str) -> dict[str, str]:
    """Rows of the blocks, which both encoders have alike."""
    ours, theirs = ours + "block_{i}/", theirs + "encoder.layers.{i}."
    return {
        **{f"{ours}attention/{p}": f"{theirs}self_attn.{p[0]}_proj" for p in vit.PARTS},
        ours + "attention/out": theirs + "self_attn.out_proj",
        ours + "norm1": theirs + "layer_norm1",
        ours + "norm2": theirs + "layer_norm2",
        ours + "mlp/fc1": theirs + "mlp.fc1",
        ours + "mlp/fc2": theirs + "mlp.fc2",
    }


TEXT_ROWS = {
    "text/embed": "text_model.embeddings.token_embedding",
    "text/position": Leaf("text_model.embeddings.position_embedding.weight"),
    **blocks("text/", "text_model."),
    "text/norm": "text_model.final_layer_norm",
}
UNUSED = {r"(text_model|vision_model)\.embeddings\.position_ids": "the numbers from 0 on"}
HF = Table(
    backbone={
        "embed/proj": "embeddings.patch_embedding",
        "class_token": Leaf("embeddings.class_embedding", leading=-2),
        vit.POSITIONS: Leaf("embeddings.position_embedding.weight"),
        "pre_norm": "pre_layrnorm",
        **blocks("", ""),
        "norm": "post_layernorm",
    },
    head={
        "image_projection": "visual_projection",
        **TEXT_ROWS,
        "text_projection": "text_projection",
        "logit_scale": Leaf("logit_scale"),
    },
    prefix="vision_model.",
    unused=UNUSED,
)


def part(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`vision_config` or `text_config` with what transformers takes where it does not say.

    Old files have the same once more as `vision_config_dict`, which then counts.
    """
    inner = dict(defaults) | dict(config.get(name) or {})
    if config.get(f"{name}_dict"):
        inner |= dict(defaults) | dict(config[f"{name}_dict"])
    return inner


def vision_fields(inner: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the image encoder that CLIP and SigLIP read alike."""
    spelled = dict(inner) | {"attention_probs_dropout_prob": inner.get("attention_dropout", 0.0)}
    return vit.hf_fields(spelled, inner["layer_norm_eps"]) | {
        "mlp_ratio": vit.mlp_ratio(inner["intermediate_size"], inner["hidden_size"]),
        "position_resize": "bicubic_torch",
    }


def text_fields(inner: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the text encoder."""
    return {
        "target": TEXT,
        "vocabulary": inner["vocab_size"],
        "length": inner["max_position_embeddings"],
        "width": inner["hidden_size"],
        "depth": inner["num_hidden_layers"],
        "heads": inner["num_attention_heads"],
        "mlp_ratio": vit.mlp_ratio(inner["intermediate_size"], inner["hidden_size"]),
        "activation": swin.activation(inner),
        "epsilon": inner["layer_norm_eps"],
        "attention_dropout": float(inner.get("attention_dropout", 0.0)),
    }


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what CLIP here cannot do."""
    vision = part(config, "vision_config", VISION_DEFAULTS)
    text = part(config, "text_config", TEXT_DEFAULTS)
    end = text["eos_token_id"]
    fields = vision_fields(vision) | {"pooling": "token", "patch_bias": False, "pre_norm": True}
    size = fields["image_size"]
    short = size if isinstance(size, int) else min(size)
    return Recipe(
        origin="transformers",
        backbone={"target": vit.TARGETS[0]} | fields,
        table=HF,
        num_classes=None,
        classifier={
            "target": TARGETS[0],
            "text": text_fields(text) | {"end": None if end == LEGACY_END else end},
            "features": config.get("projection_dim", 512),
        },
        preprocessing=(
            step("Resize", size=short, interpolation="bicubic"),
            step("CenterCrop", size=(size, size) if isinstance(size, int) else size),
            standardize(*STATISTICS),
        ),
        task=dict(TASK),
        inputs={"tokens": ((text["max_position_embeddings"],), "int32")},
    )


def demanded(what: str, fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ConfigError if a field has another value than the one that transformers' model has."""
    for name, value in wanted.items():
        if fields[name] != value:
            raise ConfigError(f"{name}={fields[name]!r}: transformers' {what} has {value!r}")


def text_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """`text_fields` the other way round."""
    return {
        "vocab_size": text["vocabulary"],
        "max_position_embeddings": text["length"],
        "hidden_size": text["width"],
        "num_hidden_layers": text["depth"],
        "num_attention_heads": text["heads"],
        "intermediate_size": int(text["width"] * text["mlp_ratio"]),
        "hidden_act": swin.hf_activation(text["activation"]),
        "layer_norm_eps": text["epsilon"],
        "attention_dropout": text["attention_dropout"],
    }


def vision_settings(what: str, backbone: Mapping[str, Any], **wanted: Any) -> dict[str, Any]:
    """`vision_fields` the other way round; ConfigError if a field of `wanted` is another."""
    if backbone["target"] != vit.TARGETS[0]:
        raise ConfigError(f"{backbone['target']}: transformers' {what} has a ViT")
    lacking = {
        "registers": 0,
        "positions": "learned",
        "feed_forward": "mlp",
        "layer_scale": None,
        "stem": None,
        "qkv_bias": True,
        "distilled": False,
    }
    settings = vit.hf_settings(backbone, lacking | wanted)
    settings["attention_dropout"] = settings.pop("attention_probs_dropout_prob")
    del settings["hidden_dropout_prob"]
    return settings | {"intermediate_size": int(backbone["width"] * backbone["mlp_ratio"])}


def to_hf(model: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the whole model, its encoders' specs in it, -> config.json.

    Raises:
      ConfigError: if transformers has no such model.
    """
    demanded("CLIP", model, {"image_projection": True, "text_bias": False, "bias": None})
    text = model["text"]
    demanded("CLIP", text, {"target": TEXT, "causal": True, "reading": "end"})
    shared = {"projection_dim": model["features"]}
    vision = vision_settings(
        "CLIP", model["backbone"], pooling="token", patch_bias=False, pre_norm=True
    )
    end = LEGACY_END if text["end"] is None else text["end"]
    if text["end"] == LEGACY_END:
        raise ConfigError(
            f"end={LEGACY_END}: transformers' CLIP takes that number for a mark of old files, and "
            "reads the greatest number of a row instead"
        )
    return {
        "model_type": HF_TYPES[0],
        "architectures": ["CLIPModel"],
        "vision_config": vision | shared | {"model_type": "clip_vision_model"},
        "text_config": text_settings(text)
        | shared
        | {"model_type": "clip_text_model", "eos_token_id": end},
        "logit_scale_init_value": model["scale"],
        **shared,
    }


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """None: state dicts of CLIP are not known here, only transformers' folders."""
    return None
