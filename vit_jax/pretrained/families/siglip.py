"""SigLIP, and SigLIP 2 of fixed sizes, as transformers publishes them."""

from collections.abc import Mapping
from typing import Any

from vit_jax.pretrained.families import clip, swin, vit
from vit_jax.pretrained.families.detr import Joined
from vit_jax.pretrained.names import Leaf, Shapes
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("siglip",)
TARGETS = clip.TARGETS
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
VISION_DEFAULTS = _DEFAULTS | {"image_size": 224, "patch_size": 16}
TEXT_DEFAULTS = _DEFAULTS | {"vocab_size": 32_000, "max_position_embeddings": 64}
_POOL = "attention_pool/"
HF = Joined(
    backbone={
        "embed/proj": "embeddings.patch_embedding",
        ("position/grid",): Leaf("embeddings.position_embedding.weight"),
        **clip.blocks("", ""),
        "norm": "post_layernorm",
        _POOL + "probe": Leaf("head.probe"),
        tuple(f"{_POOL}attention/{part}" for part in vit.PARTS): "head.attention.in_proj",
        _POOL + "attention/out": "head.attention.out_proj",
        _POOL + "norm": "head.layernorm",
        _POOL + "mlp/fc1": "head.mlp.fc1",
        _POOL + "mlp/fc2": "head.mlp.fc2",
    },
    head={
        **clip.TEXT_ROWS,
        "text_projection": "text_model.head",
        "logit_scale": Leaf("logit_scale", leading=1),
        "logit_bias": Leaf("logit_bias", leading=1),
    },
    prefix="vision_model.",
    unused=clip.UNUSED,
)
FORM = {"causal": False, "reading": "last"}  # of the text encoder


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what the model here cannot do."""
    vision = clip.part(config, "vision_config", VISION_DEFAULTS)
    text = clip.part(config, "text_config", TEXT_DEFAULTS)
    swin.demand(vision, vision_use_head=True)
    width = vision["hidden_size"]
    swin.demand({"projection_size": text.get("projection_size") or width}, projection_size=width)
    fields = clip.vision_fields(vision) | {"pooling": "attention"}
    return Recipe(
        origin="transformers",
        backbone={"target": vit.TARGETS[0]} | fields,
        table=HF,
        num_classes=None,
        classifier={
            "target": TARGETS[0],
            "text": clip.text_fields(text) | FORM,
            "features": width,
            "image_projection": False,
            "text_bias": True,
            "bias": -10.0,
        },
        preprocessing=vit.squashed(fields["image_size"], "bicubic"),
        task=clip.TASK | {"loss": "sigmoid"},
        inputs={"tokens": ((text["max_position_embeddings"],), "int32")},
    )


def to_hf(model: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the whole model, its encoders' specs in it, -> config.json.

    Raises:
      ConfigError: if transformers has no such model.
    """
    backbone, text = model["backbone"], model["text"]
    clip.demanded("SigLIP", model, {"image_projection": False, "text_bias": True})
    clip.demanded("SigLIP", text, FORM | {"target": clip.TEXT})
    vision = clip.vision_settings(
        "SigLIP", backbone, pooling="attention", patch_bias=True, pre_norm=False
    )
    projection = {"projection_size": model["features"]}
    return {
        "model_type": HF_TYPES[0],
        "architectures": ["SiglipModel"],
        "vision_config": vision | {"model_type": "siglip_vision_model", "vision_use_head": True},
        "text_config": clip.text_settings(text) | projection | {"model_type": "siglip_text_model"},
    }


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """None: state dicts of SigLIP are not known here, only transformers' folders."""
    return None
