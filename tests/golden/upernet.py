"""Golden outputs of UPerNet, made with PyTorch and transformers; read back with numpy alone."""

from pathlib import Path

import numpy as np

from tests.golden.swin import half_state, randomise

WIDTH, DEPTHS, HEADS, WINDOW = 4, (1, 2, 1, 1), (1, 1, 2, 2), 2
FEATURES, HELP, CLASSES = 4, 3, 2
# Nothing divides it, and the last map is larger than a window: a smaller one is padded here, where
# transformers' classifier shrinks the window, as Swin of this package always does.
SIZE = (74, 110)
STEP = 5  # every so many rows and columns of the logits are kept


def make(folder: Path) -> None:
    """Writes `upernet_tiny.npz`: weights, an image, what the heads make of it."""
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
    image = np.random.default_rng(0).normal(size=(1, *SIZE, 3))
    image = np.round(image).astype(np.float16)  # of few bits: small once compressed
    with torch.no_grad():
        out = model(torch.from_numpy(image.astype(np.float32).transpose(0, 3, 1, 2)))
    logits = out.logits.numpy().transpose(0, 2, 3, 1)
    np.savez_compressed(
        folder / "upernet_tiny.npz",
        **half_state(model),
        **seen,
        image=image,
        logits=logits[:, ::STEP, ::STEP],
    )
