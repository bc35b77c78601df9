"""DETR, with boxes or with masks, as transformers and Facebook publish it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vit_jax.errors import ConfigError, nearest
from vit_jax.pretrained.families import resnet, swin
from vit_jax.pretrained.names import Leaf, Match, Shapes, Table
from vit_jax.pretrained.preprocess import IMAGENET, short_side, standardize
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("detr",)
TARGETS = ("models.detr.DETR", "models.panoptic.DETRPanoptic")
PARTS = ("query", "key", "value")
DETECTION = {"target": "tasks.detection.Detection"}
COCO_PANOPTIC = 250  # classes of the published models; ids above 90 are stuff
# timm's names of the backbones that DETR is published with, and their relatives.
BACKBONES = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet26": ("bottleneck", (2, 2, 2, 2)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
# Ours -> (old, new) in transformers. The five convolutions of the mask head have a norm each.
_MASKS = {
    "mask_attention/query": ("bbox_attention.q_linear", "bbox_attention.q_proj"),
    "mask_attention/key": ("bbox_attention.k_linear", "bbox_attention.k_proj"),
    "mask_head/out": ("mask_head.out_lay", "mask_head.output_conv"),
}
for _i in range(1, 6):
    _new = f"mask_head.conv{_i}." if _i < 3 else f"mask_head.fpn_stages.{_i - 3}.refine."
    _MASKS[f"mask_head/conv{_i}"] = (f"mask_head.lay{_i}", _new + "conv")
    _MASKS[f"mask_head/norm{_i}"] = (f"mask_head.gn{_i}", _new + "norm")
    if _i < 4:
        _new = f"mask_head.fpn_stages.{_i - 1}.fpn_adapter"
        _MASKS[f"mask_head/adapter{_i}"] = Leaf((f"mask_head.adapter{_i}", _new), trailing=2)


def _hf_table(panoptic: bool, timm: bool) -> Table:
    """Names of transformers: with masks, the detector is in `detr`; the ResNet may be timm's."""
    within = "detr." if panoptic else ""
    old, new = (f"{within}model.backbone.{part}" for part in ("conv_encoder.model.", "model."))
    network = resnet.TORCHVISION if timm else resnet.HF
    body = f"{within}model."

    def layer(side: str, name: str) -> str:
        return f"{body}{side}.layers.{{i}}.{name}"

    rows: dict = {
        "input_proj": Leaf(body + "input_projection", trailing=2),
        "query": Leaf(body + "query_position_embeddings.weight"),
        "decoder_norm": body + "decoder.layernorm",
        "class_head": within + "class_labels_classifier",
        "encoder_{i}/norm1": layer("encoder", "self_attn_layer_norm"),
        "encoder_{i}/norm2": layer("encoder", "final_layer_norm"),
        "decoder_{i}/norm1": layer("decoder", "self_attn_layer_norm"),
        "decoder_{i}/norm2": layer("decoder", "encoder_attn_layer_norm"),
        "decoder_{i}/norm3": layer("decoder", "final_layer_norm"),
    }
    for n in (1, 2, 3):
        rows[f"box_head/fc{n}"] = f"{within}bbox_predictor.layers.{n - 1}"
    for side, ours, theirs in (
        ("encoder", "attention", "self_attn"),
        ("decoder", "self_attention", "self_attn"),
        ("decoder", "cross_attention", "encoder_attn"),
    ):
        for part in PARTS:
            rows[f"{side}_{{i}}/{ours}/{part}"] = layer(side, f"{theirs}.{part[0]}_proj")
        rows[f"{side}_{{i}}/{ours}/out"] = (
            layer(side, f"{theirs}.out_proj"),
            layer(side, f"{theirs}.o_proj"),
        )
        for n in (1, 2):
            rows[f"{side}_{{i}}/mlp/fc{n}"] = (layer(side, f"fc{n}"), layer(side, f"mlp.fc{n}"))
    return Table(
        {ours: (old + theirs, new + theirs) for ours, theirs in network.backbone.items()},
        rows | (_MASKS if panoptic else {}),
    )


HF = {
    (panoptic, timm): _hf_table(panoptic, timm)
    for panoptic in (False, True)
    for timm in (False, True)
}


@dataclass(frozen=True)
class Joined(Table):
    """A table of a state dict with PyTorch's own attention, whose one matrix for query, key and
    value is called `in_proj_weight`, with no point where a module would end.
    """

    def bind(self, ours: Shapes, theirs: Mapping[str, Any] | None = None) -> Match:
        """As `Table.bind`."""
        if theirs is not None:
            theirs = {name.replace(".in_proj_", ".in_proj."): v for name, v in theirs.items()}
        match = super().bind(ours, theirs)

        def back(name: str) -> str:
            return name.replace(".in_proj.", ".in_proj_")

        return replace(
            match,
            bindings=tuple(replace(b, name=back(b.name)) for b in match.bindings),
            unmapped=tuple(back(name) for name in match.unmapped),
            wrong=tuple(back(sentence) for sentence in match.wrong),
        )


def _facebook_table(panoptic: bool) -> Table:
    """Facebook's names: with masks, the detector lies in `detr`."""
    within = "detr." if panoptic else ""
    body = within + "backbone.0.body."
    rows: dict = {
        "input_proj": within + "input_proj",
        "query": Leaf(within + "query_embed.weight"),
        "decoder_norm": within + "transformer.decoder.norm",
        "class_head": within + "class_embed",
    }
    for n in (1, 2, 3):
        rows[f"box_head/fc{n}"] = f"{within}bbox_embed.layers.{n - 1}"
    for side, ours, theirs in (
        ("encoder", "attention", "self_attn"),
        ("decoder", "self_attention", "self_attn"),
        ("decoder", "cross_attention", "multihead_attn"),
    ):
        there, here = f"{within}transformer.{side}.layers.{{i}}.", f"{side}_{{i}}/"
        rows[tuple(f"{here}{ours}/{part}" for part in PARTS)] = f"{there}{theirs}.in_proj"
        rows[f"{here}{ours}/out"] = f"{there}{theirs}.out_proj"
        rows |= {f"{here}mlp/fc{n}": f"{there}linear{n}" for n in (1, 2)}
        rows |= {f"{here}norm{n}": f"{there}norm{n}" for n in (1, 2, 3)}
    masks = _MASKS if panoptic else {}
    return Joined(
        {ours: body + theirs for ours, theirs in resnet.TORCHVISION.backbone.items()}, rows | masks
    )


FACEBOOK = {panoptic: _facebook_table(panoptic) for panoptic in (False, True)}
PREPROCESSING = (short_side(800, 1333), standardize(*IMAGENET))


def _backbone(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A spec of the backbone, and whether its arrays have timm's names."""
    inner = config.get("backbone_config") or {}
    kind = inner.get("model_type")
    timm = config.get("use_timm_backbone", not inner) or kind == "timm_backbone"
    dilated = bool(config.get("dilation", False)) or inner.get("output_stride") == 16
    if timm:
        name = inner.get("backbone") or config.get("backbone") or "resnet50"
        if name not in BACKBONES:
            raise ConfigError(
                f"config.json: backbone={name!r} is not known here.{nearest(name, BACKBONES)}"
            )
        block, depths = BACKBONES[name]
        spec = {"target": resnet.TARGETS[0], "depths": depths, "block": block, "width": 64}
    elif kind == "resnet":
        if dilated:
            raise ConfigError("config.json: dilation is on: transformers' own ResNet has none")
        spec = resnet.from_hf({"depths": (3, 4, 6, 3), **inner}, {}).backbone
    else:
        raise ConfigError(f"config.json: a backbone of model_type={kind!r} is not known here")
    return spec | {"norm": "frozen", "dilation": 2 if dilated else 1}, timm


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what the model here cannot do."""
    get = config.get
    swin.demand(config, position_embedding_type="sine", num_channels=3)
    # Layers that are dropped in training are not known here; the published models drop none.
    swin.demand(config, encoder_layerdrop=0.0, decoder_layerdrop=0.0)
    for name, default in (("attention_heads", 8), ("ffn_dim", 2048)):
        sides = [get(f"{side}_{name}", default) for side in ("encoder", "decoder")]
        if sides[0] != sides[1]:
            raise ConfigError(
                f"config.json: encoder_{name}={sides[0]} and decoder_{name}={sides[1]}: DETR here "
                "has one number for both"
            )
    activation = swin.activation({"hidden_act": get("activation_function", "relu")})
    named = " ".join(get("architectures") or ())
    heads = [n for n in shapes if n.endswith("class_labels_classifier.weight")]
    if shapes and not heads:
        raise ConfigError("the file holds no class_labels_classifier: DETR here has its heads")
    masks = heads[0].startswith("detr.") if heads else "ForSegmentation" in named
    classes = len(get("id2label") or ()) or get("num_labels", 2)
    if heads:
        classes = shapes[heads[0]][0] - 1
    backbone, timm = _backbone(config)
    return Recipe(
        origin="transformers",
        backbone=backbone,
        table=HF[masks, timm],
        num_classes=classes,
        classifier={
            "target": TARGETS[masks],
            "queries": get("num_queries", 100),
            "width": get("d_model", 256),
            "heads": get("encoder_attention_heads", 8),
            "hidden": get("encoder_ffn_dim", 2048),
            "encoder_depth": get("encoder_layers", 6),
            "decoder_depth": get("decoder_layers", 6),
            "activation": activation,
            "epsilon": 1e-5,
            "dropout": float(get("dropout", 0.1)),
            "attention_dropout": float(get("attention_dropout", 0.0)),
        },
        preprocessing=PREPROCESSING,
        task=_task(masks, classes),
    )


def _task(masks: bool, classes: int) -> dict[str, Any]:
    if not masks:
        return DETECTION
    stuff = tuple(range(91, classes)) if classes == COCO_PANOPTIC else ()
    return {"target": "tasks.panoptic.Panoptic", "stuff": stuff}


def to_hf(model: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the whole model, its backbone's spec in it, -> config.json.

    A ResNet that timm has is written by its names, as the published files are, any other by those
    of transformers. Batch norms are written too: transformers freezes them.

    Raises:
      ConfigError: if transformers has no such model.
    """
    backbone = model["backbone"]
    if backbone["target"] != resnet.TARGETS[0]:
        raise ConfigError(
            f"transformers' DETR stands on a ResNet here, not on {backbone['target']}"
        )
    if model["epsilon"] != 1e-5:
        raise ConfigError(f"epsilon={model['epsilon']}: transformers' DETR always has 1e-5")
    masks = model["target"] == TARGETS[1]
    settings = {"attention_heads": model["heads"], "ffn_dim": model["hidden"]}
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in settings.items()}
    return (
        swin.hf_config("detr", "Detr", num_classes)
        | sides
        | {
            "architectures": [f"DetrFor{'Segmentation' if masks else 'ObjectDetection'}"],
            "num_channels": 3,
            "num_queries": model["queries"],
            "d_model": model["width"],
            "encoder_layers": model["encoder_depth"],
            "decoder_layers": model["decoder_depth"],
            "activation_function": swin.hf_activation(model["activation"]),
            "dropout": model["dropout"],
            "attention_dropout": model["attention_dropout"],
            "activation_dropout": 0.0,
            "position_embedding_type": "sine",
        }
        | _hf_backbone(backbone)
    )


def _hf_backbone(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the backbone; ConfigError if transformers has no such one."""
    shape = (backbone["block"], tuple(backbone["depths"]))
    name = next((n for n, found in BACKBONES.items() if found == shape), None)
    if name is not None and backbone["width"] == 64 and backbone["epsilon"] == 1e-5:
        dilated = backbone["dilation"] == 2
        return {
            "use_timm_backbone": True,
            "backbone": name,
            "backbone_config": None,
            "dilation": dilated,
        }
    stages = [f"stage{i}" for i, _ in enumerate(backbone["depths"], 1)]
    inner = resnet.to_hf(backbone, 0) | {"out_features": stages}
    return {"use_timm_backbone": False, "backbone": None, "backbone_config": inner}


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """Facebook's state dict -> a recipe; None if it is no DETR.

    The shapes do not tell the heads, nor whether the last stage is dilated: the published models
    have 8, and those that are dilated say "dc5".
    """
    within = next(
        (p for p in ("", "detr.") if f"{p}transformer.encoder.layers.0.linear1.weight" in shapes),
        None,
    )
    first = f"{within}backbone.0.body."
    if within is None or f"{first}conv1.weight" not in shapes:
        return None
    body = {n.removeprefix(first): s for n, s in shapes.items() if n.startswith(first)}
    found = resnet.from_state(body, name)
    hidden, width = shapes[f"{within}transformer.encoder.layers.0.linear1.weight"]

    def depth(side: str) -> int:
        pattern = re.escape(f"{within}transformer.{side}.layers.") + r"(\d+)\.linear1\.weight"
        return sum(re.fullmatch(pattern, n) is not None for n in shapes)

    masks = bool(within)
    classes = shapes[f"{within}class_embed.weight"][0] - 1
    dilated = "dc5" in name.lower()
    return Recipe(
        origin="Facebook",
        backbone=found.backbone | {"norm": "frozen", "dilation": 2 if dilated else 1},
        table=FACEBOOK[masks],
        num_classes=classes,
        classifier={
            "target": TARGETS[masks],
            "queries": shapes[f"{within}query_embed.weight"][0],
            "width": width,
            "heads": 8,
            "hidden": hidden,
            "encoder_depth": depth("encoder"),
            "decoder_depth": depth("decoder"),
        },
        preprocessing=PREPROCESSING,
        task=_task(masks, classes),
        remarks=(
            "heads are not in the file: 8, as published",
            f"the last stage is {'' if dilated else 'not '}dilated, as the file's name says",
        ),
    )
