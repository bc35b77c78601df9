"""Pictures with masks: a folder of pictures, and one of PNGs that hold a class for each pixel."""

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_jax.contracts import Dataset, Example
from vit_jax.data.decode import READERS
from vit_jax.data.folder import SHOWN, SPLITS, SUFFIXES, all_files, read_file
from vit_jax.data.geometry import IGNORED, Pixels, picture_size
from vit_jax.errors import ConfigError, DataError, nearest

PICTURES = ("images", "image", "JPEGImages", "pictures")  # names of folders
MASKS = ("masks", "mask", "annotations", "labels", "segmentation", "SegmentationClass")
MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp"})  # nothing that loses what it packs
NAMES = "classes.txt"
MOST = 255  # classes: a segmentation is a byte, and 255 is ignored

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classes:
    """What the values of a mask mean.

    Attributes:
      names: of the classes; the first is the value `first`, the next one more, and so on.
      first: the value of the first class.
      ignored: values that count as nothing, besides 255 and, with 16 bits, 65535.
    """

    names: tuple[str, ...]
    first: int = 0
    ignored: tuple[int, ...] = ()

    def __post_init__(self):
        if not 0 < len(self.names) <= MOST:
            raise ConfigError(f"{len(self.names)} classes of pixels; there must be 1 to {MOST}")
        if not 0 <= self.first <= 65535 - MOST:
            raise ConfigError(f"data.options.first={self.first!r} is no value of a mask")

    def labels(self, values: np.ndarray) -> np.ndarray:
        """Values [H, W] of a mask -> classes uint8 [H, W], 255 where ignored.

        Raises:
          DataError: at a value that is no class.
        """
        highest = int(values.max(initial=0))
        table = np.full(max(highest, 65535) + 1, -1, np.int16)
        table[self.first : self.first + len(self.names)] = np.arange(len(self.names))
        free = [v for v in (IGNORED, 65535) if table[v] < 0]
        table[[v for v in (*free, *self.ignored) if v < len(table)]] = IGNORED
        labels = table[values]
        if labels.min(initial=0) < 0:
            value = int(values[labels < 0].min())
            raise DataError(
                f"its mask has the value {value} at {int((values == value).sum()):,} pixels, but "
                f"the {len(self.names)} classes are {self.first} to "
                f"{self.first + len(self.names) - 1} ({IGNORED} is ignored)"
            )
        return labels.astype(np.uint8)


def read_mask(data: bytes) -> np.ndarray:
    """The bytes of a PNG, TIFF or BMP -> its values, int32 [H, W].

    A palette's colours are only for the eye: the values are its indices. Of 16 bits all are kept.

    Raises:
      DataError: if it is none of these, or is coloured.
    """
    readers = (each for start, mark, each in READERS if data.startswith(mark, start))
    reader = next(readers, None)
    if reader is None:
        raise DataError("its mask is no picture")
    try:
        with reader(io.BytesIO(data)) as opened:
            kind, mode = opened.format, opened.mode
            values = np.asarray(opened)
    except Exception as error:  # a reader of foreign bytes may raise anything
        raise DataError(f"its mask is damaged: {error}") from error
    if kind == "JPEG":
        raise DataError("its mask is a JPEG, which changes the values it stores: save it as PNG")
    if values.ndim == 3 and (values[..., :1] == values[..., :3]).all():
        values = values[..., 0]  # grey, spelt out as colours
    if values.ndim != 2 or mode == "F":
        raise DataError(
            f"its mask is coloured (mode {mode}): it must hold one number for each pixel, in grey "
            "or as a palette"
        )
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise DataError(f"its mask has values from {values.min()} to {values.max()}: not 16 bits")
    return values.astype(np.int32)


def check_same_size(mask: np.ndarray, picture: np.ndarray | bytes) -> None:
    """DataError if a mask [H, W] is not of its picture's size."""
    size = picture_size(picture)
    if mask.shape != size:
        raise DataError(
            f"its mask is {mask.shape[0]} x {mask.shape[1]} pixels (height x width), and the "
            f"picture {size[0]} x {size[1]}"
        )


@dataclass(frozen=True)
class Masks:
    """Pictures as files with masks as files, read when asked for.

    An example has `image`, the bytes of the picture, and `segmentation` uint8 [H, W].

    Attributes:
      root: the folder that holds them all.
      files: (picture, mask) as paths below `root`.
      classes: what the values mean.
    """

    root: Path
    files: tuple[tuple[str, str], ...]
    classes: Classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each value of `segmentation`."""
        return self.classes.names

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        image, mask = (read_file(self.root / path, path) for path in self.files[index])
        values = read_mask(mask)
        check_same_size(values, image)
        return {"image": image, "segmentation": self.classes.labels(values)}

    def size(self, index: int) -> Pixels:
        """(H, W) of a picture."""
        picture = self.name(index)
        return picture_size(read_file(self.root / picture, picture))

    def name(self, index: int) -> str:
        """The picture's path, such as `images/a.jpg`."""
        return self.files[index][0]


def open(
    split: str,
    *,
    data_dir: str,
    class_names: Sequence[str] = (),
    first: int = 0,
    ignored: Sequence[int] = (),
    validation_share: float = 0.2,
) -> Dataset:
    """The split "train" or "validation" of pictures with masks of the same stem.

    Such as `images/train/a.jpg` with `masks/train/a.png`, `train/images/a.jpg` with
    `train/masks/a.png`, or `images/a.jpg` with `masks/a.png`, of which a hash of the path holds
    `validation_share` out. ADE20K's own folder (images/training, annotations/training) is one.

    Pictures without a mask are counted in the log and left out.

    Args:
      split: which one.
      data_dir: the folder.
      class_names: of the values, one after the other; () reads them from `classes.txt` in
        `data_dir`, one name a line.
      first: the value that the first name belongs to: 1 where 0 means "anything else" (ADE20K).
      ignored: values that count as nothing: (0,) for ADE20K. 255 always does.
      validation_share: of pictures, where there are no folders for the splits.

    Raises:
      ConfigError: if there is no such split, or an option cannot be.
      DataError: if the folder is missing, empty or not arranged like that, if a mask's picture is
        missing, or if nothing says what the classes are called.
    """
    if split not in SPLITS:
        raise ConfigError(f"masks has no split {split!r}.{nearest(split, SPLITS)}")
    root = existing(data_dir, "masks")
    check_share(validation_share)
    names = tuple(class_names) or _names(root)
    classes = Classes(names, first, tuple(ignored))
    layout = _layout(root, split)
    if layout is None:
        pictures, masks = _one_of(root, PICTURES), _one_of(root, MASKS)
        if not (pictures and masks):
            raise DataError(
                f"{root} must hold a folder of pictures ({', '.join(PICTURES[:3])}) and one of "
                f"masks ({', '.join(MASKS[:4])}), each with or without folders for the splits"
            )
        layout = pictures, masks
        pairs = held_out(_pairs(root, *layout), split, validation_share, key=lambda pair: pair[0])
    else:
        pairs = _pairs(root, *layout)
    return Masks(root, tuple(pairs), classes)


def existing(data_dir: str, name: str) -> Path:
    """The folder; DataError if there is none."""
    if not data_dir:
        raise DataError(f"the dataset {name!r} needs --config.data.data_dir=FOLDER")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        what = "is a file; it must be a folder" if root.exists() else "does not exist"
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        hint = "" if root.exists() else nearest(root.name, beside)
        raise DataError(f"data_dir {root} {what}.{hint}")
    return root


def check_share(share: float) -> None:
    """ConfigError if a share to hold out cannot be."""
    if not 0 < share < 1:
        raise ConfigError(f"data.options.validation_share={share!r} must lie between 0 and 1")


def held_out(items: Sequence, split: str, share: float, key=lambda item: item) -> list:
    """The items of a split by a hash of their path, so that new ones move none across."""
    draws = sorted(
        (int.from_bytes(hashlib.sha256(key(item).encode()).digest()[:8], "big") / 2**64, i)
        for i, item in enumerate(items)
    )
    if len(draws) < 2:
        raise DataError(f"one picture alone: none can be held out for {split}")
    count = min(max(sum(draw < share for draw, _ in draws), 1), len(draws) - 1)
    part = draws[:count] if split == "validation" else draws[count:]
    return [items[i] for i in sorted(i for _, i in part)]


def _layout(root: Path, split: str) -> tuple[Path, Path] | None:
    """Folders of a split's pictures and masks; None where there are none for splits."""
    own, other = (SPLITS[s] for s in ((split, *(n for n in SPLITS if n != split))))
    found: dict[bool, tuple[Path, Path] | None] = {}
    for mine, spellings in ((True, own), (False, other)):
        found[mine] = None
        for spelling in spellings:
            inside = root / spelling
            below = [f / spelling for f in (_one_of(root, PICTURES), _one_of(root, MASKS)) if f]
            pairs = [(_one_of(inside, PICTURES), _one_of(inside, MASKS)), below]
            for pair in pairs:
                if found[mine] is None and len(pair) == 2 and all(p and p.is_dir() for p in pair):
                    found[mine] = tuple(pair)
    if found[False] and not found[True]:
        raise DataError(
            f"{root} has {found[False][0].relative_to(root)} but nothing for {split}, which would "
            f"be called {' or '.join(map(repr, own))}"
        )
    return found[True]


def _one_of(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _pairs(root: Path, pictures: Path, masks: Path) -> list[tuple[str, str]]:
    """(picture, mask) of the same path but for the suffix."""
    images = {
        path.relative_to(pictures).with_suffix(""): path
        for path in all_files(pictures)
        if path.suffix.lower() in SUFFIXES
    }
    found = [path for path in all_files(masks) if path.suffix.lower() in SUFFIXES]
    lossy = next((path for path in found if path.suffix.lower() not in MASK_SUFFIXES), None)
    if lossy:
        raise DataError(f"the mask {lossy} must be a PNG, TIFF or BMP: it must lose no value")
    labels = {path.relative_to(masks).with_suffix(""): path for path in found}
    if not images or not labels:
        raise DataError(f"{pictures if not images else masks} is empty: it holds no picture")
    lonely = sorted(labels.keys() - images.keys())
    if lonely:
        more = f", and {len(lonely) - 1} more masks have none" if len(lonely) > 1 else ""
        hint = nearest(lonely[0].as_posix(), (k.as_posix() for k in images))
        raise DataError(
            f"the mask {labels[lonely[0]]} has no picture {lonely[0].as_posix()!r} in "
            f"{pictures}{more}.{hint}"
        )
    without = sorted(images.keys() - labels.keys())
    if without:
        shown = ", ".join(path.as_posix() for path in without[:SHOWN])
        log.warning(
            "%s: pictures without a mask are left out: %d (%s%s)",
            pictures,
            len(without),
            shown,
            f" and {len(without) - SHOWN} more" if len(without) > SHOWN else "",
        )
    return [
        (images[key].relative_to(root).as_posix(), labels[key].relative_to(root).as_posix())
        for key in sorted(labels)
    ]


def _names(root: Path) -> tuple[str, ...]:
    try:
        lines = (root / NAMES).read_text().splitlines()
    except OSError as error:
        raise DataError(
            f"nothing says what the values of the masks in {root} are called: write {NAMES} there, "
            "one name a line from the value 0 on, or give data.options.class_names"
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise DataError(f"{root / NAMES} is empty: it must hold one name a line")
    return names
