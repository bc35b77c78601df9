"""State dicts: what timm and the authors' own code save, in `.safetensors` or `.pth` files.

Nothing in such a file says what it is: names and shapes have to.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.build import submodules
from vit_jax.pretrained import arrays, preprocess
from vit_jax.pretrained.opened import Opened, refuse


def open_file(path: Path, ref: str) -> Opened:
    """A single file, or the index of a model in several.

    Raises:
      CheckpointError: if it is damaged, or no architecture here has such arrays.
    """
    checked = arrays.check_hash(path)
    if path.suffix in (".safetensors", ".json"):
        source = arrays.open_safetensors(path)
    else:
        source = arrays.open_pth(path)
    return opened(source, ref, path.name, {}, (checked,) if checked else ())


def opened(
    source: arrays.Arrays,
    ref: str,
    name: str,
    config: Mapping[str, Any],
    remarks: tuple[str, ...] = (),
) -> Opened:
    """Recognises a state dict.

    Args:
      source: its arrays.
      ref: what was asked for.
      name: timm's name of the architecture, or the file's, for what shapes do not tell.
      config: timm's config.json, {} where there is none.
      remarks: what is known already.
    """
    for family in families():
        recipe = family.from_state(source.shapes, name)
        if recipe is not None:
            break
    else:
        some = ", ".join(list(source)[:5])
        raise refuse(
            ref, f"its {len(source)} arrays ({some}, ...) are of no architecture that is known here"
        )
    published = config.get("pretrained_cfg")
    if published:
        preprocessing = preprocess.from_timm(published)
    else:
        preprocessing = preprocess.Preprocessing(recipe.preprocessing)
        remarks += ("the file holds no preprocessing: its publisher's usual one is assumed",)
    labels = tuple(config.get("label_names") or (published or {}).get("label_names") or ())
    if len(labels) != recipe.num_classes:
        labels = ()
    return Opened(
        ref=ref,
        format=f"a state dict of {recipe.origin}",
        recipe=recipe,
        arrays=source,
        preprocessing=preprocessing,
        labels=labels,
        remarks=recipe.remarks + remarks,
    )


def families() -> list[Any]:
    """The modules of `vit_jax.pretrained.families`."""
    package = "vit_jax.pretrained.families"
    return [importlib.import_module(f"{package}.{name}") for name in submodules(package)]
