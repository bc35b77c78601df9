"""Tar shards of pictures with captions, in WebDataset's form, read at random without unpacking."""

import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vit_jax.contracts import Dataset, Example
from vit_jax.data.folder import SHOWN, SPLITS
from vit_jax.data.headers import BLOCK, PACKED, Index, indices_of
from vit_jax.data.masks import check_share, existing, held_out
from vit_jax.errors import ConfigError, DataError, nearest

WINDOW = 8  # shards whose pictures come mixed
OPEN = 64  # files a process holds open

log = logging.getLogger(__name__)


class _File:
    """An open file that closes itself when nobody reads from it any more."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):  # as the interpreter ends, `os` may be gone before
        if hasattr(self, "descriptor"):
            close(self.descriptor)


@dataclass(frozen=True)
class Shards:
    """Pictures and captions at known places in tar files.

    An example has `image`, the bytes of the picture, and `captions`.

    Attributes:
      files: the shards, sorted.
      stamps: size and time of each, as they were when its headers were read.
      starts: number of each shard's first example; one more than there are shards.
      places: uint32 [all, 4], as of `headers.Index`.
      is_json: bool [all].
    """

    files: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...]
    starts: np.ndarray
    places: np.ndarray
    is_json: np.ndarray
    _open: OrderedDict = field(default_factory=OrderedDict, compare=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, compare=False, repr=False)

    class_names: ClassVar[tuple[str, ...]] = ()
    enough_captions: ClassVar[int] = 10_000  # each is a place of its own on a disk or a network

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name[0] != "_"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=OrderedDict(), _lock=threading.Lock())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Example:
        image = self._read(self._shard(index), *self.places[index, :2])
        return {"image": image, "captions": self.captions(index)}

    def captions(self, index: int) -> tuple[str, ...]:
        """Of one example, without its picture.

        Raises:
          DataError: if there is none, or it is not UTF-8 or no JSON.
        """
        text = self._read(self._shard(index), *self.places[index, 2:])
        try:
            text = text.decode("utf-8-sig")
            found: Any = [text]
            if self.is_json[index]:
                found = _told(json.loads(text))
        except ValueError as error:  # of UTF-8 and of JSON
            kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
            raise DataError(f"its text is no {kind}: {error}") from error
        captions = tuple(c.strip() for c in found if isinstance(c, str) and c.strip())
        if not captions:
            raise DataError("its caption is empty")
        return captions

    def name(self, index: int) -> str:
        """The shard and the member, such as `cc-000017.tar: 000170042.jpg`."""
        shard = self._shard(index)
        try:
            header = self._read(shard, self.places[index, 0] - 1, BLOCK)
        except DataError:
            return f"{self.files[shard].name}: number {index - self.starts[shard]}"
        # A longer name lies in a block before; this is its beginning.
        return f"{self.files[shard].name}: {header[:100].rstrip(bytes(1)).decode(errors='replace')}"

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """An epoch's order: shards are shuffled, then all that lies in each few of them.

        So a disk or a network reads a few files at a time, from end to end.
        """
        shards = rng.permutation(len(self.files))
        parts = []
        for first in range(0, len(shards), WINDOW):
            window = shards[first : first + WINDOW]
            ranges = [np.arange(self.starts[s], self.starts[s + 1]) for s in window]
            parts.append(rng.permutation(np.concatenate(ranges)))
        return np.concatenate(parts)

    def _shard(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _read(self, shard: int, block: int, length: int) -> bytes:
        opened = self._file(shard)
        try:
            data = os.pread(opened.descriptor, int(length), int(block) * BLOCK)
        except OSError as error:
            raise DataError(f"{self.files[shard]} cannot be read: {error.strerror}") from error
        if len(data) < length:
            raise DataError(f"{self.files[shard]} was cut short since its headers were read")
        return data

    def _file(self, shard: int) -> _File:
        with self._lock:
            opened = self._open.pop(shard, None)
            if opened is None:
                file = self.files[shard]
                try:
                    opened = _File(file)
                except OSError as error:
                    raise DataError(f"{file} cannot be read: {error.strerror}") from error
                stat = os.fstat(opened.descriptor)
                if (stat.st_size, stat.st_mtime_ns) != self.stamps[shard]:
                    raise DataError(f"{file} has changed since its headers were read")
            self._open[shard] = opened
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
            return opened


def _told(content: Any) -> list[Any]:
    """The captions in a JSON beside a picture; none where it has no such entry."""
    content = content if isinstance(content, dict) else {}
    several = content.get("captions")
    return several if isinstance(several, list) else [content.get("caption", content.get("text"))]


def open(split: str, *, data_dir: str, validation_share: float = 0.05) -> Dataset:
    """The split "train" or "validation" of tar files whose members are pictures with texts.

    Members of one stem belong together: `000.jpg` (or another picture), and `000.txt` or a
    `000.json` with "caption". Other members are passed over. The headers are read once; what they
    say is kept beside the shards (`.vit_jax_index.npz`), or in the user's cache where that folder
    cannot be written, and read anew for shards whose size or time has changed.

    Args:
      split: which one.
      data_dir: a folder of `.tar` files, all to be split by a hash of their names, or with `train`
        and `val` in it; or names with numbers, `FOLDER/cc-{000000..000099}.tar`.
      validation_share: of the shards, where there are no folders for the splits.

    Raises:
      ConfigError: if there is no such split, or `validation_share` cannot be.
      DataError: naming the shard: missing, cut short, compressed, or with two members of one name;
        or if there is no picture with a text.
    """
    if split not in SPLITS:
        raise ConfigError(f"shards has no split {split!r}.{nearest(split, SPLITS)}")
    check_share(validation_share)
    files, whole = _files(split, data_dir)
    if not whole:
        if len(files) < 2:
            raise DataError(
                f"{files[0]} is the only shard, so none can be held out for validation: put shards "
                "into the folders train and val"
            )
        files = held_out(files, split, validation_share, key=lambda file: file.name)
    indices = indices_of(files)
    _report(files, indices)
    counts = [len(index.places) for index in indices]
    if not sum(counts):
        raise DataError(
            f"no picture in {files[0].parent} has a text: wanted members such as 000.jpg with "
            "000.txt, or with a 000.json that has a caption"
        )
    return Shards(
        files=tuple(files),
        stamps=tuple(index.stamp for index in indices),
        starts=np.concatenate([[0], np.cumsum(counts)]),
        places=np.concatenate([index.places for index in indices]),
        is_json=np.concatenate([index.is_json for index in indices]),
    )


def found(root: Path) -> bool:
    """Whether a folder, or one for a split in it, has tar files."""
    folders = [root, *(root / s for names in SPLITS.values() for s in names)]
    return any(_is_shard(file) for f in folders if f.is_dir() for file in f.iterdir())


def _is_shard(file: Path) -> bool:
    return not file.name.startswith(".") and file.name.lower().endswith((".tar", *PACKED))


def _files(split: str, data_dir: str) -> tuple[list[Path], bool]:
    """The shards, and whether all of them are of that split."""
    if "{" in data_dir:
        return _spelt_out(data_dir), False
    root = existing(data_dir, "shards")
    below = {
        name: [f for s in SPLITS[name] if (root / s).is_dir() for f in _shards_in(root / s)]
        for name in SPLITS
    }
    if below[split]:
        return below[split], True
    files = _shards_in(root)
    if not files:
        there = next((f for f in below.values() if f), None)
        if there:
            spellings = " or ".join(map(repr, SPLITS[split]))
            raise DataError(f"{root} has shards, but none in a folder {spellings} for {split}")
        raise DataError(f"{root} holds no .tar files, nor do folders train and val in it")
    return files, False


def _shards_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _is_shard(file))


def _spelt_out(pattern: str) -> list[Path]:
    """`a-{000..002}.tar` -> the three files; DataError if one is missing."""
    match = re.fullmatch(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*)", pattern)
    if not match or int(match[3]) < int(match[2]):
        raise DataError(
            f"data_dir {pattern} is not understood: wanted one range of numbers, such as "
            "FOLDER/cc-{000000..000099}.tar"
        )
    before, first, last, after = match.groups()
    digits = len(first) if len(first) == len(last) else 0
    files = [
        Path(f"{before}{n:0{digits}d}{after}").expanduser()
        for n in range(int(first), int(last) + 1)
    ]
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(f"there is no shard {missing[0]}{more}, which data_dir {pattern} names")
    return files


def _report(files: Sequence[Path], indices: Sequence[Index]) -> None:
    for what, left in (
        ("pictures without a text", [index.without_text for index in indices]),
        ("texts without a picture", [index.without_picture for index in indices]),
    ):
        if not any(left):
            continue
        named = [file.name for file, count in zip(files, left, strict=True) if count]
        log.warning(
            "%s: %s are left out: %d (in %s%s)",
            files[0].parent,
            what,
            sum(left),
            ", ".join(named[:SHOWN]),
            f" and {len(named) - SHOWN} more shards" if len(named) > SHOWN else "",
        )
