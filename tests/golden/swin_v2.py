"""Golden outputs of Swin V2, made with PyTorch and transformers; read back with numpy alone."""

from pathlib import Path

import numpy as np

from tests.golden.swin import half_state, randomise

# The last stage's windows are its whole map at the first size, and stay so at the second, where
# patches, windows and patch merging all have to pad.
WIDTH, DEPTHS, HEADS, WINDOW, PRETRAINED = 8, (2, 2), (2, 4), 8, (6, 3)
SIZES = ((48, 48), (50, 62))


def make(folder: Path) -> None:
    """Writes `swin_v2_tiny.npz`: weights, images, each stage's map and the pooled vector."""
    import torch
    from transformers import Swinv2Config, Swinv2Model

    config = Swinv2Config(
        embed_dim=WIDTH,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        pretrained_window_sizes=PRETRAINED,
        image_size=SIZES[0][0],
        drop_path_rate=0.0,
    )
    model = Swinv2Model(config).eval()
    with torch.no_grad():
        randomise(model, seed=0)
    seen: list[np.ndarray] = []

    def watch(stage, inputs, output) -> None:
        before_merging, (height, width, *_) = output[1:3]
        seen.append(before_merging.numpy().reshape(1, height, width, -1))

    for stage in model.encoder.layers:
        stage.register_forward_hook(watch)
    arrays = half_state(model)
    for case, size in enumerate(SIZES):
        image = np.random.default_rng(case).normal(size=(1, 3, *size)).astype(np.float16)
        seen.clear()
        with torch.no_grad():
            out = model(torch.from_numpy(image.astype(np.float32)))
        arrays[f"{case}/image"] = image.transpose(0, 2, 3, 1)
        arrays |= {f"{case}/map_{i}": array for i, array in enumerate(seen)}
        arrays[f"{case}/pooled"] = out.pooler_output.numpy()
    np.savez_compressed(folder / "swin_v2_tiny.npz", **arrays)
