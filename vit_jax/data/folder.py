"""A folder of one's own pictures, one sub-folder a class."""

import hashlib
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vit_jax.contracts import Dataset, Example
from vit_jax.data.share import balanced
from vit_jax.errors import ConfigError, DataError, nearest

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".avif", ".bmp"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
SPLITS = {"train": ("train", "training"), "validation": ("val", "validation", "valid", "test")}
SHOWN = 3  # names in a message

log = logging.getLogger(__name__)


def read_file(file: Path, called: str = "") -> bytes:
    """A file's bytes; DataError if it cannot be read, saying so of what it is `called`.

    Of a picture itself nothing need be said: whoever asks a dataset for one names it.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{called} cannot be read: {error.strerror}".lstrip()) from error


@dataclass(frozen=True)
class Folder:
    """Pictures as files, read when asked for.

    Attributes:
      root: the folder that holds the classes.
      files: (path below `root`, label), in the order of the classes and then of the paths; the
        label is -1 where there are no classes.
      class_names: the sub-folders' names, sorted.
      ignored: files that are no pictures by their suffix, as paths below `root`.
    """

    root: Path
    files: tuple[tuple[str, int], ...]
    class_names: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file, label = self.files[index]
        example = {"image": read_file(self.root / file)}
        return example if label < 0 else example | {"label": label}

    def name(self, index: int) -> str:
        """The path below the folder of classes, such as `cats/a.jpg`."""
        return self.files[index][0]


def open(
    split: str,
    *,
    data_dir: str,
    validation_share: float = 0.2,
    labels: bool = True,
    share: float = 1.0,
) -> Dataset:
    """The split "train" or "validation" of the pictures in `data_dir`.

    Where `data_dir` holds `train` and one of `val`, `validation`, `valid` and `test`, they are the
    splits. Otherwise its sub-folders are the classes, and a hash of each picture's path decides
    which split it belongs to, so that adding pictures moves none of the others across; a class of
    two or more has at least one in each.

    Without `labels` sub-folders are no classes, all pictures below `data_dir`, or below its `train`
    and `val`, are examples, and they have no label: what needs none learns from them. Of "train", a
    `share` as of `data.share.balanced`.

    Sub-folders are searched to any depth. Hidden files are passed over; those whose suffix is no
    picture's are named in the log, counted and left out.

    Raises:
      ConfigError: if there is no such split, `validation_share` is not between 0 and 1, or there is
        no such share.
      DataError: if the folder is missing, empty or not arranged like that, if a class has no
        picture, or if `train` and `val` disagree about the classes.
    """
    if split not in SPLITS:
        raise ConfigError(f"folder has no split {split!r}.{nearest(split, SPLITS)}")
    if not 0 < validation_share < 1:
        raise ConfigError(
            f"data.options.validation_share={validation_share!r} must lie between 0 and 1"
        )
    root = _existing(data_dir)
    folders = _folders(root)
    parts = {
        name: next((folders[n] for n in spellings if n in folders), None)
        for name, spellings in SPLITS.items()
    }
    if all(parts.values()):
        other = parts["train" if split == "validation" else "validation"]
        if labels:
            _check_same_classes(parts[split], other)
        whole = _report(_scan(parts[split], labels), split)
        return _share_of(whole, share if split == "train" else 1.0)
    if any(parts.values()):
        there = next(part for part in parts.values() if part)
        missing = next(name for name, part in parts.items() if not part)
        raise DataError(
            f"{root} has a folder {there.name!r} but none for {missing}, which would be "
            f"{' or '.join(map(repr, SPLITS[missing]))}. Add it, or give data_dir={there} to have "
            "that split"
        )
    whole = _scan(root, labels)
    chosen = _hashed(whole.files, split, validation_share)
    folder = Folder(root, chosen, whole.class_names, whole.ignored)
    folder = _share_of(folder, share if split == "train" else 1.0)
    return _report(folder, split) if split == "train" else folder  # both have the same to tell


def _share_of(folder: Folder, share: float) -> Folder:
    labels = np.array([label for _, label in folder.files])
    chosen = tuple(folder.files[i] for i in balanced(labels, share))
    return replace(folder, files=chosen)


def _existing(data_dir: str) -> Path:
    if not data_dir:
        raise DataError("the dataset 'folder' needs --config.data.data_dir=FOLDER")
    root = Path(data_dir).expanduser()
    if root.is_dir():
        return root
    if root.exists():
        raise DataError(f"data_dir {root} is a file; it must be a folder of pictures")
    parent = root.parent
    while not parent.is_dir():
        parent = parent.parent
    beside = [path.name for path in parent.iterdir() if path.is_dir()]
    wanted = root.relative_to(parent).parts[0]
    raise DataError(
        f"data_dir {root} does not exist: {parent} has no {wanted!r}.{nearest(wanted, beside)}"
    )


def _folders(root: Path) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(root.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }


def _check_same_classes(first: Path, second: Path) -> None:
    differ = set(_folders(first)) ^ set(_folders(second))
    if differ:
        name = sorted(differ)[0]
        there, missing = (first, second) if name in _folders(first) else (second, first)
        more = f", and {len(differ) - 1} more differ" if len(differ) > 1 else ""
        raise DataError(
            f"{there} and {missing} must hold the same classes, but {name!r} is only in "
            f"{there.name}{more}.{nearest(name, _folders(missing))}"
        )


def _scan(root: Path, labels: bool = True) -> Folder:
    """Every picture below each class's folder, or below the root where there are no classes."""
    if not labels:
        paths = [path.relative_to(root).as_posix() for path in all_files(root)]
        pictures = [path for path in paths if Path(path).suffix.lower() in SUFFIXES]
        if not pictures:
            raise DataError(f"there is no picture in {root} or below it")
        others = tuple(path for path in paths if Path(path).suffix.lower() not in SUFFIXES)
        return Folder(root, tuple((path, -1) for path in pictures), (), others)
    classes = _folders(root)
    if not classes:
        here = [p.name for p in root.iterdir() if p.suffix.lower() in SUFFIXES]
        if not here:
            raise DataError(f"{root} is empty: it must hold one folder of pictures for each class")
        raise DataError(
            f"{root} holds {len(here)} picture{'s' * (len(here) > 1)} but no folders: put each "
            f"class in a folder of its own, such as {root.name}/CLASS/{min(here)}"
        )
    files, ignored = [], []
    for label, (name, folder) in enumerate(classes.items()):
        found = [path.relative_to(root).as_posix() for path in all_files(folder)]
        pictures = [path for path in found if Path(path).suffix.lower() in SUFFIXES]
        ignored += [path for path in found if Path(path).suffix.lower() not in SUFFIXES]
        if not pictures:
            others = f", only {found[0]!r}" if found else ""
            raise DataError(f"the class {name!r} has no picture in {folder}{others}")
        files += [(path, label) for path in pictures]
    return Folder(root, tuple(files), tuple(classes), tuple(ignored))


def all_files(folder: Path) -> list[Path]:
    """Files below a folder, sorted, without hidden ones; links to folders are followed once."""
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link back into the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _hashed(files, split: str, share: float) -> tuple[tuple[str, int], ...]:
    """The files of a split; each class keeps at least one in each, if it has two."""
    by_label: dict[int, list] = {}
    for path, label in files:
        draw = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
        by_label.setdefault(label, []).append((draw, path))
    chosen = []
    for label, members in by_label.items():
        members.sort()
        held_out = sum(draw < share for draw, _ in members)
        # At least one in each; but what is there only once is there to be learned.
        held_out = min(max(held_out, 1), len(members) - 1)
        part = members[:held_out] if split == "validation" else members[held_out:]
        chosen += [(path, label) for path in sorted(path for _, path in part)]
    if not chosen:
        raise DataError(f"no class has two pictures, so none can be held out for {split}")
    return tuple(chosen)


def _report(folder: Folder, split: str) -> Folder:
    if folder.ignored:
        shown = ", ".join(folder.ignored[:SHOWN])
        more = len(folder.ignored) - SHOWN
        log.warning(
            "%s: %d files are no pictures by their suffix and are left out: %s%s (%s)",
            folder.root,
            len(folder.ignored),
            shown,
            f" and {more} more" if more > 0 else "",
            split,
        )
    return folder
