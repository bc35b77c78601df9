"""Golden outputs of ViT and hybrid ViT, made with PyTorch and timm; read back with numpy alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.golden.swin import half_state, leaf_name, ours, put

WIDTH, DEPTH, HEADS, CLASSES, STEM_WIDTH = 24, 2, 3, 5, 32


@dataclass(frozen=True)
class Case:
    """One model, and the sizes of the images it sees; the first is what its positions are for."""

    patch: int
    stem: tuple[int, ...] | None
    sizes: tuple[tuple[int, int], ...]


# 29x46 divides by nothing: each convolution and the pooling pad on their own.
CASES = {
    "vit_tiny": Case(8, None, ((32, 32), (40, 56))),
    "vit_hybrid": Case(1, (2, 1), ((32, 32), (29, 46))),
    "vit_root": Case(4, (), ((32, 32), (48, 62))),
}

IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention/out",
    "mlp.fc1": "mlp/fc1",
    "mlp.fc2": "mlp/fc2",
}
IN_BOTTLENECK = {"downsample.conv": "shortcut_conv", "downsample.norm": "shortcut_norm"}


def variables(state: Mapping[str, np.ndarray]) -> dict:
    """The state dict of timm's `VisionTransformer` -> the variables of `Classifier(ViT)`."""
    backbone: dict = {}
    params: dict = {"backbone": backbone}
    for name, array in state.items():
        if name == "cls_token":
            put(backbone, "class_token", array)
        elif name == "pos_embed":
            side = round((array.shape[1] - 1) ** 0.5)
            put(backbone, "position/token", array[0, :1])
            put(backbone, "position/grid", array[0, 1:].reshape(side, side, -1))
        elif found := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            leaf = leaf_name(found[2], array)
            for part, third in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                put(backbone, f"block_{found[1]}/attention/{part}/{leaf}", ours(third))
        else:
            module, leaf = name.rsplit(".", 1)
            tree = params if module == "head" else backbone
            put(tree, f"{_module(module)}/{leaf_name(leaf, array)}", ours(array))
    return {"params": params}


def _module(name: str) -> str:
    if name in ("norm", "head"):
        return name
    if name == "patch_embed.proj":
        return "embed/proj"
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        return f"block_{found[1]}/{IN_BLOCK[found[2]]}"
    name = name.removeprefix("patch_embed.backbone.")
    if found := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name):
        stage, block, rest = found.groups()
        return f"stem/stage_{int(stage) + 1}/block_{block}/{IN_BOTTLENECK.get(rest, rest)}"
    return f"stem/root_{name.removeprefix('stem.')}"


def build(case: Case):
    """timm's model, its CNN with the standardisation and the epsilons of Google's code."""
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

    options = {}
    if case.stem is not None:
        shared = {
            "stem_type": "same",
            "preact": False,
            "conv_layer": GoogleConv,
            "norm_layer": partial(GroupNormAct, num_groups=32, eps=1e-6),
        }
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
        elif name not in ("cls_token", "pos_embed"):
            value *= 2.0 ** -round(np.log2(np.prod(tensor.shape[1:])) / 2)
        tensor.copy_(torch.from_numpy(value))


def make(folder: Path) -> None:
    """Writes a file for each case: weights, images, and what comes out of each stage."""
    import torch

    for name, case in CASES.items():
        model = build(case)
        watched = {"dropout": model.pos_drop, "norm": model.norm, "head": model.head}
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
                image = np.random.default_rng(i).normal(size=(1, 3, *size)).astype(np.float16)
                model(torch.from_numpy(image.astype(np.float32)))
                arrays[f"{i}/image"] = image.transpose(0, 2, 3, 1)
                for path, array in seen.items():
                    maps = array.ndim == 4
                    arrays[f"{i}/{path}"] = array.transpose(0, 2, 3, 1) if maps else array
        np.savez_compressed(folder / f"{name}.npz", **arrays)
