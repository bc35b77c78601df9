"""Golden outputs of ViT, DeiT and hybrid ViT, made with PyTorch, timm and transformers; read back
with numpy alone."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_jax.build import build
from vit_jax.pretrained import names
from vit_jax.pretrained.families import vit
from vit_jax.pretrained.recipe import Recipe

WIDTH, DEPTH, HEADS, CLASSES, STEM_WIDTH = 24, 2, 3, 5, 32
DEIT_SIZES = ((16, 16), (24, 40))


@dataclass(frozen=True)
class Case:
    """One model of timm, and the sizes of the images it sees; the first is what its positions are
    for."""

    patch: int
    stem: tuple[int, ...] | None
    sizes: tuple[tuple[int, int], ...]
    source: str = "google"
    pooling: str = "token"


# 29x46 divides by nothing: each convolution and the pooling pad on their own.
CASES = {
    "vit_tiny": Case(8, None, ((32, 32), (40, 56))),
    "vit_mean_norm": Case(4, None, ((8, 8), (12, 20)), pooling="mean_norm"),
    "vit_hybrid": Case(1, (2, 1), ((32, 32), (29, 46))),
    "vit_root": Case(4, (), ((32, 32), (48, 62))),
    "vit_root_timm": Case(2, (), ((16, 16), (22, 30)), source="timm"),
}


def state_of(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict in a golden file, as float32."""
    prefix = "state/"
    found = (name for name in arrays if name.startswith(prefix))
    return {name.removeprefix(prefix): arrays[name].astype(np.float32) for name in found}


def recipe(name: str, arrays: Mapping[str, np.ndarray]) -> Recipe:
    """What the public code makes of a case's state dict; heads are not in it."""
    state = state_of(arrays)
    found = vit.from_state({k: v.shape for k, v in state.items()}, name)
    found.backbone.update(heads=HEADS)
    if CASES[name].stem is not None:
        found.backbone.update(stem_source=CASES[name].source)
    return found


def model_of(found: Recipe):
    """The module of a recipe with a head."""
    return build(found.classifier | {"backbone": found.backbone, "num_classes": found.num_classes})


def variables(found: Recipe, shapes, arrays: Mapping[str, np.ndarray]) -> dict:
    """A golden file's state dict -> the variables of a model, by the public table."""
    return names.read(found.table, shapes, state_of(arrays))


def build_timm(case: Case):
    """timm's model; for Google its CNN has the standardisation and epsilons of Google's code."""
    from functools import partial

    from timm.layers import GroupNormAct, HybridEmbed, StdConv2dSame
    from timm.layers.padding import pad_same
    from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
    from timm.models.vision_transformer import VisionTransformer
    from torch.nn.functional import conv2d

    class GoogleConv(StdConv2dSame):
        """timm adds 1e-8 to the variance, Google 1e-5 to the deviation."""

        def forward(self, x):
            axes = (1, 2, 3)
            centred = self.weight - self.weight.mean(axes, keepdim=True)
            deviation = self.weight.std(axes, correction=0, keepdim=True)
            weight = centred / (deviation + 1e-5)
            return conv2d(pad_same(x, self.kernel_size, self.stride), weight, stride=self.stride)

    options = {"global_pool": "avg"} if case.pooling == "mean_norm" else {}
    if case.stem is not None:
        shared = {"stem_type": "same", "preact": False}
        if case.source == "google":
            shared["conv_layer"] = GoogleConv
            shared["norm_layer"] = partial(GroupNormAct, num_groups=32, eps=1e-6)
        else:
            shared["conv_layer"] = partial(StdConv2dSame, eps=1e-8)
        if case.stem:
            channels = tuple(4 * STEM_WIDTH * 2**i for i in range(len(case.stem)))
            backbone = ResNetV2(
                case.stem, channels, num_classes=0, global_pool="", stem_chs=STEM_WIDTH, **shared
            )
        else:
            backbone = create_resnetv2_stem(3, STEM_WIDTH, **shared)
        options["embed_layer"] = partial(HybridEmbed, backbone=backbone)
    return VisionTransformer(
        img_size=case.sizes[0],
        patch_size=case.patch,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        dynamic_img_size=True,
        **options,
    ).eval()


def randomise(model, seed: int) -> None:
    """Gives every parameter a value of few bits: exact in float16, and small once compressed.

    Matrices keep about the scale of their input; nothing is left at 0 or 1, so that a parameter
    that was forgotten shows.
    """
    import torch

    random = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        value = np.round(8 * random.normal(size=tuple(tensor.shape))) / 8
        if tensor.ndim == 1:
            value = value / 4 + name.endswith("weight")
        elif not any(part in name for part in ("token", "pos_embed", "position")):
            value *= 2.0 ** -round(np.log2(np.prod(tensor.shape[1:])) / 2)
        tensor.copy_(torch.from_numpy(np.asarray(value)))


def half_state(model) -> dict[str, np.ndarray]:
    """The state dict as float16."""
    return {
        f"state/{name}": tensor.numpy().astype(np.float16)
        for name, tensor in model.state_dict().items()
    }


def images(i: int, size: tuple[int, int]) -> np.ndarray:
    """[1, 3, H, W] of case i, exact in float16."""
    return np.random.default_rng(i).normal(size=(1, 3, *size)).astype(np.float16)


def hf_arrays(model, sizes: tuple[tuple[int, int], ...], **call) -> dict[str, np.ndarray]:
    """What is known of a model of transformers: config, weights, names in a file, outputs.

    Args:
      model: with a head.
      sizes: of the images; the first is what its positions are for.
      **call: further arguments at other sizes.
    """
    import torch
    from safetensors import safe_open

    with torch.no_grad():
        randomise(model, seed=0)
        arrays = half_state(model)
        for i, size in enumerate(sizes):
            image = images(i, size)
            out = model(
                torch.from_numpy(image.astype(np.float32)),
                output_hidden_states=True,
                **(call if i else {}),
            )
            arrays[f"{i}/image"] = image.transpose(0, 2, 3, 1)
            for block, tokens in enumerate(out.hidden_states[1:]):
                arrays[f"{i}/block_{block}"] = tokens.numpy()
            arrays[f"{i}/logits"] = out.logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "numpy") as opened:
            arrays["names"] = np.array(sorted(opened.keys()))
        arrays["config"] = np.array((Path(folder) / "config.json").read_text())
    return arrays


def config_of(arrays: Mapping[str, np.ndarray]) -> dict:
    """The config.json in a golden file."""
    return json.loads(str(arrays["config"]))


def make(folder: Path) -> None:
    """Writes a file for each case: weights, images, and what comes out of each stage."""
    import torch
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    for name, case in CASES.items():
        model = build_timm(case)
        watched = {"dropout": model.pos_drop, "head": model.head}
        watched["norm"] = model.fc_norm if case.pooling == "mean_norm" else model.norm
        watched |= {f"block_{i}": block for i, block in enumerate(model.blocks)}
        if case.stem:
            stages = model.patch_embed.backbone.stages
            watched |= {f"stem/stage_{i + 1}": stage for i, stage in enumerate(stages)}
        elif case.stem is not None:
            watched["stem"] = model.patch_embed.backbone
        seen: dict = {}

        def watch(path: str, seen: dict = seen):
            return lambda module, inputs, output: seen.update({path: output.numpy()})

        for path, module in watched.items():
            module.register_forward_hook(watch(path))
        with torch.no_grad():
            randomise(model, seed=0)
            arrays = half_state(model)
            for i, size in enumerate(case.sizes):
                image = images(i, size)
                model(torch.from_numpy(image.astype(np.float32)))
                arrays[f"{i}/image"] = image.transpose(0, 2, 3, 1)
                for path, array in seen.items():
                    maps = array.ndim == 4
                    arrays[f"{i}/{path}"] = array.transpose(0, 2, 3, 1) if maps else array
        np.savez_compressed(folder / f"{name}.npz", **arrays)

    config = DeiTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=40,
        image_size=DEIT_SIZES[0],
        patch_size=4,
        num_labels=CLASSES,
    )
    model = DeiTForImageClassificationWithTeacher(config).eval()
    arrays = hf_arrays(model, DEIT_SIZES, interpolate_pos_encoding=True)
    np.savez_compressed(folder / "deit_tiny.npz", **arrays)
