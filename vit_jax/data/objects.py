"""A folder of pictures with boxes, in whichever of two forms it is: COCO's or PASCAL VOC's."""

import json
from pathlib import Path
from typing import Any

from vit_jax.contracts import Dataset
from vit_jax.data import coco, voc
from vit_jax.data.folder import SUFFIXES, all_files
from vit_jax.data.masks import existing
from vit_jax.errors import DataError


def open(split: str, *, data_dir: str, validation_share: float = 0.2) -> Dataset:
    """The split "train" or "validation" of a folder, opened as `coco` or as `voc` would.

    A JSON with the lists `images`, `annotations` and `categories` makes it COCO's form, XML files
    make it VOC's. Where neither names its splits, a hash of the pictures' names holds
    `validation_share` out.

    Raises:
      ConfigError: as of `coco` and `voc`.
      DataError: as of these, or if the folder has neither form, saying what it holds instead.
    """
    root = existing(data_dir, "objects")
    shared: dict[str, Any] = {"data_dir": data_dir, "validation_share": validation_share}
    files = all_files(root)
    jsons = [path for path in files if path.suffix.lower() == ".json"]
    if any(_is_coco(path) for path in jsons):
        return coco.open(split, **shared)
    if any(path.suffix.lower() == ".xml" for path in files):
        return voc.open(split, **shared)
    raise DataError(f"{root} {_lacking(root, files, jsons)}")


def _is_coco(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= set(coco.LISTS)


def _lacking(root: Path, files: list[Path], jsons: list[Path]) -> str:
    """What is missing for either form."""
    wanted = (
        "it needs COCO's form (a JSON with the lists images, annotations and categories, such as "
        "annotations/instances_train.json) or VOC's (an XML for each picture)"
    )
    pictures = sum(path.suffix.lower() in SUFFIXES for path in files)
    if not files:
        return f"is empty: {wanted}"
    if jsons:
        shown = ", ".join(path.relative_to(root).as_posix() for path in jsons[:3])
        return f"has {pictures} pictures, but no JSON of boxes ({shown} has none): {wanted}"
    if any(p.suffix == ".txt" and p.parent.name in ("labels", "train", "valid") for p in files):
        return f"has text files of labels, which seem to be YOLO's and are not read: {wanted}"
    return f"has {pictures} pictures and no annotations: {wanted}"
