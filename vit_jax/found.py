"""What a model found in a picture, as plain rows: what tables, CSV and JSON are made of.

A row is a dictionary with some of `label`, `name`, `probability`, `share` (of the picture's
pixels), `bbox` ([x, y, width, height] in the picture's own pixels, of its upper left corner) and
`segmentation` (COCO's run lengths over the whole picture); of a picture restored, its `loss`.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import boxes as geometry
from vit_jax.contracts import Predictions, Task
from vit_jax.data.geometry import boxes_of_masks
from vit_jax.errors import ConfigError
from vit_jax.tasks.captioning import Captioning
from vit_jax.tasks.classification import Classification
from vit_jax.tasks.contrastive import Similarity
from vit_jax.tasks.detection import Detection, masks_on
from vit_jax.tasks.masked import MaskedColours, MaskedPixels
from vit_jax.tasks.panoptic import Panoptic, merged
from vit_jax.tasks.segmentation import Segmentation, labels_on, name_of

Row = dict[str, Any]
Names = Sequence[str]
CORNERS = ("x", "y", "width", "height")


@dataclass(frozen=True)
class Kind:
    """What one kind of task says.

    Attributes:
      rows: (task, a row of its predictions, the picture's (H, W), names) -> rows, surest first.
      columns: of a CSV, besides the picture and the rank.
      places: whether it says where in the picture; then JSON has COCO's form, and the task can
        draw a picture of which nothing is known.
      shows: whether the task can draw such a picture although it says no places.
    """

    rows: Callable[[Any, Predictions, tuple[int, int], Names], list[Row]]
    columns: tuple[str, ...]
    places: bool = True
    shows: bool = False

    @property
    def draws(self) -> bool:
        """Whether the task can draw a picture of which nothing is known."""
        return self.places or self.shows


def _classes(task: Classification, prediction: Predictions, size: Any, names: Names) -> list[Row]:
    pairs = zip(prediction["top_labels"], prediction["top_probabilities"], strict=True)
    return [_row(label, names) | {"probability": float(p)} for label, p in pairs]


def _objects(
    task: Detection, prediction: Predictions, size: tuple[int, int], names: Names
) -> list[Row]:
    chosen = np.asarray(prediction["score"]) >= task.threshold
    label, score = (np.asarray(prediction[k])[chosen] for k in ("label", "score"))
    corners = geometry.to_pixels(np.asarray(prediction["boxes"], np.float64)[chosen], size)
    rows = [
        _row(k, names) | {"probability": float(p), "bbox": _bbox(box)}
        for k, p, box in zip(label, score, corners, strict=True)
    ]
    if "masks" in prediction:
        some = prediction | {"masks": np.asarray(prediction["masks"])[chosen]}
        for row, mask in zip(rows, masks_on(some, size), strict=True):
            row["segmentation"] = run_lengths(mask)
    return rows


def _segments(
    task: Panoptic, prediction: Predictions, size: tuple[int, int], names: Names
) -> list[Row]:
    found, rows = merged(prediction, size, task), []
    for i in np.argsort(-found.score, kind="stable"):
        mask = found.ids == i
        (box,) = boxes_of_masks(mask[None])
        row = _row(found.label[i], names) | {"probability": float(found.score[i])}
        rows.append(row | {"share": float(mask.mean()), "bbox": _bbox(box)})
        rows[-1]["segmentation"] = run_lengths(mask)
    return rows


def _areas(
    task: Segmentation, prediction: Predictions, size: tuple[int, int], names: Names
) -> list[Row]:
    labels = labels_on(prediction, size)
    values, counts = np.unique(labels, return_counts=True)
    rows = []
    for i in np.argsort(-counts, kind="stable"):
        row = _row(values[i], names) | {"share": float(counts[i] / labels.size)}
        rows.append(row | {"segmentation": run_lengths(labels == values[i])})
    return rows


def _restored(
    task: MaskedPixels | MaskedColours, prediction: Predictions, size: Any, names: Names
) -> list[Row]:
    share, loss = (float(np.mean(prediction[name])) for name in ("patch_mask", "loss"))
    return [{"share": share, "loss": loss, "name": f"hidden, restored with a loss of {loss:.4g}"}]


def _likeness(task: Similarity, prediction: Predictions, size: Any, names: Names) -> list[Row]:
    return [{"name": names[0], "similarity": float(prediction["similarity"])}]


def _sentence(task: Captioning, prediction: Predictions, size: Any, names: Names) -> list[Row]:
    probability = float(np.exp(prediction["log_prob"]))
    return [{"name": task.text(prediction["generated"]), "probability": probability}]


# A task comes before what it is a kind of.
KINDS: dict[type, Kind] = {
    Classification: Kind(_classes, ("label", "name", "probability"), places=False),
    Panoptic: Kind(_segments, ("label", "name", "probability", "share", *CORNERS)),
    Detection: Kind(_objects, ("label", "name", "probability", *CORNERS)),
    MaskedPixels: Kind(_restored, ("share", "loss")),
    MaskedColours: Kind(_restored, ("share", "loss")),
    Segmentation: Kind(_areas, ("label", "name", "share")),
    Captioning: Kind(_sentence, ("name", "probability"), places=False, shows=True),
    Similarity: Kind(_likeness, ("name", "similarity"), places=False),
}


def kind_of(task: Task) -> Kind:
    """What a task says: its own `found`, a `Kind`, where it has one.

    Raises:
      ConfigError: if nobody knows how to put it in rows.
    """
    own = getattr(task, "found", None)
    kind = own or next((kind for each, kind in KINDS.items() if isinstance(task, each)), None)
    if kind is None:
        raise ConfigError(f"{type(task).__name__} does not say what it finds: it has no `found`")
    return kind


def _row(label: int, names: Names) -> Row:
    return {"label": int(label), "name": name_of(names, int(label))}


def _bbox(corners: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = (float(n) for n in corners)
    return [round(n, 3) for n in (x0, y0, x1 - x0, y1 - y0)]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Bool [H, W] -> COCO's {"size", "counts"}, as JSON can hold it."""
    from pycocotools import mask as coding

    coded = coding.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in coded["size"]], "counts": coded["counts"].decode("ascii")}


def as_text(results: list[dict[str, Any]], form: str, kind: Kind) -> str:
    """Results of `vit_jax.predict` as a table for people, as JSON or as CSV.

    JSON is a list of the results as they are; where `kind` says places, COCO's list of results:
    one entry for each row, with `image_id` (the number that a file is called by, if all are called
    by different ones, as COCO's are; else its place in the list, from 1), `image`, `category_id`,
    `name`, `score`, `bbox` and `segmentation`.
    """
    good = [result for result in results if "predictions" in result]
    if form == "json":
        return json.dumps(_coco(results) if kind.places else results, indent=2) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["picture", "rank", *kind.columns])
        for result in good:
            for rank, row in enumerate(result["predictions"], 1):
                row = row | dict(zip(CORNERS, row.get("bbox", ())))
                cells = [row[name] for name in kind.columns]
                cells = [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells]
                writer.writerow([result["picture"], rank, *cells])
        return out.getvalue()
    lines = []
    for result in good:
        lines.append(result["picture"])
        lines += _table(result["predictions"]) or ["  nothing found"]
    return "".join(line + "\n" for line in lines)


def _table(rows: list[Row]) -> list[str]:
    """Aligned lines: probability, share and name, then the box."""
    names = [str(row.get("name", "")) for row in rows]
    width = max(map(len, names), default=0)
    lines = []
    for row, name in zip(rows, names, strict=True):
        line = f"  {row['probability']:7.2%}" if "probability" in row else ""
        line += f"  {row['share']:7.2%} of pixels" if "share" in row else ""
        line += f"  {name}"
        if "bbox" in row:
            x, y, w, h = (round(n) for n in row["bbox"])
            line += f"{'':{width - len(name)}}  {w} x {h} at ({x}, {y})"
        lines.append(line)
    return lines


def _coco(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    stems = [Path(result["picture"]).stem for result in results]
    numbers = {int(stem) for stem in stems if stem.isascii() and stem.isdigit()}
    named = len(numbers) == len(results)
    entries = []
    for place, (stem, result) in enumerate(zip(stems, results, strict=True), 1):
        image = {"image_id": int(stem) if named else place, "image": result["picture"]}
        for row in result.get("predictions", ()):
            renamed = {"label": "category_id", "probability": "score"}
            entries.append(image | {renamed.get(k, k): v for k, v in row.items()})
    return entries
