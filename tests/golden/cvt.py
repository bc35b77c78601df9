"""Golden outputs of CvT, made with PyTorch and transformers; read back with numpy alone."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.golden.swin import half_state, leaf_name, ours, put, randomise

# The port reads the drop-path rate of block s of stage s, so stage s needs that many blocks.
WIDTHS, DEPTHS, HEADS = (8, 16, 24), (1, 2, 3), (1, 2, 4)
SIZES = ((48, 48), (50, 62))
ACTIVATIONS = ("quick_gelu", "gelu")  # as the authors trained, as the port computes

IN_STAGE = {
    "embedding.convolution_embeddings.projection": "embed",
    "embedding.convolution_embeddings.normalization": "embed_norm",
}
IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp/fc1",
    "output.dense": "mlp/fc2",
    "attention.output.dense": "attention/out",
}
for _part in ("query", "key", "value"):
    _conv = f"attention.attention.convolution_projection_{_part}.convolution_projection"
    IN_BLOCK[f"attention.attention.projection_{_part}"] = f"attention/{_part}"
    IN_BLOCK[f"{_conv}.convolution"] = f"conv_{_part}/conv"
    IN_BLOCK[f"{_conv}.normalization"] = f"conv_{_part}/norm"


def variables(state: Mapping[str, np.ndarray]) -> dict:
    """A `CvtForImageClassification`'s state dict, head aside, -> the variables of `CvT`."""
    tree: dict = {"params": {}, "batch_stats": {}}
    for name, array in state.items():
        name = name.removeprefix("cvt.")
        if name.startswith("classifier."):
            continue
        if found := re.fullmatch(r"encoder\.stages\.(\d+)\.cls_token", name):
            put(tree["params"], f"stage_{int(found[1]) + 1}/class_token", array)
            continue
        module, leaf = name.rsplit(".", 1)
        collection = "batch_stats" if leaf.startswith("running_") else "params"
        put(tree[collection], f"{_module(module)}/{leaf_name(leaf, array)}", ours(array))
    return tree


def _module(name: str) -> str:
    if name == "layernorm":
        return "norm"
    stage, rest = re.fullmatch(r"encoder\.stages\.(\d+)\.(.+)", name).groups()
    if rest in IN_STAGE:
        return f"stage_{int(stage) + 1}/{IN_STAGE[rest]}"
    block, rest = re.fullmatch(r"layers\.(\d+)\.(.+)", rest).groups()
    return f"stage_{int(stage) + 1}/block_{block}/{IN_BLOCK[rest]}"


def set_activation(model, name: str) -> None:
    """Makes the port compute `name` in its MLPs: it knows only the exact GELU."""
    import torch
    from transformers.activations import QuickGELUActivation

    for module in model.modules():
        if type(module).__name__ == "CvtIntermediate":
            module.activation = QuickGELUActivation() if name == "quick_gelu" else torch.nn.GELU()


def make(folder: Path) -> None:
    """Writes `cvt_tiny.npz`: weights, images, and maps and class token with both activations."""
    import torch
    from transformers import CvtConfig, CvtForImageClassification

    config = CvtConfig(embed_dim=WIDTHS, depth=DEPTHS, num_heads=HEADS, num_labels=1)
    model = CvtForImageClassification(config).eval()
    with torch.no_grad():
        randomise(model, seed=0)
    arrays = half_state(model)
    for case, size in enumerate(SIZES):
        image = np.random.default_rng(case).normal(size=(2, 3, *size)).astype(np.float16)
        arrays[f"{case}/image"] = image.transpose(0, 2, 3, 1)
        for activation in ACTIVATIONS:
            set_activation(model, activation)
            with torch.no_grad():
                out = model.cvt(
                    torch.from_numpy(image.astype(np.float32)), output_hidden_states=True
                )
                pooled = model.layernorm(out.cls_token_value)[:, 0]
            for i, stage in enumerate(out.hidden_states):
                arrays[f"{case}/{activation}/map_{i}"] = stage.numpy().transpose(0, 2, 3, 1)
            arrays[f"{case}/{activation}/pooled"] = pooled.numpy()
    np.savez_compressed(folder / "cvt_tiny.npz", **arrays)
