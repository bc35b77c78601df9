"""Parity at published sizes: random weights in the peer's model, its file opened here, outputs
compared. `python tests/golden/make.py --report` writes docs/parity.md.
"""

import copy
import json
import math
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "parity.json"
LIMIT = 1e-4
SETR = (
    "Neither transformers nor timm has SETR, so its decoders have no peer to be compared with. "
    "`tests/models/test_setr.py` checks the number of their parameters against those published, "
    "and how the maps go through them; its ViT is one of those above."
)
WORDS = (
    "Words: on 12 texts each, tokenizers of CLIP, SigLIP and SigLIP 2 with small vocabularies give "
    "the ids of transformers 5.23 (CLIP's up to its end): `tests/data/test_text.py`."
)


@dataclass(frozen=True)
class Row:
    """One model of a peer.

    Attributes:
      name: of the published size.
      peer: "transformers" or "timm".
      make: builds the peer's model, with random weights.
      sizes: (H, W) of the images: the published one, and an awkward one.
      call: the peer's further arguments at another size than it was made for.
      masked: asks for two images of unequal size, padded, with a mask.
      words: of a model of texts too: V, T, and the number that ends a text, None if none does.
      hidden: share of the patches that are hidden; 0 has no such mask.
    """

    name: str
    peer: str
    make: Callable[[], Any]
    sizes: tuple[tuple[int, int], ...]
    call: dict[str, Any] = field(default_factory=dict)
    masked: bool = False
    words: tuple[int, int, int | None] | None = None
    hidden: float = 0.0


def clip(name: str, kind: str, sizes, *, text: dict, words, **config) -> Row:
    """A model of pictures and texts."""

    def make():
        import transformers

        settings = getattr(transformers, f"{kind}Config")(text_config=text, **config)
        return getattr(transformers, f"{kind}Model")(settings)

    return Row(name, "transformers", make, tuple(sizes), ANY, words=words)


def hf(name: str, kind: str, sizes, call: dict | None = None, **config) -> Row:
    def make():
        import transformers

        settings = getattr(transformers, f"{kind}Config")(num_labels=1000, **config)
        return getattr(transformers, f"{kind}ForImageClassification")(settings)

    return Row(name, "transformers", make, tuple(sizes), call or {})


def detr(name: str, head: str = "ObjectDetection", sizes=None, **config) -> Row:
    def make():
        import transformers

        settings = {"num_labels": 91, "use_pretrained_backbone": False} | config
        if "backbone_config" in settings:
            inner = transformers.ResNetConfig(**settings["backbone_config"])
            settings |= {"backbone_config": inner, "use_timm_backbone": False}
        return getattr(transformers, f"DetrFor{head}")(transformers.DetrConfig(**settings))

    return Row(name, "transformers", make, tuple(sizes or (VGA, DETR_ODD)), masked=True)


def upernet(name: str, sizes, swin: dict, **config) -> Row:
    def make():
        import transformers

        inner = transformers.SwinConfig(**swin, out_features=STAGES)
        settings = {"num_labels": 150, "backbone_config": inner} | config
        kind = transformers.UperNetForSemanticSegmentation
        return kind(transformers.UperNetConfig(**settings))

    return Row(name, "transformers", make, tuple(sizes))


def restorer(name: str, kind: str, head: str, ratio: float, sizes, **config) -> Row:
    def make():
        import transformers

        settings = getattr(transformers, f"{kind}Config")(**config)
        return getattr(transformers, f"{kind}For{head}")(settings)

    return Row(name, "transformers", make, tuple(sizes), ANY, hidden=ratio)


def deit(name: str, **config) -> Row:
    def make():
        import transformers

        settings = transformers.DeiTConfig(num_labels=1000, **config)
        return transformers.DeiTForImageClassificationWithTeacher(settings)

    return Row(name, "transformers", make, (S224, VIT_ODD), {"interpolate_pos_encoding": True})


def timm(name: str, sizes, **config) -> Row:
    def make():
        import timm

        return timm.create_model(name, pretrained=False, **config)

    return Row(name, "timm", make, tuple(sizes))


S224, S384, S256, S512 = (224, 224), (384, 384), (256, 256), (512, 512)
VGA, DETR_ODD = (480, 640), (421, 533)  # no map of the second divides the one before
STAGES = [f"stage{i}" for i in range(1, 5)]
ODD = (296, 328)  # the window divides neither side
LARGE_ODD = (392, 424)  # transformers fails where a map is smaller than the window it was made for
VIT_ODD = (240, 304)  # a multiple of 16, not square
DINO_ODD = (238, 322)
ANY = {"interpolate_pos_encoding": True}
SWIN_T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
SWIN_S = SWIN_T | {"depths": [2, 2, 18, 2]}
SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
SWIN_L = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}
MIM = "MaskedImageModeling"
BEIT_MIM = {
    "use_mask_token": True,
    "use_shared_relative_position_bias": True,
    "layer_scale_init_value": 0.1,
}
DYNAMIC = {"dynamic_img_size": True}
CLIP_WORDS = (49_408, 77, 49_407)


def vit(width: int, depth: int = 12, heads: int | None = None) -> dict:
    """Settings of transformers' plain ViT."""
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads or width // 64,
        "intermediate_size": 4 * width,
    }


ROWS = (
    hf("ViT-Ti/16", "ViT", [S224, VIT_ODD], ANY, **vit(192)),
    hf("ViT-S/16", "ViT", [S224, VIT_ODD], ANY, **vit(384)),
    hf("ViT-B/16", "ViT", [S224, VIT_ODD], ANY, **vit(768)),
    hf("ViT-B/16 384", "ViT", [S384, VIT_ODD], ANY, image_size=384, **vit(768)),
    hf("ViT-B/32", "ViT", [S224, (256, 320)], ANY, patch_size=32, **vit(768)),
    hf("ViT-L/16", "ViT", [S224, VIT_ODD], ANY, **vit(1024, 24)),
    deit("DeiT-S distilled", **vit(384)),
    deit("DeiT-B distilled", **vit(768)),
    hf("BEiT-B/16", "Beit", [S224, VIT_ODD], ANY, use_relative_position_bias=True, **vit(768)),
    hf("BEiT-L/16", "Beit", [S224, VIT_ODD], ANY, use_relative_position_bias=True, **vit(1024, 24)),
    hf("DINOv2-S/14", "Dinov2", [S224, DINO_ODD], **vit(384), image_size=518, patch_size=14),
    hf("DINOv2-B/14", "Dinov2", [S224, DINO_ODD], **vit(768), image_size=518, patch_size=14),
    hf(
        "DINOv2-S/14 registers",
        "Dinov2WithRegisters",
        [S224, DINO_ODD],
        **vit(384),
        image_size=518,
        patch_size=14,
    ),
    clip("CLIP-B/32", "CLIP", [S224, (256, 320)], text={}, words=CLIP_WORDS),
    clip(
        "CLIP-B/16",
        "CLIP",
        [S224, VIT_ODD],
        text={},
        words=CLIP_WORDS,
        vision_config={"patch_size": 16},
    ),
    clip(
        "CLIP-L/14",
        "CLIP",
        [S224, DINO_ODD],
        text=vit(768) | {"projection_dim": 768},
        words=CLIP_WORDS,
        vision_config=vit(1024, 24) | {"patch_size": 14, "projection_dim": 768},
        projection_dim=768,
    ),
    clip("SigLIP-B/16", "Siglip", [S224, VIT_ODD], text={}, words=(32_000, 64, None)),
    hf("Swin-T", "Swin", [S224, ODD], **SWIN_T),
    hf("Swin-S", "Swin", [S224, ODD], **SWIN_S),
    hf("Swin-B", "Swin", [S224, ODD], **SWIN_B),
    hf("Swin-B 384", "Swin", [S384, LARGE_ODD], **SWIN_B, window_size=12, image_size=384),
    hf("Swin-L", "Swin", [S224, ODD], **SWIN_L),
    hf("Swin V2-T w8", "Swinv2", [S256, ODD], **SWIN_T, window_size=8, image_size=256),
    hf("Swin V2-B w16", "Swinv2", [S256, ODD], **SWIN_B, window_size=16, image_size=256),
    hf("CvT-13", "Cvt", [S224, ODD]),
    hf("CvT-21", "Cvt", [S224, ODD], depth=[1, 4, 16]),
    hf(
        "CvT-W24",
        "Cvt",
        [S384, ODD],
        embed_dim=[192, 768, 1024],
        depth=[2, 2, 20],
        num_heads=[3, 12, 16],
    ),
    hf("ResNet-50", "ResNet", [S224, ODD]),
    hf("ResNet-101", "ResNet", [S224, ODD], depths=[3, 4, 23, 3]),
    detr("DETR-R50"),
    detr("DETR-R50, its own ResNet", backbone_config={"out_features": STAGES}),
    detr("DETR-R50-DC5", dilation=True),
    detr("DETR-R101", backbone="resnet101", use_timm_backbone=True),
    detr("DETR-R50 panoptic", "Segmentation", [(320, 448), (277, 341)], num_labels=250),
    upernet("UPerNet-Swin-T", [S512, ODD], SWIN_T),
    upernet("UPerNet-Swin-T small", [S224, (180, 224)], SWIN_T),
    upernet("UPerNet-Swin-B", [S512, ODD], SWIN_B | {"window_size": 12}),
    restorer("ViT-MAE-B/16", "ViTMAE", "PreTraining", 0.75, [S224], **vit(768)),
    restorer("ViT-B/16 masked", "ViT", MIM, 0.6, [S224], **vit(768)),
    restorer(
        "Swin-B w6 masked",
        "Swin",
        MIM,
        0.6,
        [(192, 192)],
        **SWIN_B,
        window_size=6,
        image_size=192,
        encoder_stride=32,
    ),
    restorer("BEiT-B/16 masked", "Beit", MIM, 0.4, [S224, VIT_ODD], **BEIT_MIM, **vit(768)),
    timm("vit_base_patch16_224", [S224, VIT_ODD], **DYNAMIC),
    timm("deit_small_distilled_patch16_224", [S224, VIT_ODD], **DYNAMIC),
    timm("vit_base_r50_s16_224", [S224, (320, 256)], **DYNAMIC),
    timm("vit_small_r26_s32_224", [S224, (320, 256)], **DYNAMIC),
    timm("vit_small_patch14_dinov2", [S224, DINO_ODD], **DYNAMIC),
    timm("vit_small_patch14_reg4_dinov2", [S224, DINO_ODD], **DYNAMIC),
    timm("beit_base_patch16_224", [S224]),
    timm("swin_tiny_patch4_window7_224", [S224]),
    timm("swinv2_tiny_window8_256", [S256]),
    timm("resnet50", [S224, ODD]),
)


def randomise(model: Any, seed: int) -> None:
    """Every parameter and statistic takes part, none is left at 0 or 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or "coords_table" in name:
            continue

        def normal(tensor=tensor):
            return torch.randn(tensor.shape, generator=generator)

        if name.endswith("running_var"):
            value = 0.5 + torch.rand(tensor.shape, generator=generator)
        elif name.endswith("bias_table") or "token" in name or "pos" in name:
            value = 0.5 * normal()
        elif "logit_scale" in name:
            value = 2 + 0.3 * normal()
        elif tensor.ndim > 1 and tensor.shape[0] * tensor[0].numel() > tensor.numel() / 2:
            value = normal() / tensor[0].numel() ** 0.5
        else:
            value = 0.1 * normal() + float(name.endswith(("weight", "gamma", "lambda1")))
        tensor.copy_(value.reshape(tensor.shape))


def save(row: Row, model: Any, folder: Path) -> None:
    """Writes what the peer would publish."""
    if row.peer == "transformers":
        model.save_pretrained(folder)
        return
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    published = {"input_size": list(model.default_cfg["input_size"])}
    config = {"architecture": row.name, "pretrained_cfg": published}
    (folder / "config.json").write_text(json.dumps(config))


def measure(row: Row) -> dict[str, Any]:
    """The largest difference of an output, relative to its largest number, at each size."""
    import torch

    import vit_jax

    model = row.make().eval()
    with torch.no_grad():
        randomise(model, seed=0)
    found: dict[str, Any] = {"name": row.name, "peer": row.peer, "differences": {}}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as name:
        save(row, model, Path(name))
        loaded = vit_jax.load(name)
    for size in row.sizes:
        call = row.call if size != row.sizes[0] else {}
        # A copy: transformers' Swin, once it has not shifted a small map, never shifts again.
        worst = difference(loaded, copy.deepcopy(model), size, row, call)
        found["differences"][f"{size[0]}x{size[1]}"] = worst
    return found


def difference(
    loaded: Any, model: Any, size: tuple[int, int], row: Row, call: dict[str, Any]
) -> float:
    """The largest difference of an output of ours and the peer's, over its largest number."""
    import torch

    random = np.random.default_rng(1)
    image = random.normal(size=(1 + row.masked, 3, *size))
    batch, call = {}, dict(call)
    if row.words:
        vocabulary, length, end = row.words
        tokens = random.integers(1, end or vocabulary, (2, length))
        if end is not None:
            tokens[0, 9], tokens[0, 10:], tokens[1, -1] = end, 0, end
        batch["tokens"], call["input_ids"] = tokens, torch.from_numpy(tokens)
    if row.masked:
        mask = np.zeros((2, *size), bool)
        mask[0, :, : round(0.8 * size[1])] = mask[1, : round(0.7 * size[0])] = True
        image *= mask[:, None]
        batch["image_mask"] = mask
        call["pixel_mask"] = torch.from_numpy(mask.astype(np.int64))
    if row.hidden:
        patch = loaded.module.backbone.patch
        h, w = size[0] // patch, size[1] // patch
        order = np.random.default_rng(2).permutation(h * w)
        flat = order < math.ceil(row.hidden * h * w)
        batch["patch_mask"] = flat.reshape(1, h, w)
        if hasattr(model, "patchify"):  # MAE's, which sorts noise: the lowest are seen
            call["noise"] = torch.from_numpy(-order[None].astype(np.float32))
        else:
            call["bool_masked_pos"] = torch.from_numpy(flat[None])
    image = image.astype(np.float32)
    with torch.no_grad():
        given = torch.from_numpy(image)
        theirs = model(given, **call) if row.peer == "timm" else model(pixel_values=given, **call)
    pairs = zip(_ours(loaded(image=image.transpose(0, 2, 3, 1), **batch)), _theirs(theirs))
    # A peer may have patches in a row where ours lie on their grid.
    return float(max(np.abs(a.reshape(b.shape) - b).max() / np.abs(b).max() for a, b in pairs))


def _ours(outputs: Any) -> list[np.ndarray]:
    """Logits or a description; of a detector boxes too, and masks where there are such."""
    if isinstance(outputs, dict):
        parts = ("logits", "boxes", "masks", "image_embedding", "text_embedding")
        return [np.asarray(outputs[part]) for part in parts if part in outputs]
    return [np.asarray(getattr(outputs, "pooled", outputs))]


def _theirs(outputs: Any) -> list[np.ndarray]:
    """The same of a peer, in our order of axes."""
    if hasattr(outputs, "image_embeds"):
        return [outputs.image_embeds.numpy(), outputs.text_embeds.numpy()]
    if hasattr(outputs, "pred_boxes"):
        parts = (outputs.logits, outputs.pred_boxes, getattr(outputs, "pred_masks", None))
        return [part.numpy() for part in parts if part is not None]
    if hasattr(outputs, "reconstruction"):
        return [outputs.reconstruction.numpy().transpose(0, 2, 3, 1)]
    if hasattr(outputs, "ids_restore"):  # MAE's patches, the channel fastest
        h = w = round(outputs.logits.shape[1] ** 0.5)
        patches = outputs.logits.unflatten(2, (-1, 3)).unflatten(1, (h, w))
        patches = patches.unflatten(3, (round(patches.shape[3] ** 0.5), -1))
        return [patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2).numpy()]
    logits = getattr(outputs, "logits", outputs).numpy()
    return [logits.transpose(0, 2, 3, 1) if logits.ndim == 4 else logits]  # of pixels


def main(only: str = "", missing: bool = False) -> None:
    """Measures rows, and writes the table of all that are measured.

    Args:
      only: part of their names.
      missing: leaves out those measured already.
    """
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row in ROWS:
        done = missing and f"{row.peer} {row.name}" in known
        if done or only.lower() not in row.name.lower():
            continue
        began = time.monotonic()
        found = measure(row)
        known[f"{row.peer} {row.name}"] = found
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        worst = max(found["differences"].values())
        seconds = time.monotonic() - began
        print(f"{row.peer} {row.name}: {worst:.1e} ({seconds:.0f} s)", flush=True)
    (ROOT / "docs" / "parity.md").write_text(_table(known))
    bad = [name for name, found in known.items() if max(found["differences"].values()) > LIMIT]
    if bad:
        sys.exit(f"more than {LIMIT:g}: {', '.join(bad)}")


def _table(known: dict[str, Any]) -> str:
    import timm
    import torch
    import transformers

    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    what = (
        "Random weights (biases, norms, statistics and tables too) in the peer's model, saved as "
        "the peer saves them, opened here by `vit_jax.load`, and both asked for logits, in float32 "
        "on a CPU: the largest difference over the largest logit, at the published size and at an "
        f"awkward one. At most {LIMIT:g} is wanted. DETR gets two images of unequal size, padded "
        "to one shape, with a mask; its boxes and masks are compared like its logits, and the "
        "worst of them is told. CLIP and SigLIP get texts too, and models that restore hidden "
        "patches the same mask; transformers' MAE, ViT and Swin of that kind take square pictures "
        "only, and are compared at H != W through the peer's own modules in `tests/models`."
    )
    how = (
        "Command: `python tests/golden/make.py --report`, where PyTorch, timm and transformers are "
        f"installed; `--missing` measures what has no row yet, and leaves the others as they were. "
        f"What ran last: commit {commit.stdout.strip()}, torch {torch.__version__}, timm "
        f"{timm.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}."
    )
    lines = [
        "# Parity with the published code",
        "",
        *textwrap.wrap(what, 120),
        "",
        *textwrap.wrap(how, 120),
        "",
        "| model | published by | parameters | size: difference | size: difference |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = known.get(f"{row.peer} {row.name}")
        if found is None:
            lines.append(f"| {row.name} | {row.peer} | | not run | |")
            continue
        cells = [f"{size}: {value:.1e}" for size, value in found["differences"].items()] + [""]
        start = f"| {row.name} | {row.peer} | {found['parameters']:,} | "
        lines.append(start + " | ".join(cells[:2]) + " |")
    lines += ["", *textwrap.wrap(SETR, 120), "", *textwrap.wrap(WORDS, 120)]
    return "\n".join(lines) + "\n"
