"""Golden outputs of Swin, made with PyTorch and transformers; read back with numpy alone."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

WIDTH, DEPTHS, HEADS, WINDOW = 8, (2, 2, 2), (2, 2, 4), 3
# The second divides by nothing: patches, windows and patch merging all have to pad.
SIZES = ((48, 48), (50, 62))

# Published names -> ours; the first that matches the whole name counts.
NAMES = (
    (r"embeddings\.patch_embeddings\.projection", "embed"),
    (r"embeddings\.norm", "embed_norm"),
    (r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.(.+)", "stage_{0}/block_{1}/{rest}"),
    (r"encoder\.layers\.(\d+)\.downsample\.(norm|reduction)", "stage_{next}/merge/{1}"),
    (r"layernorm", "norm"),
)
IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp/fc1",
    "mlp.fc2": "mlp/fc2",
    "attention.q_proj": "attention/query",
    "attention.k_proj": "attention/key",
    "attention.v_proj": "attention/value",
    "attention.o_proj": "attention/out",
}
TABLE = re.compile(
    r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.relative_position_bias"
    r"\.relative_position_bias_table"
)


def variables(state: Mapping[str, np.ndarray]) -> dict:
    """A `SwinModel`'s state dict -> the variables of `vit_jax.models.swin.Swin`."""
    params: dict = {}
    for name, array in state.items():
        if found := TABLE.fullmatch(name):
            stage, block = (int(group) for group in found.groups())
            path = f"stage_{stage + 1}/block_{block}/relative_position_bias"
        else:
            module, leaf = name.rsplit(".", 1)
            path = f"{_module(module)}/{leaf_name(leaf, array)}"
            array = ours(array)
        put(params, path, array)
    return {"params": params}


def _module(name: str) -> str:
    for pattern, path in NAMES:
        if found := re.fullmatch(pattern, name):
            groups = list(found.groups())
            stage = int(groups[0]) if groups else 0
            rest = IN_BLOCK[groups[2]] if len(groups) == 3 else ""
            later = groups[1:2]
            return path.format(stage + 1, *later, rest=rest, next=stage + 2)
    raise KeyError(name)


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
    """Gives every parameter and running statistic a value that float16 holds exactly.

    Matrices keep the scale of their input; nothing is left at 0 or 1, so that a parameter that
    was forgotten shows.
    """
    import torch

    random = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            value = random.uniform(0.5, 1.5, shape)
        elif name.endswith("bias_table") or "cls_token" in name:
            value = random.normal(size=shape)
        elif tensor.ndim > 1:
            value = random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        else:
            value = 0.2 * random.normal(size=shape) + name.endswith("weight")
        tensor.copy_(torch.from_numpy(value.astype(np.float16).astype(np.float32)))


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
            image = np.random.default_rng(case).normal(size=(2, 3, *size)).astype(np.float16)
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
