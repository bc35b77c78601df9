"""Parameters for another image size, window or layout of blocks: what fine-tuning starts from."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.errors import CheckpointError
from vit_jax.layers.position import resize_grid

Paths = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
TABLE = "bicubic_torch"  # how Swin's authors resample tables of position biases


def fit(paths: Paths, wanted: Shapes, module: nn.Module) -> tuple[Paths, list[str]]:
    """Resamples what depends on the image's or a window's size, where the shapes differ.

    Args:
      paths: arrays by our path.
      wanted: shapes by our path, of `module`.
      module: whose fields name the resizer.

    Returns:
      Arrays of the wanted shapes, and what was resampled, from what to what.

    Raises:
      CheckpointError: if another shape differs, naming all.
    """
    old = {path: tuple(array.shape) for path, array in paths.items()}
    wrong = [
        f"{path} {shape}, wanted {tuple(wanted[path])}"
        for path, shape in old.items()
        if shape != tuple(wanted.get(path, shape))
        and not resizable(path, shape, wanted[path], module)
    ]
    if wrong:
        raise CheckpointError(f"{len(wrong)} shapes do not fit: {', '.join(wrong[:8])}")
    fitted = {
        path: array
        if old[path] == tuple(wanted.get(path, old[path]))
        else _resampled(path, array, wanted[path], module)
        for path, array in paths.items()
    }
    return fitted, sentences(old, wanted, module)


def sentences(old: Shapes, wanted: Shapes, module: nn.Module) -> list[str]:
    """What is resampled between two sets of shapes, from what to what, for a person."""
    told: dict[str, int] = {}
    for path, shape in old.items():
        new = tuple(wanted.get(path, shape))
        if new == tuple(shape):
            continue
        method = _method(module)
        if path.endswith("position/grid"):
            what, sides = "positions", (shape[:2], new[:2])
        else:
            what, sides = "position biases", (_sides(shape[0])[0], _sides(new[0], module)[0])
        grids = [f"{side[0]}x{side[1]}" for side in sides]
        text = f"{what} resampled from {grids[0]} to {grids[1]} ({method})"
        told[text] = told.get(text, 0) + 1
    return [text if n == 1 else f"{text} in {n} blocks" for text, n in told.items()]


def _method(module: nn.Module) -> str:
    return getattr(getattr(module, "backbone", module), "position_resize", TABLE)


def resizable(path: str, old: tuple[int, ...], new: tuple[int, ...], module: nn.Module) -> bool:
    """Whether a parameter is a map of places that can be resampled to the shape in a module."""
    if len(old) != len(new) or old[-1] != new[-1]:
        return False
    if path.endswith("position/grid"):
        return True
    known = _sides(old[0]) and _sides(new[0], module)
    return path.endswith("relative_position_bias") and known is not None


def _resampled(path: str, array: Array, shape: tuple[int, ...], module: nn.Module) -> jax.Array:
    numbers, method = jnp.asarray(array, jnp.float32), _method(module)
    if path.endswith("position/grid"):
        return resize_grid(numbers, shape[:2], method).astype(array.dtype)
    (old, _), (new, _) = _sides(array.shape[0]), _sides(shape[0], module)
    offsets, rest = numbers[: old[0] * old[1]], numbers[old[0] * old[1] :]
    offsets = resize_grid(offsets.reshape(*old, -1), new, method).reshape(-1, shape[1])
    return jnp.concatenate([offsets, rest]).astype(array.dtype)


def _sides(rows: int, module: nn.Module | None = None) -> tuple[tuple[int, int], int] | None:
    """(sides of a table of offsets, rows behind it); None if it is none.

    A table is square and its sides are odd, unless the module's image is not square. BEiT has three
    more rows for its class token.
    """
    for extra in (0, 3):
        side = round((rows - extra) ** 0.5)
        if side % 2 and side * side == rows - extra:
            return (side, side), extra
    backbone = getattr(module, "backbone", module)
    size, patch = getattr(backbone, "image_size", 0), getattr(backbone, "patch", 0)
    if isinstance(size, tuple) and patch:
        tall, wide = (2 * (side // patch) - 1 for side in size)
        if tall * wide <= rows <= tall * wide + 3:
            return (tall, wide), rows - tall * wide
    return None


def unstacked(paths: Mapping[str, Any]) -> Paths:
    """Scanned blocks one by one: `blocks/x` [L, ...] -> `block_0/x` [...], ...

    A pair of Swin's, `blocks/block_1/x`, becomes `block_1/x`, `block_3/x`, ...
    """
    found = {}
    for path, array in paths.items():
        match = re.fullmatch(r"(.*/)blocks/(?:block_(\d+)/)?(.*)", path)
        if not match:
            found[path] = array
            continue
        before, inner, rest = match.groups()
        pairs = _pairs(paths, before) if inner is not None else 1
        for i in range(array.shape[0]):
            one = (
                jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
                if isinstance(array, jax.ShapeDtypeStruct)
                else array[i]
            )
            found[f"{before}block_{pairs * i + int(inner or 0)}/{rest}"] = one
    return found


def stacked_like(paths: Mapping[str, Any], wanted: Mapping[str, Any]) -> Paths:
    """Blocks one by one -> as `wanted` has them, one by one or scanned."""
    found = {}
    for path, like in wanted.items():
        match = re.fullmatch(r"(.*/)blocks/(?:block_(\d+)/)?(.*)", path)
        if not match:
            found[path] = paths[path]
            continue
        before, inner, rest = match.groups()
        pairs = _pairs(wanted, before) if inner is not None else 1
        layers = [
            paths[f"{before}block_{pairs * i + int(inner or 0)}/{rest}"]
            for i in range(like.shape[0])
        ]
        found[path] = jnp.stack(layers)
    return found


def _pairs(paths: Mapping[str, Any], before: str) -> int:
    """How many blocks one round of a scan holds."""
    pattern = re.compile(re.escape(before) + r"blocks/block_(\d+)/")
    return 1 + max(int(m[1]) for m in map(pattern.match, paths) if m)
