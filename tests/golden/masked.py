"""Golden outputs of models that restore hidden patches, made with transformers."""

import json
import tempfile
from pathlib import Path

import numpy as np

SQUARE, WIDE = (24, 24), (16, 36)  # 36 patches of 4x4 each
SWIN_WIDE = (20, 28)  # maps of 10x14 and 5x7, which windows of 3 do not divide
HIDDEN = 27  # of 36: three quarters
TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": SQUARE[0],
    "patch_size": 4,
}


def masks(grid: tuple[int, int], hidden: int) -> np.ndarray:
    """bool [2, h, w], of which as many are True."""
    random = np.random.default_rng(7)
    flat = np.zeros((2, grid[0] * grid[1]), bool)
    for row in flat:
        row[random.permutation(len(row))[:hidden]] = True
    return flat.reshape(2, *grid)


def images(size: tuple[int, int]) -> np.ndarray:
    """float16 [2, H, W, 3]."""
    return np.random.default_rng(sum(size)).normal(size=(2, *size, 3)).astype(np.float16)


def models() -> dict:
    """Tiny models of transformers."""
    import transformers as peer

    decoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {f"decoder_{k}": v for k, v in decoder.items()} | {"decoder_intermediate_size": 24}
    swin = peer.SwinConfig(
        image_size=SQUARE[0],
        patch_size=2,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
        window_size=3,
        encoder_stride=4,
        drop_path_rate=0.0,
    )
    beit = peer.BeitConfig(
        **TINY,
        vocab_size=11,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.5,
        drop_path_rate=0.0,
    )
    return {
        "mae": peer.ViTMAEForPreTraining(peer.ViTMAEConfig(**TINY, **decoder, norm_pix_loss=True)),
        "vit": peer.ViTForMaskedImageModeling(peer.ViTConfig(**TINY, encoder_stride=4)),
        "swin": peer.SwinForMaskedImageModeling(swin),
        "beit": peer.BeitForMaskedImageModeling(beit),
    }


def outputs(name: str, model, image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The peer's output in our order of axes, and its loss where it tells one.

    Where the peer takes square pictures alone, its modules are called one by one.
    """
    import torch

    size, (h, w) = image.shape[1:3], mask.shape[1:]
    pixels = torch.from_numpy(image.astype(np.float32).transpose(0, 3, 1, 2))
    flat = torch.from_numpy(mask.reshape(len(mask), -1))
    square = size == SQUARE
    if name == "mae":
        # Sorted, this gives the patches that are seen, and then the hidden ones, in their order.
        noise = flat.float() + torch.arange(h * w)[None] / 1000
        if square:
            out = model(pixels, noise=noise)
            return {"output": unpatched(out.logits.numpy(), (h, w)), "loss": out.loss.numpy()}
        made = model.vit.embeddings.image_size
        model.vit.embeddings.image_size = size  # as it would be, were it made for that one
        seen = model.vit(pixels, noise=noise)
        logits = model.decoder(seen.last_hidden_state, seen.ids_restore).logits
        model.vit.embeddings.image_size = made
        return {"output": unpatched(logits.numpy(), (h, w))}
    if name == "beit":
        logits = model(pixels, bool_masked_pos=flat, interpolate_pos_encoding=True).logits
        return {"output": logits.numpy().reshape(len(mask), h, w, -1)}
    if square:
        out = model(pixels, bool_masked_pos=flat)
        return {
            "output": out.reconstruction.numpy().transpose(0, 2, 3, 1),
            "loss": out.loss.numpy(),
        }
    body = getattr(model, name)
    tokens = body(pixels, bool_masked_pos=flat, interpolate_pos_encoding=True).last_hidden_state
    tokens = tokens[:, 1:] if name == "vit" else tokens
    stride = model.config.encoder_stride
    grid = tokens.transpose(1, 2).unflatten(2, (size[0] // stride, size[1] // stride))
    return {"output": model.decoder(grid).numpy().transpose(0, 2, 3, 1)}


def unpatched(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[B, h w, p p 3], the channel fastest, -> [B, H, W, 3]."""
    h, w = grid
    side = round((patches.shape[-1] / 3) ** 0.5)
    cut = patches.reshape(len(patches), h, w, side, side, 3)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(len(patches), h * side, w * side, 3)


def sizes(name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """A square, and another that the peer's modules can do."""
    return SQUARE, SWIN_WIDE if name == "swin" else WIDE


def grid(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a picture's patches."""
    patch = 2 if name == "swin" else 4
    return size[0] // patch, size[1] // patch


def make(folder: Path) -> None:
    """Writes `masked_tiny.npz`: for each model its config, weights, pictures, masks and outputs."""
    import torch
    from safetensors.numpy import load_file

    from tests.golden.swin import randomise

    arrays: dict[str, np.ndarray] = {}
    for name, model in models().items():
        model.eval()
        with torch.no_grad():
            randomise(model, seed=0)
            for case, size in enumerate(sizes(name)):
                image = images(size)
                h, w = grid(name, size)
                mask = masks((h, w), HIDDEN if name == "mae" else h * w // 3)
                found = outputs(name, model, image, mask)
                arrays |= {f"{name}/{case}/image": image, f"{name}/{case}/mask": mask}
                arrays |= {f"{name}/{case}/{k}": v for k, v in found.items()}
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            state = load_file(Path(place) / "model.safetensors")
            config = json.loads((Path(place) / "config.json").read_text())
        arrays |= {f"{name}/state/{k}": v.astype(np.float16) for k, v in state.items()}
        arrays[f"{name}/config"] = np.array(json.dumps(config))
    np.savez_compressed(folder / "masked_tiny.npz", **arrays)
