"""Golden outputs of DETR, made with PyTorch and transformers; read back with numpy alone."""

from pathlib import Path

import numpy as np

from tests.golden.swin import half_state, randomise

ROOT, DEPTHS = 2, (1, 1, 1, 1)
# The mask head norms groups of 8: D + A has to be a multiple.
WIDTH, HEADS, HIDDEN, LAYERS, QUERIES, CLASSES = 16, 8, 12, 2, 3, 5
SIZE = (70, 90)  # of the batch; no side of a map divides the one before
REAL = ((70, 61), (45, 90))  # of its two images


def settings() -> dict:
    """Arguments of transformers' config."""
    from transformers import ResNetConfig

    backbone = ResNetConfig(
        embedding_size=ROOT,
        hidden_sizes=[4 * ROOT * 2**i for i in range(len(DEPTHS))],
        depths=DEPTHS,
        out_features=[f"stage{i + 1}" for i in range(len(DEPTHS))],
    )
    return {
        "use_timm_backbone": False,
        "backbone_config": backbone,
        "d_model": WIDTH,
        "num_queries": QUERIES,
        "num_labels": CLASSES,
        **{f"{side}_layers": LAYERS for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": HIDDEN for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
    }


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Two images [2, H, W, 3] of unequal size, padded with zeros, and where they are."""
    mask = np.zeros((2, *SIZE), bool)
    for row, (height, width) in enumerate(REAL):
        mask[row, :height, :width] = True
    # Of few bits: small once compressed.
    image = np.round(2 * np.random.default_rng(0).normal(size=(2, *SIZE, 3))) / 2
    return (image * mask[..., None]).astype(np.float16), mask


def make(folder: Path) -> None:
    """Writes `detr_tiny.npz`: weights, a padded batch, and what each part makes of it."""
    import torch
    from transformers import DetrConfig, DetrForSegmentation

    model = DetrForSegmentation(DetrConfig(**settings())).eval()
    seen: dict[str, np.ndarray] = {}

    def watch(name: str):
        def hook(module, inputs, output) -> None:
            output = output if isinstance(output, torch.Tensor) else output[0]
            seen[name] = output.numpy()

        return hook

    inner = model.detr.model
    inner.input_projection.register_forward_hook(watch("projected"))
    inner.encoder.layers[-1].register_forward_hook(watch("memory"))
    inner.decoder.layers[0].register_forward_hook(watch("decoder_0"))
    model.bbox_attention.register_forward_hook(watch("mask_attention"))
    image, mask = batch()
    with torch.no_grad():
        randomise(model, seed=0)
        out = model(
            torch.from_numpy(image.astype(np.float32).transpose(0, 3, 1, 2)),
            torch.from_numpy(mask.astype(np.int64)),
        )
    np.savez_compressed(
        folder / "detr_tiny.npz",
        **half_state(model),
        image=image,
        mask=mask,
        projected=seen["projected"].transpose(0, 2, 3, 1),
        memory=seen["memory"],
        decoder_0=seen["decoder_0"],
        mask_attention=seen["mask_attention"].transpose(0, 1, 3, 4, 2),
        logits=out.logits.numpy(),
        boxes=out.pred_boxes.numpy(),
        masks=out.pred_masks.numpy(),
    )
