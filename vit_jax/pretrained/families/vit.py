"""ViT and DeiT: transformers, timm, Facebook's DeiT and MAE, and Google's `.npz`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax.build import named_sizes
from vit_jax.errors import ConfigError
from vit_jax.pretrained.families import swin
from vit_jax.pretrained.names import Leaf, Shapes, Table
from vit_jax.pretrained.preprocess import HALF, standardize, step
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("vit", "deit")
TARGETS = ("models.vit.ViT",)
DISTILLED = {"target": "models.classifier.DistilledClassifier"}

PARTS = ("query", "key", "value")
POSITIONS = ("position/token", "position/grid")
MASK_TOKEN = "only pre-training hides patches"

_OLD, _NEW = "encoder.layer.{i}.", "layers.{i}."
_HF_ROWS = {
    "embed/proj": "embeddings.patch_embeddings.projection",
    "class_token": Leaf("embeddings.cls_token"),
    "distillation_token": Leaf("embeddings.distillation_token"),
    POSITIONS: Leaf("embeddings.position_embeddings", leading=1),
    **{
        f"block_{{i}}/attention/{part}": (
            _OLD + f"attention.attention.{part}",
            _NEW + f"attention.{part[0]}_proj",
        )
        for part in PARTS
    },
    "block_{i}/attention/out": (_OLD + "attention.output.dense", _NEW + "attention.o_proj"),
    "block_{i}/norm1": (_OLD + "layernorm_before", _NEW + "layernorm_before"),
    "block_{i}/norm2": (_OLD + "layernorm_after", _NEW + "layernorm_after"),
    "block_{i}/mlp/fc1": (_OLD + "intermediate.dense", _NEW + "mlp.fc1"),
    "block_{i}/mlp/fc2": (_OLD + "output.dense", _NEW + "mlp.fc2"),
    "norm": "layernorm",
}
_HF_UNUSED = {
    r"(\w+\.)?pooler\.dense\.\w+": "the pooler, a dense layer and a tanh that no classifier reads",
    r"(\w+\.)?embeddings\.mask_token": MASK_TOKEN,
}
HF = Table(_HF_ROWS, {"head": "classifier"}, prefix="vit.", unused=_HF_UNUSED)
HF_DEIT = Table(_HF_ROWS, {"head": "classifier"}, prefix="deit.", unused=_HF_UNUSED)
HF_DISTILLED = Table(
    _HF_ROWS,
    {"head": "cls_classifier", "head_distilled": "distillation_classifier"},
    prefix="deit.",
    unused=_HF_UNUSED,
)

_CNN = "patch_embed.backbone."
_BOTTLENECK = "stem/stage_{i}/block_{j}/"
# Of timm, of Facebook's DeiT, MAE and DINOv2, which timm's names come from, and their hybrids.
STATE_ROWS = {
    "stem/root_conv": (_CNN + "stem.conv", _CNN + "conv"),
    "stem/root_norm": (_CNN + "stem.norm", _CNN + "norm"),
    **{
        _BOTTLENECK + ours: _CNN + "stages.{i-1}.blocks.{j}." + theirs
        for ours, theirs in (
            *((f"{kind}{n}", f"{kind}{n}") for kind in ("conv", "norm") for n in (1, 2, 3)),
            ("shortcut_conv", "downsample.conv"),
            ("shortcut_norm", "downsample.norm"),
        )
    },
    "embed/proj": "patch_embed.proj",
    "class_token": Leaf("cls_token"),
    "distillation_token": Leaf("dist_token"),
    "register_token": Leaf(("reg_token", "register_tokens")),
    POSITIONS: Leaf("pos_embed", leading=1),
    "block_{i}/norm1": "blocks.{i}.norm1",
    "block_{i}/norm2": "blocks.{i}.norm2",
    tuple(f"block_{{i}}/attention/{part}" for part in PARTS): "blocks.{i}.attn.qkv",
    "block_{i}/attention/out": "blocks.{i}.attn.proj",
    "block_{i}/layer_scale1/gamma": Leaf(("blocks.{i}.ls1.gamma", "blocks.{i}.gamma_1")),
    "block_{i}/layer_scale2/gamma": Leaf(("blocks.{i}.ls2.gamma", "blocks.{i}.gamma_2")),
    "block_{i}/mlp/fc1": "blocks.{i}.mlp.fc1",
    "block_{i}/mlp/fc2": "blocks.{i}.mlp.fc2",
    ("block_{i}/mlp/gate", "block_{i}/mlp/up"): ("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.w12"),
    "block_{i}/mlp/down": ("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.w3"),
    "norm": ("norm", "fc_norm"),
}
STATE_HEADS = {"head": "head", "head_distilled": "head_dist", "pre_logits": "pre_logits.fc"}
PRE_LOGITS = "the layer before a head that is not there"
STATE = Table(STATE_ROWS, STATE_HEADS, unused={r"pre_logits\..*": PRE_LOGITS})

_FLAX = "Transformer/encoderblock_{i}/"
_UNIT = "block{i}/unit{j+1}/"
# Google's own code first, then big_vision. Where no stage is named, blocks are the transformer's.
NPZ = Table(
    {
        "stem/root_conv": "conv_root",
        "stem/root_norm": "gn_root",
        **{_BOTTLENECK + f"conv{n}": _UNIT + f"conv{n}" for n in (1, 2, 3)},
        **{_BOTTLENECK + f"norm{n}": _UNIT + f"gn{n}" for n in (1, 2, 3)},
        _BOTTLENECK + "shortcut_conv": _UNIT + "conv_proj",
        _BOTTLENECK + "shortcut_norm": _UNIT + "gn_proj",
        "embed/proj": "embedding",
        "class_token": Leaf("cls"),
        POSITIONS: Leaf(("Transformer/posembed_input/pos_embedding", "pos_embedding"), leading=1),
        "block_{i}/norm1": _FLAX + "LayerNorm_0",
        **{
            f"block_{{i}}/attention/{part}": (
                _FLAX + f"MultiHeadDotProductAttention_1/{part}",
                _FLAX + f"MultiHeadDotProductAttention_0/{part}",
            )
            for part in (*PARTS, "out")
        },
        "block_{i}/norm2": (_FLAX + "LayerNorm_2", _FLAX + "LayerNorm_1"),
        **{
            f"block_{{i}}/mlp/fc{n + 1}": (
                _FLAX + f"MlpBlock_3/Dense_{n}",
                _FLAX + f"MlpBlock_0/Dense_{n}",
            )
            for n in (0, 1)
        },
        "norm": "Transformer/encoder_norm",
    },
    {"head": "head", "pre_logits": "pre_logits"},
    unused={r"pre_logits/.*": PRE_LOGITS},
    layout="flax",
)


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio whose product with the width, rounded down, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def hf_fields(config: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    """Fields that every ViT of transformers reads from config.json.

    Args:
      config: the file.
      epsilon: of the layer norms, where it does not say.

    Raises:
      ConfigError: on what the model here cannot do.
    """
    swin.demand(config, num_channels=3)
    patch, size = config.get("patch_size", 16), config.get("image_size", 224)
    if not isinstance(patch, int):
        raise ConfigError(f"config.json: patch_size={patch} is not known here, only one number")
    width = config["hidden_size"]
    return {
        "patch": patch,
        "width": width,
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "image_size": size if isinstance(size, int) else tuple(size),
        "activation": swin.activation(config),
        "epsilon": config.get("layer_norm_eps", epsilon),
        "dropout": float(config.get("hidden_dropout_prob", 0.0)),
        "attention_dropout": float(config.get("attention_probs_dropout_prob", 0.0)),
    }


def hf_settings(backbone: Mapping[str, Any], lacking: Mapping[str, Any]) -> dict[str, Any]:
    """`hf_fields` the other way round.

    Args:
      backbone: the fields of our model.
      lacking: fields for which transformers knows one value only.

    Raises:
      ConfigError: if a field has another.
    """
    for name, wanted in lacking.items():
        if backbone[name] != wanted:
            raise ConfigError(
                f"{name}={backbone[name]!r}: transformers has such a model with {wanted!r} only"
            )
    size = backbone["image_size"]
    return {
        "hidden_size": backbone["width"],
        "num_hidden_layers": backbone["depth"],
        "num_attention_heads": backbone["heads"],
        "hidden_act": swin.hf_activation(backbone["activation"]),
        "layer_norm_eps": backbone["epsilon"],
        "image_size": size if isinstance(size, int) else list(size),
        "patch_size": backbone["patch"],
        "num_channels": 3,
        "hidden_dropout_prob": backbone["dropout"],
        "attention_probs_dropout_prob": backbone["attention_dropout"],
    }


def squashed(size: int | tuple[int, int], interpolation: str = "bilinear") -> tuple[dict, ...]:
    """The whole picture at `size`, with values in [-1, 1]."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    return step("Resize", size=pair, interpolation=interpolation), standardize(HALF, HALF)


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json of `vit` or `deit` -> a recipe; ConfigError on what ViT here cannot do."""
    fields = hf_fields(config, 1e-12)
    fields |= {
        "mlp_ratio": mlp_ratio(config["intermediate_size"], config["hidden_size"]),
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "pooling": "token",
        "position_resize": "bicubic_torch",
    }
    size, classifier, table = fields["image_size"], {}, HF
    preprocessing = squashed(size)
    classes = swin.classes(config, shapes)
    if config["model_type"] == "deit":
        preprocessing = swin.cropped(size if isinstance(size, int) else size[0])
        table, fields["distilled"] = HF_DEIT, True
        teacher = any("WithTeacher" in name for name in config.get("architectures") or ())
        if "cls_classifier.weight" in shapes or (teacher and not shapes):
            table, classifier = HF_DISTILLED, {"classifier": DISTILLED}
            classes = swin.classes(config, shapes, "cls_classifier")
        if classifier or not classes:
            fields["pooling"] = "tokens"
    return Recipe(
        origin="transformers",
        backbone={"target": TARGETS[0]} | fields,
        table=table,
        num_classes=classes,
        preprocessing=preprocessing,
        **classifier,
    )


def to_hf(backbone: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the backbone -> config.json; ConfigError if transformers has no such model."""
    distilled = backbone["distilled"] or backbone["pooling"] == "tokens"
    settings = hf_settings(
        backbone,
        {
            "pooling": backbone["pooling"] if distilled else "token",
            "registers": 0,
            "positions": "learned",
            "class_position": True,
            "patch_bias": True,
            "pre_norm": False,
            "feed_forward": "mlp",
            "layer_scale": None,
            "stem": None,
        },
    )
    if distilled and backbone["pooling"] not in ("token", "tokens"):
        raise ConfigError(f"pooling={backbone['pooling']!r}: transformers' DeiT reads its tokens")
    settings |= {
        "intermediate_size": int(backbone["width"] * backbone["mlp_ratio"]),
        "qkv_bias": backbone["qkv_bias"],
    }
    kind, model = ("deit", "DeiT") if distilled else ("vit", "ViT")
    found = swin.hf_config(kind, model, num_classes) | settings
    if num_classes and backbone["pooling"] == "tokens":
        found["architectures"] = ["DeiTForImageClassificationWithTeacher"]
    return found


def known_heads(family: Iterable[str], width: int, depth: int, patch: int) -> tuple[int, str]:
    """Heads of each block, which no array tells, and what was assumed where no size is so."""
    for name, size in named_sizes().items():
        if name.split("_")[0] in family:
            found = size()
            if (found.width, found.depth, found.patch) == (width, depth, patch):
                return found.heads, ""
    heads = max(width // 64, 1)
    return heads, f"heads are not in the file, and no known size is so: {heads} assumed"


def grid_side(positions: int, tokens: int, name: str) -> tuple[int, bool]:
    """Side of the grid that so many positions are for, and whether tokens have theirs among them.

    Raises:
      ConfigError: if the grid is not square.
    """
    for there in (0, tokens):
        side = round((positions - there) ** 0.5)
        if side * side == positions - there:
            return side, there > 0 or tokens == 0
    raise ConfigError(
        f"{name}: its {positions} positions are of no square grid and {tokens} tokens"
    )


def state_fields(shapes: Shapes, name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields that the shapes of a state dict tell, and what had to be assumed.

    Args:
      shapes: of a ViT in timm's form.
      name: of the file, for errors.

    Raises:
      ConfigError: on what ViT here cannot do.
    """
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    depth = len({n.split(".")[1] for n in shapes if re.match(r"blocks\.\d+\.", n)})
    tokens = ("cls_token" in shapes) + ("dist_token" in shapes)
    registers = next((shapes[n] for n in ("reg_token", "register_tokens") if n in shapes), (1, 0))
    if "cls_token" not in shapes and "fc_norm.weight" in shapes:
        raise ConfigError(f"{name}: a mean and then a norm without a class token is not known here")
    stride, fields = _state_stem(shapes, name)
    side, placed = grid_side(shapes["pos_embed"][1], tokens, name)
    heads, remark = known_heads(("vit", "dinov2"), width, depth, patch)
    if "blocks.0.mlp.w3.weight" in shapes:
        hidden, gated = shapes["blocks.0.mlp.w3.weight"][1], True
    else:
        (rows, _), (_, hidden) = (shapes[f"blocks.0.mlp.fc{n}.weight"] for n in (1, 2))
        gated = rows == 2 * hidden
    pooling = "token" if "cls_token" in shapes else "mean"
    if "dist_token" in shapes:
        pooling = "tokens"
    if "fc_norm.weight" in shapes:
        pooling = "mean_norm"
    scaled = {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(shapes)
    fields |= {
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": heads,
        # A gated layer is two thirds as wide.
        "mlp_ratio": 1.5 * hidden / width if gated else mlp_ratio(hidden, width),
        "feed_forward": "swiglu" if gated else "mlp",
        "pooling": pooling,
        "registers": registers[1],
        "class_position": placed,
        "image_size": side * patch * stride,
        "position_resize": "bicubic",
        "activation": "gelu",
        "epsilon": 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "layer_scale": 1e-5 if scaled else None,
    }
    return fields, (remark,) if remark else ()


def _state_stem(shapes: Shapes, name: str) -> tuple[int, dict[str, Any]]:
    """The CNN of a hybrid: its stride and its fields; 1 and none without one."""
    if not any(n.startswith(_CNN) for n in shapes):
        return 1, {}
    root = next((n for n in (_CNN + "stem.conv.weight", _CNN + "conv.weight") if n in shapes), None)
    if root is None:
        raise ConfigError(f"{name}: its patches are cut from a CNN that is not known here")
    pattern = rf"{re.escape(_CNN)}stages\.(\d+)\.blocks\.(\d+)\."
    return _stem(shapes, pattern, shapes[root][0], "timm")


def _stem(shapes: Shapes, pattern: str, width: int, source: str) -> tuple[int, dict[str, Any]]:
    """The same from a pattern of (stage, block) in the names."""
    found = {m.groups() for m in (re.match(pattern, name) for name in shapes) if m}
    stages = sorted({int(stage) for stage, _ in found})
    stem = tuple(sum(int(s) == stage for s, _ in found) for stage in stages)
    stride = 4 * 2 ** max(len(stem) - 1, 0)
    return stride, {"stem": stem, "stem_width": width, "stem_source": source}


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """A state dict of timm, DeiT or MAE -> a recipe; None if it is no ViT.

    Raises:
      ConfigError: if it is a ViT that the model here cannot be.
    """
    needed = {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"}
    if not needed <= set(shapes) or "mask_token" in shapes:
        return None
    # Other layouts with the same names: a norm before the blocks (CLIP), behind the branches, a
    # gated MLP with another activation, biases of positions (BEiT).
    others = r"norm_pre\..*|.*relative_position.*|attn_pool\..*"
    if any(re.fullmatch(others, n) for n in shapes) or re.search("rpn|clip", name):
        return None
    fields, remarks = state_fields(shapes, name)
    if fields["feed_forward"] != "mlp":
        raise ConfigError(f"{name}: its MLPs are gated by an activation that no array tells")
    facebook = re.search("deit|mae", name.lower()) or "dist_token" in shapes
    if facebook and name.endswith(".pth"):
        fields["position_resize"] = "bicubic_torch"
    size, distilled = fields["image_size"], "dist_token" in shapes
    if facebook or fields["pooling"] == "mean_norm":
        preprocessing = swin.cropped(size, 0.875 if size < 384 else 1.0)
    else:
        crop = 0.9 if size < 384 else 1.0
        preprocessing = (swin.cropped(size, crop)[0], standardize(HALF, HALF))
    classes = shapes.get("head.weight", (0,))[0]
    classifier = dict(DISTILLED) if distilled else {"target": "models.classifier.Classifier"}
    if classes and "pre_logits.fc.weight" in shapes:
        classifier["representation"] = shapes["pre_logits.fc.weight"][0]
    return Recipe(
        origin="Facebook" if facebook else "timm",
        backbone={"target": TARGETS[0]} | fields,
        table=STATE,
        num_classes=classes,
        classifier=classifier,
        preprocessing=preprocessing,
        remarks=remarks,
    )


def from_npz(shapes: Shapes) -> Recipe | None:
    """Arrays of Google's code or of big_vision -> a recipe; None if they are no ViT's.

    Raises:
      ConfigError: if they are of a ViT that the model here cannot be.
    """
    if not {"embedding/kernel", "Transformer/encoder_norm/scale"} <= set(shapes):
        return None
    if any(name.startswith("MAPHead") for name in shapes):
        raise ConfigError("a ViT that pools by attention (big_vision's MAPHead) is not known here")
    blocks = {m[1] for m in (re.match(r"Transformer/encoderblock_(\d+)/", n) for n in shapes) if m}
    query = next((s for n, s in shapes.items() if re.fullmatch(r".*_0/.*/query/kernel", n)), None)
    hidden = next((s for n, s in shapes.items() if re.fullmatch(r".*/Dense_0/kernel", n)), None)
    if query is None or hidden is None:
        return None
    patch, _, _, width = shapes["embedding/kernel"]
    stride, fields = 1, {}
    if "conv_root/kernel" in shapes:
        width_of_root = shapes["conv_root/kernel"][-1]
        stride, fields = _stem(shapes, r"block(\d+)/unit(\d+)/", width_of_root, "google")
    tokens = int("cls" in shapes)
    positions = next((s for n, s in shapes.items() if n.endswith("pos_embedding")), None)
    remarks = ()
    if positions is None:
        fields["positions"] = "sincos_closed"
        size, remarks = 224, ("positions are not in the file: big_vision's fixed ones assumed",)
    else:
        side, placed = grid_side(positions[1], tokens, "the file")
        size = side * patch * stride
        fields |= {"class_position": placed, "position_resize": "align_corners"}
    classes = shapes.get("head/kernel", (0, 0))[-1]
    classifier = {"target": "models.classifier.Classifier"}
    if classes and "pre_logits/kernel" in shapes:
        classifier["representation"] = shapes["pre_logits/kernel"][-1]
    fields |= {
        "patch": patch,
        "width": width,
        "depth": len(blocks),
        "heads": query[1],
        "mlp_ratio": mlp_ratio(hidden[-1], width),
        "pooling": "token" if tokens else "mean",
        "image_size": size,
        "activation": "gelu_tanh",
        "epsilon": 1e-6,
    }
    return Recipe(
        origin="Google",
        backbone={"target": TARGETS[0]} | fields,
        table=NPZ,
        num_classes=classes,
        classifier=classifier,
        preprocessing=squashed(size),
        remarks=remarks,
    )
