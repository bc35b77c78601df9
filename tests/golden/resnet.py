"""Golden outputs of ResNet, made with PyTorch and transformers; read back with numpy alone."""

from pathlib import Path

import numpy as np

from tests.golden.swin import half_state, randomise

WIDTH, DEPTHS = 4, (1, 2, 1)
BLOCKS = {"bottleneck": 4, "basic": 1}  # channels of a stage over those of its 3x3
SIZES = ((48, 48), (50, 62))


def make(folder: Path) -> None:
    """Writes `resnet_bottleneck.npz` and `resnet_basic.npz`: weights, images, maps, pooled."""
    import torch
    from transformers import ResNetConfig, ResNetModel

    for block, times in BLOCKS.items():
        config = ResNetConfig(
            embedding_size=WIDTH,
            hidden_sizes=[WIDTH * times * 2**i for i in range(len(DEPTHS))],
            depths=DEPTHS,
            layer_type=block,
        )
        model = ResNetModel(config).eval()
        with torch.no_grad():
            randomise(model, seed=0)
        arrays = half_state(model)
        for case, size in enumerate(SIZES):
            image = np.random.default_rng(case).normal(size=(1, 3, *size)).astype(np.float16)
            with torch.no_grad():
                out = model(torch.from_numpy(image.astype(np.float32)), output_hidden_states=True)
            arrays[f"{case}/image"] = image.transpose(0, 2, 3, 1)
            for i, stage in enumerate(out.hidden_states[1:]):
                arrays[f"{case}/map_{i}"] = stage.numpy().transpose(0, 2, 3, 1)
            arrays[f"{case}/pooled"] = out.pooler_output[:, :, 0, 0].numpy()
        np.savez_compressed(folder / f"resnet_{block}.npz", **arrays)
