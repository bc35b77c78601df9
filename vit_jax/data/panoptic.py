"""COCO's panoptic form: a JSON of segments for each split, and a PNG with each pixel's segment."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.contracts import Dataset, Example
from vit_jax.data import coco
from vit_jax.data.folder import SPLITS, read_file
from vit_jax.data.geometry import Pixels, boxes_of_masks, fullest
from vit_jax.data.masks import check_same_size, existing
from vit_jax.errors import ConfigError, DataError, nearest

PREFIX = "panoptic"  # of the JSONs' names


@dataclass(frozen=True)
class Panoptic:
    """Pictures and PNGs as files, read when asked for; what the segments are is in memory.

    An example has `image` (the file's bytes), and for each segment `boxes` [m, 4] around it,
    `box_label` [m], `crowd` [m], `area` float32 [m], its pixels, and `masks` bool [m, H, W]. Stuff,
    such as sky, is an object too, one to a picture.

    Attributes:
      root: the folder that holds the pictures.
      files: their paths below `root`.
      sizes: (height, width) of each, as the JSON says.
      png_root: the folder that holds the PNGs.
      pngs: their names, one for each picture.
      segments: of each picture, (id in the PNG, label, whether it is a crowd) of each segment.
      class_names: by label.
      category_ids: the JSON's id of each label.
      things: labels whose instances count one by one; the rest is stuff.
    """

    root: Path
    files: tuple[str, ...]
    sizes: tuple[Pixels, ...]
    png_root: Path
    pngs: tuple[str, ...]
    segments: tuple[tuple[tuple[int, int, bool], ...], ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    things: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        image, png = (
            read_file(root / name, Path(name).name)
            for root, name in ((self.root, self.files[index]), (self.png_root, self.pngs[index]))
        )
        size = self.sizes[index]
        coco.check_size(image, size)
        ids = read_ids(png)
        check_same_size(ids, image)
        own = self.segments[index]
        known = {number for number, _, _ in own}
        there = {int(number) for number in np.unique(ids)} - {0}
        if there != known:
            number = min(there ^ known)
            where = "only in its PNG" if number in there else "only in the JSON"
            raise DataError(f"the segment with id {number} is {where}")
        masks = np.array([ids == number for number, _, _ in own], bool).reshape(-1, *size)
        return {
            "image": image,
            "boxes": boxes_of_masks(masks),
            "box_label": np.array([label for _, label, _ in own], np.int32),
            "crowd": np.array([crowd for _, _, crowd in own], bool),
            "area": masks.sum((1, 2)).astype(np.float32),
            "masks": masks,
        }

    def size(self, index: int) -> Pixels:
        """(H, W) of a picture."""
        return self.sizes[index]

    def fullest(self) -> tuple[int, int]:
        """The picture with most segments that are no crowds, and how many."""
        return fullest(sum(not crowd for _, _, crowd in own) for own in self.segments)

    def name(self, index: int) -> str:
        """The picture's path, such as `000000000139.jpg`."""
        return self.files[index]


def read_ids(png: bytes) -> np.ndarray:
    """The bytes of a coloured PNG -> the segment of each pixel, int32 [H, W]; 0 is none.

    Kirillov et al. 2019 and COCO: the id is red + 256 green + 256**2 blue.

    Raises:
      DataError: if it is no such picture.
    """
    try:
        with Image.open(io.BytesIO(png)) as opened:
            kind, mode, values = opened.format, opened.mode, np.asarray(opened)
    except Exception as error:  # a reader of foreign bytes may raise anything
        raise DataError(f"its PNG of segments is damaged: {error}") from error
    if kind != "PNG" or mode not in ("RGB", "RGBA"):
        raise DataError(
            f"its segments are a {kind} of mode {mode}: they must be a coloured PNG, whose red, "
            "green and blue are the digits of an id"
        )
    return values[..., :3].astype(np.int32) @ np.array([1, 256, 256**2], np.int32)


def open(
    split: str,
    *,
    data_dir: str,
    train_json: str = "",
    validation_json: str = "",
    images: str = "",
    segments: str = "",
) -> Dataset:
    """The split "train" or "validation" of a folder in COCO's panoptic form.

    Such as `annotations/panoptic_train2017.json`, the PNGs in a folder called like the JSON beside
    it, and the pictures in `train2017`.

    Args:
      split: which one.
      data_dir: the folder.
      train_json: the path of that JSON below `data_dir`, if it is called otherwise.
      validation_json: likewise.
      images: the folder of pictures below `data_dir`, likewise.
      segments: the folder of PNGs below `data_dir`, likewise.

    Raises:
      ConfigError: if there is no such split.
      DataError: naming the JSON, and what is missing in it or wrong: a file that is not there, a
        segment of no category.
    """
    if split not in SPLITS:
        raise ConfigError(f"panoptic has no split {split!r}.{nearest(split, SPLITS)}")
    root = existing(data_dir, "panoptic")
    named = {"train": train_json, "validation": validation_json}[split]
    file = root / named if named else _find(root, split)
    content = coco.load(file)
    pictures = content["images"]
    folder = coco.folder_of(pictures, file, root, split, images)
    png_root = root / segments if segments else file.with_suffix("")
    if not png_root.is_dir():
        raise DataError(
            f"the PNGs of {file} are missing: there is no folder {png_root}; say where with "
            "data.options.segments"
        )
    return _assemble(file, content, folder, png_root)


def _find(root: Path, split: str) -> Path:
    files = [f for place in (root, root / "annotations") for f in sorted(place.glob("*.json"))]
    files = [f for f in files if f.stem.startswith(PREFIX)]
    mine = (f for spelling in SPLITS[split] for f in files if spelling in f.stem.lower())
    found = next(mine, None)
    if found is None:
        shown = ", ".join(f.name for f in files) or "none at all"
        raise DataError(
            f"{root} has no JSON called {PREFIX}_... for {split}, here or in annotations, only "
            f"{shown}: name it with data.options.{split}_json"
        )
    return found


def _assemble(file: Path, content: dict[str, Any], folder: Path, png_root: Path) -> Panoptic:
    """Checked data of what the JSON says."""
    field = coco.field
    categories = {field(c, "id", file, "category"): c for c in content["categories"]}
    ids = tuple(sorted(categories))
    label_of = {category: label for label, category in enumerate(ids)}
    entries = {field(e, "image_id", file, "annotation"): e for e in content["annotations"]}
    pngs, segments = [], []
    for picture in content["images"]:
        entry = entries.get(field(picture, "id", file, "image"))
        if entry is None:
            raise DataError(f"{file} has no annotation for the image {picture['id']!r}")
        name = field(entry, "file_name", file, "annotation")
        own = []
        for segment in field(entry, "segments_info", file, "annotation"):
            category = segment.get("category_id")
            if category not in label_of:
                raise DataError(
                    f"{file}: {name} has a segment of category_id={category!r}, which is none of "
                    f"the {len(ids)} categories"
                )
            crowd = bool(segment.get("iscrowd", 0))
            own.append((int(field(segment, "id", file, "segment")), label_of[category], crowd))
        pngs.append(name)
        segments.append(tuple(own))
    missing = [name for name in pngs if not (png_root / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{file} names {missing[0]!r}{more}, missing in {png_root}")
    return Panoptic(
        root=folder,
        files=tuple(picture["file_name"] for picture in content["images"]),
        sizes=tuple(coco.size_of(picture, file) for picture in content["images"]),
        png_root=png_root,
        pngs=tuple(pngs),
        segments=tuple(segments),
        class_names=tuple(str(field(categories[i], "name", file, "category")) for i in ids),
        category_ids=ids,
        things=tuple(label_of[i] for i in ids if categories[i].get("isthing", 1)),
    )
