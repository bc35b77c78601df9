"""Golden outputs of UPerNet, made with PyTorch and transformers; read back with numpy alone."""

from pathlib import Path

import numpy as np

from tests.golden.swin import half_state, randomise

WIDTH, DEPTHS, HEADS, WINDOW = 4, (1, 1, 1, 1), (1, 1, 2, 2), 3
FEATURES, HELP, CLASSES = 4, 3, 2
SIZES = ((32, 32), (26, 42))  # the second divides by nothing


def make(folder: Path) -> None:
    """Writes `upernet_tiny.npz`: weights, images, what the heads make of them."""
    import torch
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = SwinConfig(
        embed_dim=WIDTH,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        out_features=[f"stage{i + 1}" for i in range(len(DEPTHS))],
    )
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=FEATURES,
        auxiliary_channels=HELP,
        num_labels=CLASSES,
    )
    model = UperNetForSemanticSegmentation(config).eval()
    seen: dict[str, np.ndarray] = {}

    def watch(name: str):
        def hook(module, inputs, output) -> None:
            seen[name] = output.numpy().transpose(0, 2, 3, 1)

        return hook

    for name, module in (
        ("bottleneck", model.decode_head.bottleneck),
        ("lateral_0", model.decode_head.lateral_convs[0]),
        ("head", model.decode_head.fpn_bottleneck),
        ("auxiliary", model.auxiliary_head.convs),
    ):
        module.register_forward_hook(watch(name))
    with torch.no_grad():
        randomise(model, seed=0)
    arrays = half_state(model)
    for case, size in enumerate(SIZES):
        image = np.random.default_rng(case).normal(size=(1, 3, *size))
        image = (np.round(2 * image) / 2).astype(np.float16)
        with torch.no_grad():
            out = model(torch.from_numpy(image.astype(np.float32)))
        arrays[f"{case}/image"] = image.transpose(0, 2, 3, 1)
        arrays |= {f"{case}/{name}": array for name, array in seen.items()}
        arrays[f"{case}/logits"] = out.logits.numpy().transpose(0, 2, 3, 1)
    np.savez_compressed(folder / "upernet_tiny.npz", **arrays)
