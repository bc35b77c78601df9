"""Where the pictures and texts of tar shards lie: read off the headers once, and kept."""

import hashlib
import json
import logging
import os
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_jax.data.folder import SUFFIXES
from vit_jax.errors import DataError

TEXTS = (".txt", ".json")  # in this order, where a picture has both
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of the same, in that order
INDEX = ".vit_jax_index.npz"
READERS = 8  # shards whose headers are read at once
BLOCK = 512  # of a tar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """Where the pictures of one shard lie in its file, and what was left out.

    Attributes:
      places: uint32 [n, 4]: block (of 512 bytes) and length of each picture, and of its text.
      is_json: bool [n], whether the text is JSON.
      without_text: pictures that have none.
      without_picture: texts that have none.
      stamp: bytes of the file, and when it was last written, in nanoseconds.
    """

    places: np.ndarray
    is_json: np.ndarray
    without_text: int
    without_picture: int
    stamp: tuple[int, int]


def read_headers(file: Path) -> Index:
    """Where everything lies in one shard.

    Raises:
      DataError: if it is no tar, compressed, cut short, or has two members of one name.
    """
    if file.name.lower().endswith(PACKED):
        raise DataError(_compressed(file))
    try:
        stat = file.stat()
        with tarfile.open(file, "r:") as archive:
            members = archive.getmembers()
            end = archive.offset
    except (OSError, tarfile.TarError) as error:
        if isinstance(error, tarfile.ReadError) and "unexpected end" in str(error):
            raise DataError(f"{file} is cut short: copy it again") from error
        if _starts(file, *MAGIC):
            raise DataError(_compressed(file)) from error
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{file} is no tar file that can be read: {reason}") from error
    # A header that is cut, or none, ends a tar as quietly as its end mark does.
    if 0 < stat.st_size - end < BLOCK:
        raise DataError(f"{file} is cut short: copy it again")
    if stat.st_size == end:
        log.warning("%s has no end mark, so that it may be cut short", file)
    return _grouped(file, members, stat)


def _grouped(file: Path, members: Sequence[tarfile.TarInfo], stat: os.stat_result) -> Index:
    """Members by their stem: the name up to the first dot, as WebDataset has it."""
    pictures: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        suffix = f".{suffix.lower()}"
        if not member.isreg() or not stem or (suffix not in TEXTS and suffix not in SUFFIXES):
            continue
        key = f"{folder}{slash}{stem}"
        group = texts.setdefault(key, {}) if suffix in TEXTS else pictures
        place = suffix if suffix in TEXTS else key
        if place in group:
            other = group[place].name
            twice = (
                f"has {member.name!r} twice"
                if other == member.name
                else (f"has two pictures of one stem, {other!r} and {member.name!r}")
            )
            raise DataError(f"{file} {twice}: nobody knows which belongs to its text")
        group[place] = member
    places, is_json = [], []
    for key, picture in pictures.items():
        text = next((texts[key][s] for s in TEXTS if s in texts.get(key, ())), None)
        if text is not None:
            pair = (picture, text)
            places.append([n for m in pair for n in (m.offset_data // BLOCK, m.size)])
            is_json.append(text is texts[key].get(".json"))
    return Index(
        places=np.array(places, np.uint32).reshape(-1, 4),
        is_json=np.array(is_json, bool),
        without_text=len(pictures) - len(places),
        without_picture=len(texts.keys() - pictures.keys()),
        stamp=(stat.st_size, stat.st_mtime_ns),
    )


def _compressed(file: Path) -> str:
    return f"{file} is compressed, so that nothing can be read by its place: unpack it to .tar"


def _starts(file: Path, *marks: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(8).startswith(marks)
    except OSError:
        return False


def indices_of(files: Sequence[Path]) -> list[Index]:
    """What lies in each shard: as it was kept, or read anew and kept.

    It is kept beside the shards, or in the user's cache where that folder cannot be written; by
    the names of the shards, whose size and time say whether it still holds.

    Raises:
      DataError: as of `read_headers`, or if a shard is not there.
    """
    folder = files[0].parent
    places = [folder / INDEX, _cache(folder)]
    kept = next((found for place in places if (found := _load(place))), {})
    stale = []
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        index = kept.get(file.name)
        if index is None or index.stamp != (stat.st_size, stat.st_mtime_ns):
            stale.append(file)
    if stale:
        with ThreadPoolExecutor(READERS) as pool:
            kept |= zip([file.name for file in stale], pool.map(read_headers, stale))
        for place in places:
            if _save(place, kept):
                break
    return [kept[file.name] for file in files]


def _cache(folder: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return root / "vit_jax" / f"shards-{digest}.npz"


def _load(place: Path) -> dict[str, Index]:
    """{shard: its index}; nothing where there is none, or it is damaged."""
    try:
        with place.open("rb") as file, np.load(file) as arrays:
            numbers, starts = arrays["numbers"], arrays["starts"]
            whole = arrays["places"], arrays["is_json"]
            names = json.loads(arrays["names"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    found = {}
    for i, name in enumerate(names):
        own = slice(starts[i], starts[i + 1])
        without_text, without_picture, *stamp = map(int, numbers[i])
        parts = (array[own] for array in whole)
        found[name] = Index(*parts, without_text, without_picture, tuple(stamp))
    return found


def _save(place: Path, indices: dict[str, Index]) -> bool:
    """Whether it could be written; whole or not at all, and by several at once."""
    unfinished = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez(
                file,
                names=np.frombuffer(json.dumps(list(indices)).encode(), np.uint8),
                starts=np.cumsum([0, *(len(index.places) for index in indices.values())]),
                places=np.concatenate([index.places for index in indices.values()]),
                is_json=np.concatenate([index.is_json for index in indices.values()]),
                numbers=np.array(
                    [(i.without_text, i.without_picture, *i.stamp) for i in indices.values()],
                    np.int64,
                ),
            )
        os.replace(unfinished, place)
    except OSError:
        unfinished.unlink(missing_ok=True)
        return False
    return True
