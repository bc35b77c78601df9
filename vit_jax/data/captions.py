"""Pictures with captions, in whichever of four forms a folder holds them."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vit_jax.contracts import Dataset, Example
from vit_jax.data import coco, shards, tfds
from vit_jax.data.folder import SHOWN, SPLITS, SUFFIXES, all_files, read_file
from vit_jax.data.geometry import Pixels, picture_size
from vit_jax.data.masks import check_share, existing, held_out
from vit_jax.errors import ConfigError, DataError, nearest

FILES = ("captions.jsonl", "captions.txt")
PREPARED = "coco_captions"  # what TFDS calls COCO's
COMPARED = 10_000  # names at most, to find the nearest one: of a million it takes minutes
KEYS = {"file", "captions", "caption"}  # of a line of JSON

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captions:
    """Pictures as files, read when asked for; the captions are in memory.

    An example has `image`, the bytes of the picture, and `captions`.

    Attributes:
      root: the folder that holds the pictures.
      files: their paths below `root`.
      texts: the captions of each, at least one.
    """

    root: Path
    files: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

    class_names: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return {"image": read_file(self.root / self.files[index]), "captions": self.texts[index]}

    def captions(self, index: int) -> tuple[str, ...]:
        """Of one example, without its picture."""
        return self.texts[index]

    def size(self, index: int) -> Pixels:
        """(H, W) of a picture."""
        return picture_size(read_file(self.root / self.files[index]))

    def name(self, index: int) -> str:
        """The picture's path, such as `beach/a.jpg`."""
        return self.files[index]


def open(split: str, *, data_dir: str, validation_share: float = 0.2) -> Dataset:
    """The split "train" or "validation" of pictures with captions.

    `data_dir` holds one of these:

    - Pictures, to any depth, and a `captions.jsonl`, whose lines are `{"file": "beach/a.jpg",
      "captions": ["a dog runs", "a wet dog"]}` or have one `"caption"`; or a `captions.txt` of
      lines `beach/a.jpg<TAB>a dog runs`. A picture may have several lines. Where `data_dir` has
      `train` and `val`, each with such a file, they are the splits; otherwise a hash of each
      picture's path holds `validation_share` of them out.
    - COCO's captions: pictures, and `annotations/captions_train2017.json` and so on, as
      `vit_jax/data/coco.py` finds them.
    - `coco_captions` as TFDS prepares it.
    - Tar shards: `vit_jax/data/shards.py`.

    Pictures without a caption are counted in the log and left out.

    Raises:
      ConfigError: if there is no such split, or `validation_share` cannot be.
      DataError: if the folder holds none of these, saying what was looked for; or naming the file
        and the line: not UTF-8, not of that form, an empty caption, or one without its picture.
    """
    if split not in SPLITS:
        raise ConfigError(f"captions has no split {split!r}.{nearest(split, SPLITS)}")
    check_share(validation_share)
    if "{" in data_dir:
        return shards.open(split, data_dir=data_dir, validation_share=validation_share)
    root = existing(data_dir, "captions")
    lists = _lists(root, split)
    if lists is not None:
        file, whole = lists
        texts = _read(file)
        if not whole:
            texts = dict(held_out(list(texts.items()), split, validation_share, lambda i: i[0]))
        return Captions(file.parent, tuple(texts), tuple(map(tuple, texts.values())))
    if tfds.prepared(root, PREPARED):
        return tfds.open(split, name=PREPARED, data_dir=data_dir)
    if any(root.glob("captions*.json")) or any(root.glob("annotations/captions*.json")):
        return _open_coco(root, split, validation_share)
    if shards.found(root):
        return shards.open(split, data_dir=data_dir, validation_share=validation_share)
    raise DataError(f"{root} {_lacking(root)}")


def _lists(root: Path, split: str) -> tuple[Path, bool] | None:
    """The list of captions for a split, and whether it is of that split alone."""
    of_splits = {
        name: next((f for s in SPLITS[name] if (f := _list(root / s))), None) for name in SPLITS
    }
    if of_splits[split]:
        return of_splits[split], True
    if whole := _list(root):
        return whole, False
    for other in filter(None, of_splits.values()):
        spellings = " or ".join(map(repr, SPLITS[split]))
        raise DataError(
            f"{root} has {other.relative_to(root)} but nothing for {split}: wanted a folder "
            f"{spellings} with {' or '.join(FILES)}"
        )
    return None


def _list(folder: Path) -> Path | None:
    there = [folder / name for name in FILES if (folder / name).is_file()]
    if len(there) > 1:
        raise DataError(f"{folder} has both {FILES[0]} and {FILES[1]}: only one can be right")
    return there[0] if there else None


def _read(file: Path) -> dict[str, list[str]]:
    """{picture: captions} of a list, in its order."""
    texts: dict[str, list[str]] = {}
    parse = _json_line if file.suffix == ".jsonl" else _tab_line
    places: dict[str, str] = {}
    for where, line in _lines(file):
        picture, captions = parse(line, where)
        picture = Path(picture).as_posix()
        places.setdefault(picture, where)
        texts.setdefault(picture, []).extend(checked(captions, where))
    if not texts:
        raise DataError(f"{file} is empty: it must hold a line for each picture")
    found = [path.relative_to(file.parent).as_posix() for path in all_files(file.parent)]
    pictures = {path for path in found if Path(path).suffix.lower() in SUFFIXES}
    for picture in texts:
        if picture not in pictures and not (file.parent / picture).is_file():
            hint = nearest(picture, pictures) if len(pictures) <= COMPARED else ""
            raise DataError(
                f"{places[picture]} is about {picture!r}, and there is no such picture in "
                f"{file.parent}.{hint}"
            )
    _say_without(file, sorted(pictures - texts.keys()), len(texts))
    return texts


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """(file and number, text) of each line that is not empty."""
    for number, line in enumerate(read_file(file, str(file)).split(b"\n"), 1):
        where = f"line {number} of {file}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} is not UTF-8 (the byte {line[error.start]:#04x}): save the file in that "
                "encoding"
            ) from error
        if text.strip():
            yield where, text


def _json_line(line: str, where: str) -> tuple[str, Sequence[Any]]:
    wanted = 'wanted {"file": "a.jpg", "captions": ["a dog runs"]}'
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON ({error}): {wanted}") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {line.strip()[:60]!r}: {wanted}")
    if not isinstance(entry.get("file"), str) or not ("captions" in entry or "caption" in entry):
        lacking = "caption" if isinstance(entry.get("file"), str) else "file"
        hint = nearest(lacking, entry.keys() - KEYS)
        raise DataError(f"{where} has no {lacking!r}: {wanted}.{hint}")
    captions = entry.get("captions", [entry.get("caption")])
    if not isinstance(captions, list) or not captions:
        raise DataError(f"{where} has captions={captions!r}: {wanted}")
    return entry["file"], captions


def _tab_line(line: str, where: str) -> tuple[str, Sequence[Any]]:
    picture, tab, caption = line.partition("\t")
    if not tab:
        raise DataError(f"{where} has no tab between the picture's name and its caption: {line!r}")
    return picture.strip(), [caption]


def checked(captions: Iterable[Any], where: str) -> list[str]:
    """Captions without space around them; DataError, starting with `where`, if one is none."""
    texts = []
    for caption in captions:
        if not isinstance(caption, str):
            raise DataError(f"{where} has the caption {caption!r}, which is no text")
        if not caption.strip():
            raise DataError(f"{where} has an empty caption")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} has a caption that is no Unicode: {caption!r}") from error
        texts.append(caption.strip())
    return texts


def _say_without(place: Path, without: Sequence[str], having: int) -> None:
    if without:
        log.warning(
            "%s: pictures without a caption are left out: %d of %d (%s%s)",
            place,
            len(without),
            having + len(without),
            ", ".join(without[:SHOWN]),
            f" and {len(without) - SHOWN} more" if len(without) > SHOWN else "",
        )


def _open_coco(root: Path, split: str, share: float) -> Captions:
    """COCO's own: Chen et al. 2015 (arXiv:1504.00325)."""
    file, whole = coco.find(root, split, kind="captions")
    content = coco.load(file, ("images", "annotations"))
    known = {coco.field(picture, "id", file, "image") for picture in content["images"]}
    of_id: dict[Any, list[str]] = {}
    for number, entry in enumerate(content["annotations"]):
        where = f"{file}: annotation {entry.get('id', f'number {number}')}"
        if entry.get("image_id") not in known:
            raise DataError(
                f"{where} is of image_id={entry.get('image_id')!r}, and there is no such image"
            )
        caption = coco.field(entry, "caption", file, "annotation")
        of_id.setdefault(entry["image_id"], []).extend(checked([caption], where))
    pictures = [picture for picture in content["images"] if picture["id"] in of_id]
    if not pictures:
        raise DataError(f"{file} has no captions")
    names = {p["id"]: coco.field(p, "file_name", file, "image") for p in content["images"]}
    _say_without(file, [names[i] for i in names if i not in of_id], len(pictures))
    if not whole:
        pictures = held_out(pictures, split, share, lambda picture: names[picture["id"]])
    return Captions(
        coco.folder_of(pictures, file, root, split, ""),
        tuple(names[picture["id"]] for picture in pictures),
        tuple(tuple(of_id[picture["id"]]) for picture in pictures),
    )


def _lacking(root: Path) -> str:
    """What is missing for any form."""
    files = all_files(root)
    pictures = sum(path.suffix.lower() in SUFFIXES for path in files)
    wanted = (
        f"wanted {FILES[0]} or {FILES[1]} there or in train and val, "
        f"annotations/captions_*.json in COCO's form, {PREPARED} as TFDS prepares it, or tar files"
    )
    if not files:
        return f"is empty: {wanted}"
    lists = [path for path in files if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl")]
    lists = [path.relative_to(root).as_posix() for path in lists]
    also = f" ({', '.join(lists[:SHOWN])} is not read)" if lists else ""
    return f"has {pictures} pictures and no captions{also}: {wanted}"
