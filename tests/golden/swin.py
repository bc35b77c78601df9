"""Golden outputs of Swin, made with PyTorch and transformers; read back with numpy alone."""

from pathlib import Path

import numpy as np

WIDTH, DEPTHS, HEADS, WINDOW = 8, (2, 2, 2), (2, 2, 4), 3
# The second divides by nothing: patches, windows and patch merging all have to pad.
SIZES = ((48, 48), (50, 62))


def leaf_name(leaf: str, array: np.ndarray) -> str:
    """PyTorch's name of an array in a module -> Flax's."""
    if leaf == "weight":
        return "scale" if array.ndim == 1 else "kernel"
    return {"bias": "bias", "running_mean": "mean", "running_var": "var"}[leaf]


def ours(array: np.ndarray) -> np.ndarray:
    """PyTorch's axes (out, in, height, width) -> Flax's (height, width, in, out)."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def put(tree: dict, path: str, array: np.ndarray) -> None:
    """Puts `array` into nested dicts at `a/b/c`."""
    *folders, leaf = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[leaf] = np.asarray(array, np.float32)


def randomise(model, seed: int) -> None:
    """Gives every parameter and statistic a value of few bits: exact in float16, and small once
    compressed.

    Matrices keep about the scale of their input; nothing is left at 0 or 1, so that a parameter
    that was forgotten shows.
    """
    import torch

    random = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if not tensor.is_floating_point():
            continue
        value = np.round(8 * random.normal(size=shape)) / 8
        if name.endswith("running_var"):
            value = 0.5 + np.round(8 * random.uniform(size=shape)) / 8
        elif tensor.ndim == 1:
            value = value / 4 + name.endswith("weight")
        elif not name.endswith(("bias_table", "cls_token", "logit_scale")):
            value *= 2.0 ** -round(np.log2(np.prod(shape[1:])) / 2)
        tensor.copy_(torch.from_numpy(value))


def half_state(model) -> dict[str, np.ndarray]:
    """The state dict as float16, without PyTorch's counters of batches."""
    return {
        f"state/{name}": tensor.numpy().astype(np.float16)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def make(folder: Path) -> None:
    """Writes `swin_tiny.npz`: weights, images, each stage's map and the pooled vector."""
    import torch
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        embed_dim=WIDTH,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        image_size=SIZES[0],
        drop_path_rate=0.0,
    )
    arrays: dict[str, np.ndarray] = {}
    for case, size in enumerate(SIZES):
        # A new model for each size: once its window has shrunk for a small map, it stays small.
        model = SwinModel(config).eval()
        with torch.no_grad():
            randomise(model, seed=0)
            image = np.random.default_rng(case).normal(size=(1, 3, *size)).astype(np.float16)
            out = model(
                torch.from_numpy(image.astype(np.float32)),
                output_hidden_states=True,
                output_hidden_states_before_downsampling=True,
            )
        arrays |= half_state(model)
        arrays[f"{case}/image"] = image.transpose(0, 2, 3, 1)
        for i, stage in enumerate(out.reshaped_hidden_states[1:]):
            arrays[f"{case}/map_{i}"] = stage.numpy().transpose(0, 2, 3, 1)
        arrays[f"{case}/pooled"] = out.pooler_output.numpy()
    np.savez_compressed(folder / "swin_tiny.npz", **arrays)
