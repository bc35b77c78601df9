"""UPerNet on Swin, as transformers publishes it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vit_jax.errors import ConfigError
from vit_jax.pretrained.families import swin
from vit_jax.pretrained.names import Leaf, Shapes, Table
from vit_jax.pretrained.preprocess import IMAGENET, standardize, step
from vit_jax.pretrained.recipe import Recipe

HF_TYPES = ("upernet",)
TARGETS = ("models.upernet.UPerNet",)
SIZE = 512  # of the published models' crops


def _spelled(row: Any) -> Any:
    """As old files have it, and as transformers has it now."""
    found = row if isinstance(row, Leaf) else Leaf(row)
    names = (found.name,) if isinstance(found.name, str) else found.name
    names = tuple(before + name for name in names for before in ("", "swin."))
    return replace(found, name=names) if isinstance(row, Leaf) else names


def _conv(ours: str, theirs: str, trailing: int = 0) -> dict[str, str | Leaf]:
    conv = Leaf(f"{theirs}.conv", trailing=trailing)
    return {f"{ours}/conv": conv, f"{ours}/norm": f"{theirs}.batch_norm"}


HF = Table(
    backbone={
        **{ours: _spelled(row) for ours, row in swin.HF.backbone.items()},
        # Only the description of the image passes it, which UPerNet does not read. Old files lack
        # it, and any numbers do in its place.
        "norm": ("swin.layernorm", "hidden_states_norms.stage4"),
    },
    head={
        "norm_{i}": "backbone.hidden_states_norms.stage{i}",
        **_conv("head/pool_{i}", "decode_head.psp_modules.{i}.1", trailing=2),
        **_conv("head/bottleneck", "decode_head.bottleneck"),
        **_conv("head/lateral_{i}", "decode_head.lateral_convs.{i}", trailing=2),
        **_conv("head/conv_{i}", "decode_head.fpn_convs.{i}"),
        **_conv("head/fusion", "decode_head.fpn_bottleneck"),
        "classifier": Leaf("decode_head.classifier", trailing=2),
        **_conv("auxiliary", "auxiliary_head.convs.0"),
        "auxiliary_classifier": Leaf("auxiliary_head.classifier", trailing=2),
    },
    prefix="backbone.",
    unused={
        r".*\.relative_position_index": "a constant of the window",
        r"backbone\.(swin\.)?embeddings\.mask_token": "only pre-training hides patches",
    },
)


def from_hf(config: Mapping[str, Any], shapes: Shapes) -> Recipe:
    """config.json -> a recipe; ConfigError on what the model here cannot do."""
    inner = dict(config.get("backbone_config") or {})
    if inner.get("model_type") != "swin":
        raise ConfigError(
            f"config.json: a backbone of model_type={inner.get('model_type')!r} is not known here, "
            "only 'swin'"
        )
    # transformers leaves out what is its default.
    inner = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)} | inner
    inner = {"window_size": 7} | inner
    stages = len(inner["depths"])
    if stages != 4:
        raise ConfigError(f"config.json: a Swin of {stages} stages is not known here, only of 4")
    swin.demand(inner, out_features=[f"stage{i}" for i in range(1, 5)])
    swin.demand(config, auxiliary_num_convs=1, auxiliary_concat_input=False)
    fields = swin.hf_fields(inner)
    wanted = fields["width"] * 4  # channels of the third map
    if config.get("auxiliary_in_channels") not in (None, wanted):
        raise ConfigError(
            f"config.json: auxiliary_in_channels={config['auxiliary_in_channels']}: the third map "
            f"has {wanted}"
        )
    helped = config.get("use_auxiliary_head", True)
    classes = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    if shapes:
        classes = shapes["decode_head.classifier.weight"][0]
        helped = "auxiliary_head.classifier.weight" in shapes
    return Recipe(
        origin="transformers",
        backbone={"target": swin.TARGETS[0], "always_shift": True} | fields,
        table=HF,
        num_classes=classes,
        classifier={
            "target": TARGETS[0],
            "features": config.get("hidden_size", 512),
            "pools": tuple(config.get("pool_scales", (1, 2, 3, 6))),
            "map_norm": True,
            "auxiliary_features": config.get("auxiliary_channels", 256) if helped else 0,
            "epsilon": 1e-5,
        },
        preprocessing=(
            step("Resize", size=(SIZE, SIZE), interpolation="bilinear"),
            standardize(*IMAGENET),
        ),
        task={"target": "tasks.segmentation.Segmentation"},
    )


def to_hf(model: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """A spec of the whole model, its backbone's spec in it, -> config.json.

    Raises:
      ConfigError: if transformers has no such model.
    """
    backbone = model["backbone"]
    if backbone["target"] != swin.TARGETS[0] or len(backbone["depths"]) != 4:
        raise ConfigError("UPerNet is published by transformers here on a Swin of 4 stages only")
    for name, wanted in (("map_norm", True), ("epsilon", 1e-5)):
        if model[name] != wanted:
            raise ConfigError(f"{name}={model[name]}: transformers' UPerNet has {wanted}")
    stages = [f"stage{i}" for i in range(1, 5)]
    return swin.hf_config("upernet", "UperNet", num_classes) | {
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone_config": swin.hf_settings(backbone)
        | {"model_type": "swin", "out_features": stages},
        "hidden_size": model["features"],
        "pool_scales": list(model["pools"]),
        "use_auxiliary_head": model["auxiliary_features"] > 0,
        "auxiliary_channels": model["auxiliary_features"] or 256,
        "auxiliary_in_channels": None,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
    }


def from_state(shapes: Shapes, name: str) -> Recipe | None:
    """None: no state dict of UPerNet is known here."""
    return None
