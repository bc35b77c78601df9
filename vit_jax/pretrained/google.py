"""Google's `.npz` files: of the original code and of big_vision, ViT and hybrid ViT."""

import re
from pathlib import Path

import numpy as np

from vit_jax.pretrained import arrays, preprocess
from vit_jax.pretrained.families import vit
from vit_jax.pretrained.opened import Opened, refuse

PREFIXES = ("opt/target/", "params/img/", "params/", "img/")
SCANNED = "Transformer/encoderblock/"  # big_vision's scan over blocks: a leading axis each


def open_file(path: Path, ref: str) -> Opened:
    """A `.npz` file, pre-logits or not, blocks scanned or not.

    Raises:
      CheckpointError: if it is damaged, holds pickled objects, or is no ViT.
    """
    checked = arrays.check_hash(path)
    source = unstacked(_without_prefix(arrays.open_npz(path)))
    recipe = vit.from_npz(source.shapes)
    if recipe is None:
        some = ", ".join(list(source)[:5])
        raise refuse(ref, f"its {len(source)} arrays ({some}, ...) are not those of a ViT")
    remarks = ("the file holds no preprocessing: Google's usual one is assumed",)
    return Opened(
        ref=ref,
        format="Google's npz",
        recipe=recipe,
        arrays=source,
        preprocessing=preprocess.Preprocessing(recipe.preprocessing),
        remarks=recipe.remarks + remarks + ((checked,) if checked else ()),
    )


def _without_prefix(source: arrays.Arrays) -> arrays.Arrays:
    """The parameters alone, where an optimizer's state or another tower lies beside them."""
    for prefix in PREFIXES:
        found = {n.removeprefix(prefix): n for n in source if n.startswith(prefix)}
        if any(name.startswith("embedding/") for name in found):
            return source.renamed(found)
    return source


def unstacked(source: arrays.Arrays) -> arrays.Arrays:
    """Blocks one by one: `encoderblock/x` [L, ...] -> `encoderblock_0/x` [...], ..."""
    scanned = [name for name in source if name.startswith(SCANNED)]
    if not scanned:
        return source
    shapes = {n: s for n, s in source.shapes.items() if not n.startswith(SCANNED)}
    dtypes = {n: source.dtypes[n] for n in shapes}
    for name in scanned:
        layers, *shape = source.shapes[name]
        for i in range(layers):
            one = f"{SCANNED[:-1]}_{i}/{name.removeprefix(SCANNED)}"
            shapes[one], dtypes[one] = tuple(shape), source.dtypes[name]
    kept: dict[str, np.ndarray] = {}  # the last stack, whose layers are asked for one by one

    def get(name: str) -> np.ndarray:
        found = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", name)
        if not found:
            return source[name]
        stack = SCANNED + found[2]
        if stack not in kept:
            kept.clear()
            kept[stack] = source[stack]
        return kept[stack][int(found[1])]

    return arrays.Arrays(shapes, dtypes, get)
