"""Golden outputs of CvT, made with PyTorch and transformers; read back with numpy alone."""

from pathlib import Path

import numpy as np

from tests.golden.swin import half_state, randomise

# The port reads the drop-path rate of block s of stage s, so stage s needs that many blocks.
WIDTHS, DEPTHS, HEADS = (4, 8, 12), (1, 2, 3), (1, 2, 4)
SIZES = ((48, 48), (50, 62))
ACTIVATIONS = ("quick_gelu", "gelu")  # as the authors trained, as the port computes


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
        image = np.random.default_rng(case).normal(size=(1, 3, *size)).astype(np.float16)
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
