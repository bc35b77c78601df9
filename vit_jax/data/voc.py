"""PASCAL VOC's form: a folder of pictures and one XML of boxes for each of them."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from vit_jax.contracts import Dataset, Example
from vit_jax.data import tfds
from vit_jax.data.folder import SHOWN, SPLITS, SUFFIXES, all_files, read_file
from vit_jax.data.geometry import Pixels, check_boxes, fullest, picture_size
from vit_jax.data.masks import check_share, existing, held_out
from vit_jax.errors import ConfigError, DataError, nearest

CLASSES = (  # Everingham et al. 2010, in their order
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
PREPARED = ("voc/2012", "voc/2007")  # what TFDS calls it
PICTURES = ("JPEGImages", "images", "Images", "pictures")
ANNOTATIONS = ("Annotations", "annotations", "xml", "labels")
MASKS = ("SegmentationClass", "SegmentationObject")  # VOC's folders of other things than pictures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotation:
    """What one XML says.

    Attributes:
      file: the picture, as a path below the root.
      size: (height, width), or (0, 0) where it says nothing.
      boxes: float32 [m, 4], in pixels.
      names: of the objects' classes.
      difficult: bool [m].
    """

    file: str
    size: Pixels
    boxes: np.ndarray
    names: tuple[str, ...]
    difficult: np.ndarray


@dataclass(frozen=True)
class Voc:
    """Pictures as files, read when asked for; the annotations are in memory.

    An example has `image` (the file's bytes), `boxes` [m, 4], `box_label` [m] and `crowd` [m]: an
    object marked as difficult is neither learned nor held against a prediction, like a crowd.

    Attributes:
      root: the folder that holds them all.
      annotations: one for each picture.
      class_names: by label.
    """

    root: Path
    annotations: tuple[Annotation, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Example:
        own = self.annotations[index]
        image = read_file(self.root / own.file)
        size = picture_size(image)
        if own.size not in (size, (0, 0)):
            raise DataError(
                f"is {size[0]} x {size[1]} pixels (height x width), but its annotation is for "
                f"{own.size[0]} x {own.size[1]}"
            )
        boxes, kept = check_boxes(own.boxes, size)
        labels = np.array([self.class_names.index(name) for name in own.names], np.int32)
        return {
            "image": image,
            "boxes": boxes[kept],
            "box_label": labels[kept],
            "crowd": own.difficult[kept],
        }

    def size(self, index: int) -> Pixels:
        """(H, W) of a picture."""
        own = self.annotations[index]
        return own.size if all(own.size) else picture_size(read_file(self.root / own.file))

    def fullest(self) -> tuple[int, int]:
        """The picture with most objects that are not difficult, and how many."""
        return fullest(int((~each.difficult).sum()) for each in self.annotations)

    def name(self, index: int) -> str:
        """The picture's path, such as `JPEGImages/2007_000027.jpg`."""
        return self.annotations[index].file


def open(
    split: str,
    *,
    data_dir: str,
    class_names: Sequence[str] = (),
    one_based: bool = True,
    validation_share: float = 0.2,
) -> Dataset:
    """The split "train" or "validation" of a folder in VOC's form, or of TFDS's `voc`.

    The XML files lie in `Annotations` and the pictures in `JPEGImages`, or side by side, or each in
    folders called `train` and `val`. Where there is `ImageSets/Main/train.txt`, such lists are the
    splits; where nothing tells them apart, a hash of the names holds `validation_share` out.

    Boxes without area, or wholly outside their picture, are dropped and those that reach outside
    are cut; a warning counts them, as published sets have some. A picture may have none.

    Args:
      split: which one.
      data_dir: the folder; of a VOCdevkit, the one of the year.
      class_names: in the order of their labels; () is VOC's own twenty, or, where there are others,
        all that occur in the folder, sorted.
      one_based: the first pixel is 1, and a box's last pixel is in it, as VOC has it.
      validation_share: see above.

    Raises:
      ConfigError: if there is no such split, or an option cannot be.
      DataError: naming the XML, and what is missing in it or wrong: its picture, a class that is
        not among the names, a box that is inverted or no number.
    """
    if split not in SPLITS:
        raise ConfigError(f"voc has no split {split!r}.{nearest(split, SPLITS)}")
    root = existing(data_dir, "voc")
    check_share(validation_share)
    prepared = next((name for name in PREPARED if tfds.prepared(root, name)), None)
    if prepared:
        return tfds.open(split, name=prepared, data_dir=data_dir)
    files = all_files(root)
    pictures = {
        path.relative_to(root).as_posix()
        for path in files
        if path.suffix.lower() in SUFFIXES and path.parent.name not in MASKS
    }
    found = [path for path in files if path.suffix.lower() == ".xml"]
    if not found:
        raise DataError(f"{root} has no XML file of annotations")
    entries = {path: _parse(path, root, pictures, one_based) for path in found}
    names = _names(entries, tuple(class_names))
    chosen = _split(root, list(entries), split, validation_share)
    _warn(entries, chosen, root)
    without = sorted(pictures - {entry.file for entry in entries.values()})
    if without:
        shown = ", ".join(without[:SHOWN]) + (", ..." if len(without) > SHOWN else "")
        log.warning("%s: pictures without an XML are left out: %d (%s)", root, len(without), shown)
    return Voc(root, tuple(entries[path] for path in chosen), names)


def _parse(file: Path, root: Path, pictures: set[str], one_based: bool) -> Annotation:
    try:
        tree = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(f"{file} is no XML: {error}") from error
    if tree.tag != "annotation":
        raise DataError(f"{file} is not in VOC's form: its root is <{tree.tag}>, not <annotation>")
    size = tuple(round(_number(tree, f"size/{key}", file, 0)) for key in ("height", "width"))
    boxes, names, difficult = [], [], []
    for number, entry in enumerate(tree.findall("object")):
        where = f"{file}: object {number}"
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{where} has no <name>")
        keys = ("xmin", "ymin", "xmax", "ymax")
        box = np.array([_number(entry, f"bndbox/{key}", where) for key in keys], np.float32)
        if (box[2:] < box[:2]).any():
            shown = ", ".join(f"{key}={side:g}" for key, side in zip(keys, box))
            raise DataError(f"{where} ({name}) has an inverted box: {shown}")
        boxes.append(box - np.float32((1, 1, 0, 0)) if one_based else box)
        names.append(name)
        difficult.append(_number(entry, "difficult", where, 0) > 0)
    return Annotation(
        file=_picture_of(file, tree.findtext("filename") or "", root, pictures),
        size=size,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        names=tuple(names),
        difficult=np.array(difficult, bool),
    )


def _number(entry, path: str, where, default: float | None = None) -> float:
    text = entry.findtext(path)
    if text is None or not text.strip():
        if default is None:
            raise DataError(f"{where} has no <{path.replace('/', '><')}>")
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where} has <{path.replace('/', '><')}> {text.strip()!r}: no number")
    return value


def _picture_of(file: Path, said: str, root: Path, pictures: set[str]) -> str:
    """The picture of an XML: of its stem, or called as it says, beside it or in a folder of VOC's.

    The stem goes first: tools write into <filename> what a picture was called before.
    """
    base = file.parent.relative_to(root)
    places = [base, *(base.parent / name for name in PICTURES)]
    if base.parent.name in ANNOTATIONS:  # annotations/train/a.xml, images/train/a.jpg
        places += [base.parent.parent / name / base.name for name in PICTURES]
    suffixes = dict.fromkeys([Path(said).suffix, ".jpg", ".jpeg", ".png", *sorted(SUFFIXES)])
    suffixes = [spelling for s in suffixes if s for spelling in dict.fromkeys((s, s.upper()))]
    stems = [file.stem + suffix for suffix in suffixes] + [Path(said).name] * bool(said)
    for place in places:
        for name in stems:
            path = (place / name).as_posix()
            if path in pictures:
                return path
    raise DataError(
        f"{file} annotates {said or file.stem!r}, and there is no such picture in {root} (looked "
        f"in {', '.join(dict.fromkeys(p.as_posix() for p in places if (root / p).is_dir()))})"
    )


def _names(entries: dict[Path, Annotation], wanted: tuple[str, ...]) -> tuple[str, ...]:
    used = {name: path for path, entry in entries.items() for name in entry.names}
    if not wanted:
        return CLASSES if used and used.keys() <= set(CLASSES) else _sorted(used, entries)
    for name, path in used.items():
        if name not in wanted:
            raise DataError(
                f"{path} has an object of class {name!r}, which is none of the "
                f"{len(wanted)} data.options.class_names.{nearest(name, wanted)}"
            )
    return wanted


def _sorted(used: dict[str, Path], entries: dict[Path, Annotation]) -> tuple[str, ...]:
    if not used:
        folder = next(iter(entries)).parent
        raise DataError(f"none of the {len(entries)} XML files in {folder} has an object")
    return tuple(sorted(used))


def _split(root: Path, paths: list[Path], split: str, share: float) -> list[Path]:
    """The XML files of a split: by VOC's lists, by folders, or by a hash of their paths."""
    lists = root / "ImageSets" / "Main"
    for spelling in SPLITS[split]:
        if (lists / f"{spelling}.txt").is_file():
            wanted = [
                n.split()[0] for n in (lists / f"{spelling}.txt").read_text().splitlines() if n
            ]
            by_stem = {path.stem: path for path in paths}
            missing = [name for name in wanted if name not in by_stem]
            if missing:
                raise DataError(
                    f"{lists / spelling}.txt lists {missing[0]!r}, which has no XML in {root}"
                    + (f"; {len(missing)} in all" if len(missing) > 1 else "")
                )
            return [by_stem[name] for name in wanted]
    inside = {
        name: [p for p in paths if set(p.relative_to(root).parts[:-1]) & set(spellings)]
        for name, spellings in SPLITS.items()
    }
    if inside[split]:
        return inside[split]
    if any(inside.values()):
        raise DataError(
            f"{root} has a folder for one split and none for {split}, which would be called "
            f"{' or '.join(map(repr, SPLITS[split]))}"
        )
    return held_out(paths, split, share, key=lambda path: path.relative_to(root).as_posix())


def _warn(entries: dict[Path, Annotation], chosen: list[Path], root: Path) -> None:
    dropped = cut = total = 0
    for path in chosen:
        entry = entries[path]
        total += len(entry.boxes)
        if not all(entry.size):
            continue
        inside, kept = check_boxes(entry.boxes, entry.size)
        dropped += int((~kept).sum())
        cut += int((np.abs(inside - entry.boxes).max(1, initial=0) > 1)[kept].sum())
    if dropped or cut:
        log.warning(
            "%s: %d of %d boxes have no area inside their picture and are dropped; %d reach out of "
            "it and are cut",
            root,
            dropped,
            total,
            cut,
        )
