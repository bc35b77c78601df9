"""What a checkpoint sees in pictures: python -m vit_jax.predict --checkpoint=REF PICTURE..."""

import argparse
import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import command
from vit_jax.errors import ConfigError, DataError

USAGE = """Says what is in pictures, by any checkpoint: the likeliest classes with their
probabilities.

  python -m vit_jax.predict --checkpoint=hf:google/vit-base-patch16-224 cat.jpg
  python -m vit_jax.predict --checkpoint=runs/vit-folder my_pictures --output=guesses.csv
  python -m vit_jax.predict --checkpoint=my_model.safetensors my_pictures --sheet=guesses.png

A folder is searched with its sub-folders. What cannot be read is named at the end and left out.
"""
SHEET = 60  # pictures on a sheet
AHEAD = 2  # batches that are read while one is computed
PROGRESS_FROM = 9  # pictures


def predict(
    loaded: Any,
    files: Iterable[Path],
    *,
    batch_size: int = 16,
    top: int = 5,
    threads: int = 2,
    warn: Any = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """One result for each file, in their order, while the next ones are being read.

    Args:
      loaded: of `vit_jax.load`, a classifier.
      files: picture files.
      batch_size: pictures at once; halved, for good, each time memory does not suffice.
      top: how many classes of each.
      threads: that read and prepare pictures.
      warn: is told when the batch shrinks.

    Yields:
      {"picture": path, "predictions": [{"label", "name", "probability"}, ...]}, likeliest first, or
      {"picture": path, "error": why it cannot be read}.
    """
    from vit_jax.build import build

    task = build(dict(loaded.recipe.task), top=top)
    if loaded.preprocess.size is None:
        batch_size = 1  # each picture keeps its own shape

    def read(file: Path) -> np.ndarray | DataError:
        try:
            return loaded.preprocess.one(file)
        except DataError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        waiting: list[tuple[Path, Any]] = []
        source = iter(files)
        while True:
            while len(waiting) < (AHEAD + 1) * batch_size and (file := next(source, None)):
                waiting.append((file, pool.submit(read, file)))
            if not waiting:
                return
            chosen, images = [], []
            while waiting and len(images) < batch_size:
                file, future = waiting.pop(0)
                result = future.result()
                chosen.append((file, result))
                if not isinstance(result, DataError):
                    images.append(result)
            found: list[dict] = []
            while len(found) < len(images):
                part = np.stack(images[len(found) : len(found) + batch_size])
                try:
                    found += _classes(loaded, task, part, batch_size)
                except MemoryError as error:
                    if batch_size == 1:
                        raise
                    batch_size //= 2
                    warn(f"{error}; going on with {batch_size} pictures at once")
            rows = iter(found)
            for file, result in chosen:
                if isinstance(result, DataError):
                    yield {"picture": str(file), "error": str(result).removeprefix(f"{file}: ")}
                else:
                    yield {"picture": str(file), "predictions": next(rows)}


def _classes(loaded: Any, task: Any, images: np.ndarray, batch_size: int) -> list[list[dict]]:
    """[b, H, W, 3], b <= batch_size, -> the likeliest classes of each."""
    import jax

    from vit_jax import mesh

    rows = len(images)
    # Always the same shape, so that the last batch needs no compilation of its own.
    padded = np.concatenate([images, np.zeros((batch_size - rows, *images.shape[1:]), np.float32)])
    with mesh.memory_errors(batch_size):
        outputs = loaded(image=padded)
        if not hasattr(outputs, "ndim") or outputs.ndim != 2:
            raise ConfigError(
                f"{loaded.source} has no head, so it names no classes; train one: "
                "python -m vit_jax.main --config=configs/vit.py:finetune --config.init=..."
            )
        found = jax.device_get(task.predict(outputs, {}))
    labels, probabilities = found["top_labels"][:rows], found["top_probabilities"][:rows]
    return [
        [
            {"label": int(label), "name": _name(loaded, label), "probability": float(probability)}
            for label, probability in zip(*row, strict=True)
        ]
        for row in zip(labels, probabilities, strict=True)
    ]


def _name(loaded: Any, label: int) -> str:
    return loaded.labels[label] if loaded.labels else f"class {label}"


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


def as_text(results: list[dict[str, Any]], form: str) -> str:
    """Results as a table for people, as JSON or as CSV."""
    good = [result for result in results if "predictions" in result]
    if form == "json":
        return json.dumps(results, indent=2) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["picture", "rank", "label", "name", "probability"])
        for result in good:
            for rank, row in enumerate(result["predictions"], 1):
                probability = f"{row['probability']:.6g}"
                writer.writerow([result["picture"], rank, row["label"], row["name"], probability])
        return out.getvalue()
    lines = []
    for result in good:
        lines.append(result["picture"])
        lines += [f"  {row['probability']:7.2%}  {row['name']}" for row in result["predictions"]]
    return "".join(line + "\n" for line in lines)


def draw(path: Path, loaded: Any, results: list[dict[str, Any]]) -> Path:
    """A sheet of the first pictures, each with its likeliest class."""
    from vit_jax import pictures
    from vit_jax.data.decode import as_rgb

    shown = [result for result in results if "predictions" in result][:SHEET]
    titles = [
        f"{r['predictions'][0]['name']} ({r['predictions'][0]['probability']:.0%})" for r in shown
    ]
    return pictures.sheet(path, [as_rgb(r["picture"]) for r in shown], titles, loaded.source)


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
    add("--top", type=int, default=5, help="classes of each picture (default 5)")
    add("--format", choices=["table", "json", "csv"], help="default: of OUTPUT's name, or table")
    add("--output", type=Path, metavar="FILE", help="instead of the terminal")
    add("--sheet", type=Path, metavar="FILE.png", help="also draw the pictures with their classes")
    add("--batch_size", type=int, default=16, help="pictures at once (default 16)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16")
    add("--image_size", type=int, help="pixels, where not the checkpoint's own")
    add("--threads", type=int, default=2, help="that read pictures (default 2)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """What can be wrong before anything is loaded; ConfigError says it."""
    for name in ("top", "batch_size", "threads"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}={getattr(options, name)} must be at least 1")
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
        from vit_jax.pretrained.load import load

        loaded = load(options.checkpoint, dtype=options.dtype, image_size=options.image_size)
        _say(loaded.source)
        _say(f"preprocessing: {loaded.preprocess}")
        for remark in loaded.remarks:
            _say(f"note: {remark}")
        results = _all(loaded, files, options)
        suffix = options.output.suffix.lstrip(".") if options.output else ""
        form = options.format or (suffix if suffix in ("json", "csv") else "table")
        text = as_text(results, form)
        if options.output:
            write(options.output, text)
            _say(f"written: {options.output}")
        else:
            print(text, end="", flush=True)
        good = [result for result in results if "error" not in result]
        if options.sheet and good:
            _say(f"drawn: {draw(options.sheet, loaded, results)}")
        for result in results:
            if "error" in result:
                _say(f"left out: {result['picture']}: {result['error']}")
        if not good:
            raise DataError(f"none of the {len(results)} files is a picture that can be read")
        return 0

    return command.guard(body)


def _all(loaded: Any, files: list[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
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
    settings = {
        "batch_size": min(options.batch_size, len(files)),
        "top": options.top,
        "threads": options.threads,
        "warn": _say,
    }
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
