"""COCO's own form: a folder of pictures and one JSON of annotations for each split."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.contracts import Dataset, Example
from vit_jax.data import tfds
from vit_jax.data.folder import SPLITS, read_file
from vit_jax.data.geometry import Pixels, check_boxes, fullest, picture_size
from vit_jax.data.masks import check_share, existing, held_out
from vit_jax.errors import ConfigError, DataError, nearest

LISTS = ("images", "annotations", "categories")  # of the JSON
PREPARED = "coco/2017"  # what TFDS calls it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coco:
    """Pictures as files, read when asked for; the annotations are in memory.

    An example has `image` (the file's bytes), `boxes` [m, 4], `box_label` [m], `crowd` [m], `area`
    float32 [m] as the JSON says it (of the outline, which decides what COCO's AP calls small), and
    `masks` bool [m, H, W] if they were asked for.

    Attributes:
      root: the folder that holds the pictures.
      files: their paths below `root`.
      image_ids: the JSON's id of each picture.
      sizes: (height, width) of each, as the JSON says.
      starts: of each picture's objects in the arrays below; one more than there are pictures.
      boxes: float32 [all, 4], in pixels.
      labels: int32 [all].
      crowds: bool [all].
      areas: float32 [all].
      outlines: each object's `segmentation` in the JSON; None without masks.
      class_names: by label.
      category_ids: the JSON's id of each label, for results in COCO's form.
    """

    root: Path
    files: tuple[str, ...]
    image_ids: tuple[int | str, ...]
    sizes: tuple[Pixels, ...]
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray
    areas: np.ndarray
    outlines: tuple[Any, ...] | None
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        image, size = read_file(self.root / self.files[index]), self.sizes[index]
        check_size(image, size)
        own = slice(self.starts[index], self.starts[index + 1])
        example = {
            "image": image,
            "boxes": self.boxes[own],
            "box_label": self.labels[own],
            "crowd": self.crowds[own],
            "area": self.areas[own],
        }
        if self.outlines is not None:
            masks = [drawn(outline, size) for outline in self.outlines[own]]
            example["masks"] = np.stack(masks) if masks else np.zeros((0, *size), bool)
        return example

    def size(self, index: int) -> Pixels:
        """(H, W) of a picture."""
        return self.sizes[index]

    def fullest(self) -> tuple[int, int]:
        """The picture with most objects that are no crowds, and how many."""
        learned = np.insert(np.cumsum(~self.crowds), 0, 0)[self.starts]
        return fullest(np.diff(learned).tolist())

    def name(self, index: int) -> str:
        """The picture's path, such as `000000000139.jpg`."""
        return self.files[index]


def check_size(image: bytes, said: Pixels) -> None:
    """DataError if a picture file has not the size that its JSON says."""
    size = picture_size(image)
    if size != said:
        raise DataError(
            f"is {size[0]} x {size[1]} pixels (height x width), but its annotations are for "
            f"{said[0]} x {said[1]}"
        )


def open(
    split: str,
    *,
    data_dir: str,
    train_json: str = "",
    validation_json: str = "",
    images: str = "",
    masks: bool = False,
    published_ids: bool = False,
    validation_share: float = 0.2,
) -> Dataset:
    """The split "train" or "validation" of a folder in COCO's form, or of TFDS's `coco`.

    The JSON of a split is one whose name says so (`annotations/instances_val2017.json`,
    `valid/_annotations.coco.json`); where there is only one, a hash of the pictures' names holds
    `validation_share` of them out. Pictures lie in a folder named like the split, in `images`, or
    beside the JSON.

    What COCO itself is known to have is not refused: boxes without area, or wholly outside, are
    dropped, and those that reach outside are cut; a warning counts them. A picture may have none.

    Args:
      split: which one.
      data_dir: the folder.
      train_json: the path of that JSON below `data_dir`, if its name does not say it.
      validation_json: likewise.
      images: the folder of pictures below `data_dir`, likewise.
      masks: whether objects have masks.
      published_ids: labels are the JSON's category ids, with gaps, as the published DETR has them
        (91 names for 80 classes), and not 0, 1, 2 .. in the order of these ids.
      validation_share: see above.

    Raises:
      ConfigError: if there is no such split, or an option cannot be.
      DataError: naming the JSON, and what is missing in it or wrong: a picture that is not there,
        an annotation of no picture or of no category, a box that is inverted or not finite.
    """
    if split not in SPLITS:
        raise ConfigError(f"coco has no split {split!r}.{nearest(split, SPLITS)}")
    root = existing(data_dir, "coco")
    check_share(validation_share)
    if tfds.prepared(root, PREPARED):
        return tfds.open(split, name=PREPARED, data_dir=data_dir)
    named = {"train": train_json, "validation": validation_json}
    file, whole = find(root, split, named[split])
    content = load(file)
    pictures = content["images"]
    if not whole:
        key = lambda picture: str(picture.get("file_name"))  # noqa: E731
        pictures = held_out(pictures, split, validation_share, key)
    folder = folder_of(pictures, file, root, split, images)
    return _assemble(file, folder, content, pictures, masks, published_ids)


def find(root: Path, split: str, named: str = "", kind: str = "") -> tuple[Path, bool]:
    """The JSON for a split, and whether it is of that split alone.

    Args:
      root: the folder.
      split: "train" or "validation".
      named: its path below the folder, where it is known.
      kind: what its name must start with.

    Raises:
      DataError: if there is none.
    """
    if named:
        if not (root / named).is_file():
            raise DataError(f"{root} has no {named!r}, which data.options names")
        return root / named, True
    places = [root, root / "annotations", *(root / s for s in (*SPLITS["train"], *SPLITS[split]))]
    files = [f for place in places if place.is_dir() for f in sorted(place.glob("*.json"))]
    files = [file for file in dict.fromkeys(files) if file.name.startswith(kind)]
    if not files:
        raise DataError(f"{root} has no JSON of annotations, nor has {root / 'annotations'}")
    for spelling in SPLITS[split]:
        mine = [f for f in files if spelling in f.stem.lower() or f.parent.name == spelling]
        # Captions and keypoints lie beside the instances.
        mine = [f for f in mine if f.stem.startswith("instances")] or mine
        if mine:
            return mine[0], True
    others = {s for name in SPLITS if name != split for s in SPLITS[name]}
    whole = [f for f in files if not any(s in f.stem.lower() for s in others)]
    whole = [f for f in whole if f.parent.name not in others]
    if len(whole) != 1:
        shown = ", ".join(str(f.relative_to(root)) for f in files[:5])
        raise DataError(
            f"none of the JSON files in {root} says that it is for {split} ({shown}): name it with "
            f"data.options.{split}_json"
        )
    return whole[0], False


def load(file: Path, lists: Sequence[str] = LISTS) -> dict[str, Any]:
    """A JSON with COCO's lists; DataError if it is none, or has no pictures or classes."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    keys = sorted(content) if isinstance(content, dict) else type(content).__name__
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file} is not in COCO's form: it has no list {key!r}, only {keys}")
    for key in ("images", "categories"):
        if key in lists and not content[key]:
            raise DataError(f"{file} has no {key}")
    return content


def folder_of(pictures: list, file: Path, root: Path, split: str, images: str) -> Path:
    """Where the pictures lie; DataError if one is missing there."""
    names = [field(p, "file_name", file, "image") for p in pictures]
    if images:
        places = [root / images]
    else:
        marks = [file.stem.rsplit("_", 1)[-1], *SPLITS[split]]  # instances_val2017 -> val2017
        places = [*(root / m for m in marks), *(root / "images" / m for m in marks)]
        places += [root / "images", file.parent, root]
    place = next((p for p in places if (p / names[0]).is_file()), None)
    if place is None:
        shown = ", ".join(str(p.relative_to(root)) or "." for p in places if p.is_dir())
        raise DataError(
            f"{file} annotates {names[0]!r}, and there is no such picture in {root} "
            f"(looked in {shown or root / images}); say where with data.options.images"
        )
    there: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, _, base = name.rpartition("/")
        if parent not in there:  # one look at a folder, not one at each of 118,000 files
            folder = place / parent
            there[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
        if base not in there[parent]:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more that are not there" if len(missing) > 1 else ""
        raise DataError(f"{file} annotates {missing[0]!r}{more}, missing in {place}")
    return place


def _assemble(
    file: Path, folder: Path, content: dict, pictures: list, masks: bool, published_ids: bool
) -> Coco:
    """Checked arrays of what the JSON says of these pictures."""
    names = {
        field(c, "id", file, "category"): str(field(c, "name", file, "category"))
        for c in content["categories"]
    }
    ids = tuple(sorted(names))
    if published_ids:
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            raise DataError(f"{file} has category ids that are no labels, such as {ids[0]!r}")
        ids = tuple(range(max(ids) + 1))
    label_of = {category: label for label, category in enumerate(ids)}

    image_ids = tuple(field(p, "id", file, "image") for p in pictures)
    sizes = tuple(size_of(p, file) for p in pictures)
    known = {field(p, "id", file, "image") for p in content["images"]}
    objects: dict[Any, list[dict]] = {i: [] for i in image_ids}
    if len(objects) < len(image_ids):
        twice = next(i for n, i in enumerate(image_ids) if i in image_ids[:n])
        raise DataError(f"{file} has two images with id={twice!r}")
    for number, entry in enumerate(content["annotations"]):
        where = f"{file}: annotation {entry.get('id', f'number {number}')}"
        picture = entry.get("image_id")
        if picture not in known:
            raise DataError(f"{where} is of image_id={picture!r}, and there is no such image")
        if entry.get("category_id") not in names:
            raise DataError(
                f"{where} has category_id={entry.get('category_id')!r}, which is none of the "
                f"{len(names)} categories ({_shown(names)})"
            )
        if picture in objects:
            objects[picture].append(entry)

    boxes, labels, crowds, areas, outlines, starts = [], [], [], [], [], [0]
    dropped = cut = 0
    for picture, size, name in zip(image_ids, sizes, pictures):
        entries = objects[picture]
        numbers = np.array([_box(e, file) for e in entries], np.float32).reshape(-1, 4)
        numbers[:, 2:] += numbers[:, :2]  # (x, y, width, height) -> corners
        try:
            inside, kept = check_boxes(numbers, size, slack=0.0)
        except DataError as error:
            raise DataError(f"{file}: {name['file_name']}: {error}") from error
        dropped += int((~kept).sum())
        cut += int((np.abs(inside - numbers).max(1, initial=0) > 1)[kept].sum())
        entries = [entry for entry, keep in zip(entries, kept) if keep]
        boxes.append(inside[kept])
        labels += [label_of[entry["category_id"]] for entry in entries]
        crowds += [bool(entry.get("iscrowd", 0)) for entry in entries]
        areas += [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in entries]
        if masks:
            outlines += [field(entry, "segmentation", file, "annotation") for entry in entries]
        starts.append(len(labels))
    if dropped or cut:
        log.warning(
            "%s: %d of %d boxes have no area inside their picture and are dropped; %d reach out of "
            "it and are cut",
            file,
            dropped,
            len(labels) + dropped,
            cut,
        )
    return Coco(
        root=folder,
        files=tuple(p["file_name"] for p in pictures),
        image_ids=image_ids,
        sizes=sizes,
        starts=np.array(starts),
        boxes=np.concatenate(boxes),
        labels=np.array(labels, np.int32),
        crowds=np.array(crowds, bool),
        areas=np.array(areas, np.float32),
        outlines=tuple(outlines) if masks else None,
        class_names=tuple(names.get(i, f"no class {i}") for i in ids),
        category_ids=ids,
    )


def field(entry: dict, key: str, file: Path, what: str) -> Any:
    """An entry's value; DataError, naming the entry, if it has none."""
    if key not in entry:
        shown = entry.get("id", entry.get("file_name", sorted(entry)))
        raise DataError(f"{file}: the {what} {shown!r} has no {key!r}")
    return entry[key]


def size_of(picture: dict, file: Path) -> Pixels:
    """(height, width) of an entry of `images`; DataError if they cannot be."""
    size = tuple(field(picture, key, file, "image") for key in ("height", "width"))
    if not all(isinstance(n, int) and n > 0 for n in size):
        raise DataError(f"{file}: the image {picture['id']!r} has height and width {size}")
    return size


def _box(entry: dict, file: Path) -> Sequence[float]:
    box = field(entry, "bbox", file, "annotation")
    right = isinstance(box, list) and len(box) == 4
    if not right or not all(isinstance(n, (int, float)) for n in box):
        raise DataError(
            f"{file}: annotation {entry.get('id')} has bbox={box!r}; it must be four numbers: x, "
            "y, width, height"
        )
    if min(box[2:]) < 0:
        raise DataError(
            f"{file}: annotation {entry.get('id')} has bbox={box!r}: width and height must not be "
            "negative (the four numbers are x, y, width, height)"
        )
    return box


def _shown(names: dict) -> str:
    first = ", ".join(f"{i} {name}" for i, name in sorted(names.items())[:5])
    return first + (", ..." if len(names) > 5 else "")


def drawn(outline: list | dict, size: Pixels) -> np.ndarray:
    """An object's `segmentation` -> bool [H, W].

    Polygons are filled where a pixel's centre is inside, so their rim may lie half a pixel from
    what pycocotools draws; run lengths, packed or not, are exact.

    Raises:
      DataError: if it is neither.
    """
    if isinstance(outline, dict):
        return _unpacked(outline, size)
    mask = np.zeros(size, bool)
    for polygon in outline:
        points = np.asarray(polygon, np.float64)
        if points.ndim != 1 or len(points) % 2 or len(points) < 6:
            raise DataError(
                f"a polygon of {points.size} numbers: it must have three points or more"
            )
        mask |= _filled(points.reshape(-1, 2), size)
    return mask


def _filled(points: np.ndarray, size: Pixels) -> np.ndarray:
    """A polygon [n, 2] of (x, y) -> bool [H, W], by counting its edges left of each pixel."""
    H, W = size
    crossings = np.zeros((H, W + 1), np.int32)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
        if y0 == y1:
            continue
        low, high = sorted((y0, y1))
        first = max(int(np.ceil(low - 0.5)), 0)
        rows = np.arange(first, max(min(int(np.ceil(high - 0.5)), H), first))
        x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.clip(np.ceil(x - 0.5), 0, W).astype(int)
        crossings[rows, columns] += 1  # an edge crosses a row once
    return (crossings.cumsum(1)[:, :W] % 2).astype(bool)


def _unpacked(runs: dict, size: Pixels) -> np.ndarray:
    """Run lengths down the columns, first of nothing -> bool [H, W]."""
    if tuple(runs.get("size", ())) != tuple(size):
        raise DataError(
            f"a mask of {runs.get('size')} (height, width) on a picture of {list(size)}"
        )
    counts = runs["counts"]
    if isinstance(counts, str):
        counts = _lengths(counts.encode())
    values = np.arange(len(counts)) % 2 == 1
    flat = np.repeat(values, np.asarray(counts, np.int64))
    if len(flat) != size[0] * size[1]:
        raise DataError(f"a mask of {len(flat)} pixels on a picture of {size[0] * size[1]}")
    return flat.reshape(size[::-1]).T


def _lengths(packed: bytes) -> list[int]:
    """COCO's text form of run lengths: base 32 from the character "0" on, lowest digit first.

    Bit 5 says that more digits follow, bit 4 of the last is the sign; from the fourth number on,
    each is the difference to the one two before it.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in packed:
        digit = character - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths
