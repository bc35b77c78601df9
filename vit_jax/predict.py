"""What a checkpoint sees in pictures: python -m vit_jax.predict --checkpoint=REF PICTURE..."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import command, heap, programs
from vit_jax.errors import ConfigError, DataError
from vit_jax.stream import predict, task_of

USAGE = """Says what is in pictures, by any checkpoint: the likeliest classes with their
probabilities, objects with boxes, the share of each class of pixels, or segments.

  python -m vit_jax.predict --checkpoint=hf:google/vit-base-patch16-224 cat.jpg
  python -m vit_jax.predict --checkpoint=runs/vit-folder my_pictures --output=guesses.csv
  python -m vit_jax.predict --checkpoint=my_model.safetensors my_pictures --sheet=guesses.png
  python -m vit_jax.predict --checkpoint=runs/detr my_pictures --threshold=0.7 --draw=drawn
  python -m vit_jax.predict --checkpoint=runs/detr my_pictures --threshold=0 --output=coco.json
  python -m vit_jax.predict --checkpoint=runs/upernet streets --window=512 --flip --draw=drawn

A model of pictures and texts, such as CLIP, is told what to look for:

  python -m vit_jax.predict --checkpoint=hf:openai/clip-vit-base-patch32 cat.jpg \\
      --captions "a cat on a sofa" "a dog in the snow"
  python -m vit_jax.predict --checkpoint=hf:openai/clip-vit-base-patch32 my_pictures \\
      --search "a red car" --sheet=red_cars.png

A captioner writes a sentence, and `--draw` shows where it looked for each word:

  python -m vit_jax.predict --checkpoint=runs/captioner my_pictures --beam=5 --draw=drawn

A folder is searched with its sub-folders. What cannot be read is named at the end and left out.
"""
SHEET = 60  # pictures on a sheet of a classifier
PROGRESS_FROM = 9  # pictures
SEARCHED = 20  # pictures that a search tells and draws


def pictures_of(places: Iterable[str]) -> list[Path]:
    """Files as they are, folders with all pictures below them.

    Raises:
      DataError: if a place does not exist, or there is no picture at all.
    """
    from vit_jax.data.folder import SUFFIXES, all_files

    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            found += [file for file in all_files(place) if file.suffix.lower() in SUFFIXES]
        elif place.exists():
            found.append(place)
        else:
            raise DataError(f"there is no picture or folder {str(place)!r}")
    if not found:
        raise DataError(f"there is no picture in {', '.join(places)}")
    return list(dict.fromkeys(found))


class Drawings:
    """Drawn pictures: each in a file of its own, and the first ones on a sheet.

    Args:
      files: all pictures, in order.
      folder: for a PNG of each, by the names of the files; None for none.
      count: how many are kept for the sheet.
    """

    def __init__(self, files: list[Path], folder: Path | None, count: int):
        self.folder, self.count = folder, count
        self.kept: dict[int, tuple[np.ndarray, str]] = {}
        self.places = {file: place for place, file in enumerate(files)}
        self.names: dict[Path, str] = {}
        used: dict[str, int] = {}
        for file in files:
            used[file.stem] = used.get(file.stem, 0) + 1
            again = f"-{used[file.stem]}" if used[file.stem] > 1 else ""
            self.names[file] = f"{file.stem}{again}.png"
        self._lock = threading.Lock()

    def __call__(self, file: Path, picture: np.ndarray, title: str) -> None:
        """Takes one picture, from any thread."""
        from PIL import Image

        if self.folder:
            path = self.folder / self.names[file]
            unfinished = path.with_name(path.name + ".tmp")
            Image.fromarray(picture).save(unfinished, format="PNG")
            os.replace(unfinished, path)
        with self._lock:
            self.kept[self.places[file]] = picture, title
            if len(self.kept) > self.count:
                del self.kept[max(self.kept)]

    def sheet(self, path: Path, header: str, cell: int) -> Path:
        """Draws the kept pictures on one."""
        from vit_jax import pictures

        shown = [self.kept[place] for place in sorted(self.kept)]
        return pictures.sheet(path, *map(list, zip(*shown, strict=True)), header, cell)


def write(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.predict",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="REF", help="hf:OWNER/NAME, a file, folder or run")
    add("places", nargs="+", metavar="PICTURE_OR_FOLDER")
    add("--captions", nargs="+", metavar="TEXT", help="how probable is each, of those given?")
    add("--search", metavar="TEXT", help="rank the pictures by it, and draw the nearest on a sheet")
    add("--top", type=int, help="classes, objects, or pictures of a search (default 5, 100, 20)")
    add("--beam", type=int, help="sentences that a captioner follows at once (default 1)")
    add("--window", type=int, metavar="PIXELS", help="a segmenter is asked by such squares; 0: not")
    add("--flip", action=argparse.BooleanOptionalAction, help="and mirrored, the mean of both")
    add("--scales", type=_numbers, metavar="0.75,1,1.25", help="and so resized, the mean of all")
    add("--threshold", type=float, help="probability from which an object is told")
    add("--format", choices=["table", "json", "csv"], help="default: of OUTPUT's name, or table")
    add("--output", type=Path, metavar="FILE", help="instead of the terminal")
    add("--draw", type=Path, metavar="FOLDER", help="also draw each picture with what is found")
    add("--sheet", type=Path, metavar="FILE.png", help="also draw the first pictures on one sheet")
    add("--batch_size", type=int, help="pictures at once (default 16, fewer if they are large)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16")
    add("--image_size", type=int, help="pixels, where not the checkpoint's own")
    add("--threads", type=int, default=2, help="that read pictures (default 2)")
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    """Of a command line: 0.75,1,1.25."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        message = f"{text!r}: wanted numbers such as 0.75,1,1.25"
        raise argparse.ArgumentTypeError(message) from error


def _check(options: argparse.Namespace) -> None:
    """What can be wrong before anything is loaded; ConfigError says it."""
    for name in ("top", "batch_size", "threads", "beam"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value} must be at least 1")
    if options.captions and options.search:
        raise ConfigError("--captions and --search: wanted one of them")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise ConfigError(f"--threshold={options.threshold:g} must be in 0..1")
    if options.draw:
        try:
            options.draw.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--draw={options.draw} is no folder: {error.strerror}") from error
        if not os.access(options.draw, os.W_OK):
            raise ConfigError(f"--draw={options.draw} cannot be written")
    for file in filter(None, (options.output, options.sheet)):
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise ConfigError(f"{file} cannot be written: wanted a file in a folder that exists")
        if not os.access(file.absolute().parent, os.W_OK):
            raise ConfigError(f"{file} cannot be written: no right to write in its folder")


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status, 3 if no picture could be read."""
    options = _parser().parse_args(argv)

    def body() -> int:
        _check(options)
        files = pictures_of(options.places)
        command.quiet()
        heap.keep()
        programs.keep()
        from vit_jax.pretrained.load import load

        loaded = load(options.checkpoint, dtype=options.dtype, image_size=options.image_size)
        _say(loaded.source)
        _say(f"preprocessing: {loaded.preprocess}")
        for remark in loaded.remarks:
            _say(f"note: {remark}")
        from vit_jax import found, pictures, zero_shot

        how = {name: getattr(options, name) for name in ("window", "flip", "scales")}
        how = {name: value for name, value in how.items() if value is not None}
        if how or loaded.recipe.inference:
            loaded = loaded.averaged(**how)
        if options.beam:
            loaded = loaded.writing(options.beam)
        if zero_shot.reads_texts(loaded) or options.captions or options.search:
            loaded = _with_texts(loaded, options)
        if options.search:
            return _search(loaded, files, options)
        task = task_of(loaded, top=options.top, threshold=options.threshold)
        kind = found.kind_of(task)
        if options.draw and not kind.draws:
            raise ConfigError(f"--draw is for models that say where; use --sheet: {loaded.source}")
        count = pictures.fitting(task.cell) if kind.draws else SHEET
        drawings = Drawings(files, options.draw, count if options.sheet else 0)
        results = _all(loaded, files, options, drawings if options.draw or options.sheet else None)
        _tell(options, found.as_text(results, _form(options), kind))
        good = [result for result in results if "error" not in result]
        if options.draw and good:
            _say(f"drawn: {len(good)} pictures in {options.draw}")
        if options.sheet and good:
            _say(f"drawn: {drawings.sheet(options.sheet, loaded.source, task.cell)}")
        _say_left_out(results)
        return 0

    return command.guard(body)


def _with_texts(loaded: Any, options: argparse.Namespace) -> Any:
    """A model of pictures and texts as one that tells what its command line asks for."""
    from vit_jax import zero_shot

    texts = [options.search] if options.search else options.captions
    if not texts:
        raise ConfigError(
            f"{loaded.source} needs texts to compare pictures with: --captions "
            '"a cat" "a dog", or --search "a cat"'
        )
    if options.search:
        model = zero_shot.searching(loaded, options.search)
    else:
        model = zero_shot.described(loaded, texts, top=len(texts))
    if remark := zero_shot.cut(loaded, texts):
        _say(f"note: {remark}")
    if len(texts) == 1 and model.recipe.task.get("loss") == "softmax":
        _say("note: probabilities add up to 1 over the captions, so a single one always has 100 %")
    return model


def _search(model: Any, files: list[Path], options: argparse.Namespace) -> int:
    """Ranks pictures by a text, tells the nearest, and draws them on a sheet."""
    from vit_jax import search

    top, options.top = options.top or SEARCHED, None  # of pictures, not of what is in each
    results = _all(model, files, options, None)
    rows = search.ranked(results)
    if rows:
        shown = rows if options.output else rows[:top]
        _tell(options, search.as_text(shown, _form(options)))
        drawn = search.sheet(options.sheet or Path("search.png"), rows[:top], options.search)
        _say(f"drawn: {drawn}, the nearest {len(rows[:top])} of {len(rows)} pictures")
    _say_left_out(results)
    return 0


def _form(options: argparse.Namespace) -> str:
    """How results are written: as asked for, else by OUTPUT's name, else as a table."""
    suffix = options.output.suffix.lstrip(".") if options.output else ""
    return options.format or (suffix if suffix in ("json", "csv") else "table")


def _tell(options: argparse.Namespace, text: str) -> None:
    """Results to OUTPUT, or to the terminal."""
    if options.output:
        write(options.output, text)
        _say(f"written: {options.output}")
    else:
        print(text, end="", flush=True)


def _say_left_out(results: list[dict[str, Any]]) -> None:
    """Names what could not be read; DataError if that is all."""
    broken = [result for result in results if "error" in result]
    for result in broken:
        _say(f"left out: {result['picture']}: {result['error']}")
    if len(broken) == len(results):
        raise DataError(f"none of the {len(results)} files is a picture that can be read")


def _all(
    loaded: Any, files: list[Path], options: argparse.Namespace, draw: Drawings | None
) -> list[dict[str, Any]]:
    """All results, with a bar and images/s on stderr where there are many."""
    import rich.progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[speed]}"),
        rich.progress.TimeRemainingColumn(),
    )
    many = len(files) >= PROGRESS_FROM
    bar = rich.progress.Progress(
        *columns, console=console, disable=not many or not console.is_terminal
    )
    settings = {name: getattr(options, name) for name in ("top", "threshold", "threads")}
    settings |= {"batch_size": options.batch_size, "draw": draw, "warn": _say}
    results, began = [], time.monotonic()
    with bar:
        shown = bar.add_task("", total=len(files), speed="")
        for result in predict(loaded, files, **settings):
            results.append(result)
            speed = len(results) / (time.monotonic() - began)
            bar.update(shown, advance=1, speed=f"{speed:.1f} images/s")
    if many:
        seconds = time.monotonic() - began
        _say(f"{len(results)} pictures in {seconds:.1f} s: {len(results) / seconds:.1f} images/s")
    return results


def _say(text: str) -> None:
    """What is no result goes to stderr, so that the results can be piped."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
