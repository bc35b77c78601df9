"""Pictures through a loaded model, batch after batch, while the next ones are being read."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import ConfigError, DataError

PIXELS, MOST = 2**21, 16  # of a batch: of all its pictures, and pictures
AHEAD = 2  # batches that are read while one is computed


def predict(
    loaded: Any,
    files: Iterable[Path],
    *,
    batch_size: int | None = None,
    top: int | None = None,
    threshold: float | None = None,
    threads: int = 2,
    draw: Callable[[Path, np.ndarray, str], None] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """One result for each file, in their order, while the next ones are being read.

    Pictures that a model takes in several sizes are computed together where they are padded to the
    same shape, which does not depend on the others; so do a picture's numbers.

    Args:
      loaded: of `vit_jax.load`, a model with a head.
      files: picture files.
      batch_size: pictures at once, halved, for good, each time memory does not suffice; None is 16
        small ones, and fewer of large ones.
      top: how many classes, or objects at most, of each; None is the task's own.
      threshold: probability from which an object is told; None is the task's own.
      threads: that read and prepare pictures.
      draw: is given each file with its drawn picture, uint8 [H, W, 3], and a title, in any order.
      warn: is told when the batch shrinks.

    Yields:
      {"picture": path, "predictions": rows of `vit_jax.found`}, surest first, or
      {"picture": path, "error": why it cannot be read}.

    Raises:
      ConfigError: if the model has no head, or its task no such number.
    """
    from vit_jax import found
    from vit_jax.build import build
    from vit_jax.data.decode import as_rgb

    task = task_of(loaded, top=top, threshold=threshold)
    kind, prepare = found.kind_of(task), loaded.preprocess
    beside = build(loaded.recipe.beside)
    alone = prepare.size is None and prepare.pad is None and "image_mask" not in loaded.reads
    if alone:
        batch_size = 1  # each picture keeps its own shape
    elif batch_size is None:
        batch_size = max(min(PIXELS // math.prod(prepare.typical), MOST), 1)
    if isinstance(files, Sized):
        batch_size = max(min(batch_size, len(files)), 1)

    def read(file: Path) -> Prepared | DataError:
        try:
            picture = as_rgb(file)
            image = prepare.one(picture)
            shape = image.shape[:2] if alone else prepare.shape(image.shape[:2])
            return Prepared(picture.shape[:2], image, shape, added(image, beside))
        except DataError as error:
            return error

    def tell(file: Path, size: tuple[int, int], prediction: dict[str, Any]) -> dict[str, Any]:
        rows = kind.rows(task, prediction, size, loaded.labels)
        if draw:
            picture = as_rgb(file)
            if kind.draws:
                picture, title, _ = task.draw(
                    picture, {"image": picture}, prediction, loaded.labels
                )
                title = f"{file.name}: {title}"
            else:
                title = f"{rows[0]['name']} ({rows[0]['probability']:.0%})"
            draw(file, picture, title)
        return {"picture": str(file), "predictions": rows}

    with ThreadPoolExecutor(threads) as pool:
        waiting: list[tuple[int, Path, Future]] = []  # being read
        told: dict[int, Future | dict] = {}  # by the place in `files`
        source, place = enumerate(files), 0
        while True:
            while len(waiting) < (AHEAD + 1) * batch_size and (entry := next(source, None)):
                waiting.append((*entry, pool.submit(read, entry[1])))
            if not waiting:
                break
            chosen: list[tuple[int, Path, Prepared]] = []
            for entry in list(waiting):
                number, file, future = entry
                result = future.result()
                if isinstance(result, DataError):
                    reason = str(result).removeprefix(f"{file}: ")
                    told[number] = {"picture": str(file), "error": reason}
                    waiting.remove(entry)
                elif not chosen or result.shape == chosen[0][2].shape:
                    chosen.append((number, file, result))
                    waiting.remove(entry)
                if len(chosen) == batch_size:
                    break
            done = 0
            while done < len(chosen):
                part = chosen[done : done + batch_size]
                try:
                    predictions = _predictions(loaded, task, [p for *_, p in part], batch_size)
                except MemoryError as error:
                    if batch_size == 1:
                        raise
                    batch_size //= 2
                    warn(f"{error}; going on with {batch_size} pictures at once")
                    continue
                for (number, file, one), prediction in zip(part, predictions, strict=True):
                    told[number] = pool.submit(tell, file, one.size, prediction)
                done += len(part)
            while place in told:
                result = told[place]
                if isinstance(result, Future):
                    # What is not told yet keeps its masks in memory: at most two batches of it.
                    if waiting and not result.done() and len(told) <= 2 * batch_size:
                        break
                    result = result.result()
                del told[place]
                yield result
                place += 1


@dataclass(frozen=True)
class Prepared:
    """A picture as the model gets it.

    Attributes:
      size: (H, W) of the picture itself.
      image: float32 [h, w, 3].
      shape: (H, W) that it is padded to.
      more: other entries of its row.
    """

    size: tuple[int, int]
    image: np.ndarray
    shape: tuple[int, int]
    more: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def added(image: np.ndarray, steps: Iterable[Callable]) -> dict[str, np.ndarray]:
    """What transforms add to a prepared picture; where they draw, the same each time for it."""
    example = {"image": image}
    rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(image)))
    for step in steps:
        example = step(example, rng)
    return {name: value for name, value in example.items() if name != "image"}


def task_of(loaded: Any, *, top: int | None = None, threshold: float | None = None) -> Any:
    """The task of a checkpoint, with other numbers where they are given.

    Raises:
      ConfigError: if it has no such number.
    """
    from vit_jax.build import build

    task, changes = build(dict(loaded.recipe.task)), {}
    for value, names in ((top, ("top", "detections")), (threshold, ("threshold",))):
        if value is None:
            continue
        name = next((name for name in names if hasattr(task, name)), None)
        if name is None:
            raise ConfigError(
                f"--{names[0]}={value} has no meaning for {type(task).__name__.lower()}, which is "
                f"what {loaded.source} does"
            )
        changes[name] = value
    if hasattr(task, "tokenizer") and loaded.words is not None:
        changes["tokenizer"] = loaded.tokenizer
    return dataclasses.replace(task, **changes)


def _predictions(
    loaded: Any, task: Any, pictures: list[Prepared], batch_size: int
) -> list[dict[str, Any]]:
    """Pictures of one shape, at most `batch_size`, -> the task's predictions of each."""
    import jax

    from vit_jax import mesh
    from vit_jax.pretrained.preprocess import padded

    rows = len(pictures)
    # Always the same shape, so that the last batch needs no compilation of its own.
    filled = [one.image for one in pictures] + [pictures[0].image] * (batch_size - rows)
    batch = padded(filled, pictures[0].shape)
    rest = [one.more for one in pictures] + [pictures[0].more] * (batch_size - rows)
    batch |= {name: np.stack([more[name] for more in rest]) for name in pictures[0].more}
    with mesh.memory_errors(batch_size):
        outputs = loaded(**{k: v for k, v in batch.items() if k in loaded.reads})
        if not isinstance(outputs, dict) and not hasattr(outputs, "ndim"):
            raise ConfigError(
                f"{loaded.source} has no head, so it names no classes; train one: "
                "python -m vit_jax.main --config=configs/vit.py:finetune --config.init=..."
            )
        found = jax.device_get(task.predict(outputs, batch))
    return [{k: v[row] for k, v in found.items()} for row in range(rows)]
