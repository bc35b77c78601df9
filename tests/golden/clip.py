"""Golden outputs of CLIP and SigLIP, made with transformers."""

import tempfile
from pathlib import Path

import numpy as np

from tests.golden.vit import half_state, images, randomise

SIZES = ((16, 16), (12, 20))  # the first is what the positions are made for
LENGTH, WORDS = 7, 31
END = 29  # not the greatest number, so that the two ways to find the end differ
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIZES[0][0],
    "patch_size": 4,
}
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
}


def tokens() -> np.ndarray:
    """Three texts of different lengths, with the greatest number before an end, and two ends."""
    return np.array(
        [
            [1, 5, 30, 7, END, 0, 0],
            [1, END, 0, 0, 0, 0, 0],
            [1, 2, 3, 4, 6, END, END],
        ],
        np.int32,
    )


def models() -> dict:
    """The peers' tiny models, by the names of their files."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    marks = {"bos_token_id": 1, "pad_token_id": 0}
    clip = CLIPConfig(
        text_config=TEXT | marks | {"eos_token_id": END}, vision_config=VISION, projection_dim=12
    )
    old = CLIPConfig(
        text_config=TEXT | marks | {"eos_token_id": 2, "hidden_act": "gelu"},
        vision_config=VISION | {"hidden_act": "gelu"},
        projection_dim=12,
    )
    text = TEXT | {"hidden_size": 24, "num_attention_heads": 3, "projection_size": 24}
    siglip = SiglipConfig(text_config=text | marks | {"eos_token_id": END}, vision_config=VISION)
    return {
        "clip_tiny": CLIPModel(clip),
        "clip_old_tiny": CLIPModel(old),
        "siglip_tiny": SiglipModel(siglip),
    }


def make(folder: Path) -> None:
    """Writes a file for each: config, weights, names in a file, images, texts, outputs."""
    import torch
    from safetensors import safe_open

    for name, model in models().items():
        model.eval()
        with torch.no_grad():
            randomise(model, seed=0)
            # Unlike 0 and 1, and exact in float16.
            model.logit_scale.fill_(1.25)
            if hasattr(model, "logit_bias"):
                model.logit_bias.fill_(-2.5)
            arrays = half_state(model) | {"tokens": tokens()}
            for i, size in enumerate(SIZES):
                image = images(i, size)
                out = model(
                    input_ids=torch.from_numpy(tokens().astype(np.int64)),
                    pixel_values=torch.from_numpy(image.astype(np.float32)),
                    output_hidden_states=True,
                    interpolate_pos_encoding=i > 0,
                )
                arrays[f"{i}/image"] = image.transpose(0, 2, 3, 1)
                for block, x in enumerate(out.vision_model_output.hidden_states[1:]):
                    arrays[f"{i}/block_{block}"] = x.numpy()
                if i == 0:
                    for block, x in enumerate(out.text_model_output.hidden_states[1:]):
                        arrays[f"text/block_{block}"] = x.numpy()
                    arrays["text_embedding"] = out.text_embeds.numpy()
                arrays[f"{i}/image_embedding"] = out.image_embeds.numpy()
                arrays[f"{i}/logits"] = out.logits_per_image.numpy()
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            with safe_open(Path(place) / "model.safetensors", "numpy") as opened:
                arrays["names"] = np.array(sorted(opened.keys()))
            arrays["config"] = np.array((Path(place) / "config.json").read_text())
        np.savez_compressed(folder / f"{name}.npz", **arrays)
