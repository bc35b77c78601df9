"""Golden outputs of BEiT, made with transformers."""

from pathlib import Path

import numpy as np

from tests.golden.vit import hf_arrays

SIZES = ((16, 16), (12, 20))  # the first is what the tables are made for


def make(folder: Path) -> None:
    """Writes `beit_tiny.npz`: config, weights, images, each block's tokens and the logits."""
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=SIZES[0][0],
        patch_size=4,
        num_labels=5,
        use_relative_position_bias=True,
        layer_scale_init_value=0.5,
        drop_path_rate=0.0,
    )
    model = BeitForImageClassification(config).eval()
    np.savez_compressed(folder / "beit_tiny.npz", **hf_arrays(model, SIZES))
