"""A tiny ViT as transformers publishes it: the folder of `save_pretrained`, and its logits."""

from pathlib import Path

import numpy as np

from tests.golden.swin import randomise

SIZE = (32, 48)
NAMES = ("cat", "dog", "owl")


def make(folder: Path) -> None:
    """Writes `hf_vit_tiny/` and `hf_vit_tiny.npz`: a picture, the prepared image, the logits."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=8,
        id2label=dict(enumerate(NAMES)),
    )
    model = ViTForImageClassification(config).eval()
    processor = ViTImageProcessor(size={"height": SIZE[0], "width": SIZE[1]})
    picture = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    picture = picture.repeat(6, 0).repeat(5, 1)
    with torch.no_grad():
        randomise(model, seed=0)
        image = processor(images=picture, return_tensors="pt")["pixel_values"]
        logits = model(image).logits
    place = folder / "hf_vit_tiny"
    model.save_pretrained(place)
    processor.save_pretrained(place)
    image = image.numpy().transpose(0, 2, 3, 1)
    np.savez_compressed(
        folder / "hf_vit_tiny.npz", picture=picture, image=image, logits=logits.numpy()
    )
