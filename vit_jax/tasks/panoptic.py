"""Panoptic segmentation: every pixel belongs to one segment, and each segment has a class."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from vit_jax.contracts import Example, Predictions, Sums
from vit_jax.errors import ConfigError, DataError
from vit_jax.tasks.detection import Detection, crowds, logits_on
from vit_jax.tasks.segmentation import Canvas, name_of, picture_size, resize_labels

VOID = -1  # a pixel of no segment


@dataclass(frozen=True)
class Segments:
    """A picture cut up.

    Attributes:
      ids: int [H, W], the segment of each pixel, from 0; -1 where there is none.
      label: int [n], each segment's class.
      score: float [n], its probability; 1 for what is true.
      crowd: bool [n], whether it is many objects that nobody told apart.
    """

    ids: np.ndarray
    label: np.ndarray
    score: np.ndarray
    crowd: np.ndarray

    @property
    def areas(self) -> np.ndarray:
        """Pixels of each segment, int [n]."""
        return np.bincount(self.ids[self.ids >= 0], minlength=len(self.label))


@dataclass(frozen=True)
class Panoptic(Detection):
    """As `Detection`, for models that give masks; measured by panoptic quality.

    Attributes:
      As of `Detection`, and
      threshold: probability from which a query becomes a segment: 0.85, as in DETR's published
        code.
      least_area: segments of that many pixels or fewer are left out.
      stuff: classes of which a picture has one segment at most, such as grass.
    """

    threshold: float = 0.85
    least_area: int = 4
    stuff: tuple[int, ...] = ()
    headline = "pq"

    def __post_init__(self):
        super().__post_init__()
        if self.least_area < 0:
            raise ConfigError(f"least_area={self.least_area} must be 0 or more")

    def summarize(
        self, sums: Sums, results: Iterable[tuple[Predictions, Example]] | None = None
    ) -> dict:
        """Losses as of `Detection`; with `results` {"pq", "sq", "rq"}, of all classes, then of
        things ("pq_things") and stuff ("pq_stuff") where the split has both.

        Args:
          sums: of `score`, added up.
          results: (prediction of a row, the dataset's own example), read once, one after the other.

        Raises:
          DataError: if no row was valid, or there is no segment, neither true nor found.
        """
        numbers = super().summarize(sums)
        if results is None:
            return numbers
        quality = Quality()
        for prediction, example in results:
            found = merged(prediction, picture_size(example), self)
            quality.add(found, true_segments(example, self.stuff))
        return numbers | quality.numbers(self.stuff)

    def draw(
        self, image: np.ndarray, example: Example, prediction: Predictions, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str, bool]:
        """A picture under its segments' colours -> (picture, "3 of 4 found, 1 wrong", False).

        Things carry their name and probability, stuff is named in the legend below. Right means
        that every true segment is found, and that there is no other.
        """
        size = image.shape[:2]
        found = merged(prediction, size, self)
        canvas = Canvas(image)
        colours, legend = {}, {}
        for i, label in enumerate(found.label.tolist()):
            colours[i] = canvas.colour(label)
            if label in self.stuff:
                legend[name_of(names, label)] = colours[i]
        canvas.regions(found.ids, colours)
        for i in np.argsort(found.score):
            label = int(found.label[i])
            if label not in self.stuff:
                rows, columns = np.nonzero(found.ids == i)
                # At its middle: its first pixels may be those of a far corner.
                at = np.median(columns), np.median(rows)
                text = f"{name_of(names, label)} {100 * found.score[i]:.0f}%"
                canvas.tag(at, colours[i], text)
        picture = canvas.drawn(list(legend.items()))
        title = f"{len(found.label)} found"
        if "masks" not in example:
            return picture, title, True
        quality = Quality()
        quality.add(found, true_segments(example, self.stuff))
        hit = sum(each.hits for each in quality.classes.values())
        missed = sum(each.missed for each in quality.classes.values())
        wrong = sum(each.wrong for each in quality.classes.values())
        title = f"{hit} of {hit + missed} found" + (f", {wrong} wrong" if wrong else "")
        return picture, title, not (missed or wrong)


def merged(prediction: Predictions, size: tuple[int, int], task: Panoptic) -> Segments:
    """A row's masks -> segments of the picture, [H, W] its own size.

    Carion et al. 2020 (arXiv:2005.12872), section 4.4: queries over the threshold take each pixel
    by the largest mask logit; those of one class of stuff become one segment; segments of
    `least_area` pixels or fewer, all at once, leave theirs to the others, until none is small. The
    authors' code drops all but the first query of a class of stuff once it looks for small
    segments, and gives their pixels to whatever comes second; here they stay together.
    """
    score, label = np.asarray(prediction["score"]), np.asarray(prediction["label"])
    queries = np.flatnonzero(score > task.threshold)
    logits = [x for i, x in enumerate(logits_on(prediction)) if score[i] > task.threshold]
    # The segment of each query, named by the first query of it: the surest, by their order.
    first = {k: int(np.flatnonzero(label[queries] == k)[0]) for k in set(label[queries].tolist())}
    group = np.array(
        [first[k] if k in task.stuff else i for i, k in enumerate(label[queries].tolist())], int
    )
    left = np.ones(len(queries), bool)
    ids = np.full(size, VOID)
    while left.any():
        chosen = np.flatnonzero(left)
        best = np.argmax([logits[i] for i in chosen], axis=0)  # [h, w]
        ids = resize_labels(group[chosen][best], size)
        areas = np.bincount(ids.ravel(), minlength=len(queries))
        small = left & (areas[group] <= task.least_area)
        if not small.any():
            break
        left &= ~small
        ids = np.full(size, VOID)
    members = np.unique(ids[ids >= 0])
    ids = np.where(ids >= 0, np.searchsorted(members, ids), VOID)
    kept = queries[members]
    return Segments(ids, label[kept], score[kept], np.zeros(len(kept), bool))


def true_segments(example: Example, stuff: tuple[int, ...] = ()) -> Segments:
    """An example's `masks` [m, H, W] -> segments; where masks overlap, the smaller one is on top.

    Masks of one class of stuff become one segment. Pixels of no mask are void.
    """
    masks = np.asarray(example["masks"], bool)
    labels, crowd = np.asarray(example["box_label"]), crowds(example)
    ids = np.full(picture_size(example), VOID)
    if masks.shape[1:] != ids.shape:
        raise DataError(f"masks of {masks.shape[1:]} on a picture of {ids.shape} (height, width)")
    first: dict[int, int] = {}
    for i in np.argsort(-masks.sum((1, 2)), kind="stable"):
        label = int(labels[i])
        together = label in stuff and not crowd[i]
        ids[masks[i]] = first.setdefault(label, i) if together else i
    members = np.unique(ids[ids >= 0])
    ids = np.where(ids >= 0, np.searchsorted(members, ids), VOID)
    return Segments(ids, labels[members], np.ones(len(members)), crowd[members])


@dataclass
class _Class:
    """One class's share: `overlap` is the IoUs of its hits, added up."""

    overlap: float = 0.0
    hits: int = 0
    wrong: int = 0
    missed: int = 0


@dataclass
class Quality:
    """Panoptic quality: Kirillov et al. 2019 (arXiv:1801.00868), section 4.

    A true segment is found if one of its class covers it with an IoU over 0.5, and then it is by
    one only. Void pixels of the truth count in no union; a segment that lies by more than half in
    void and crowds of its class is no mistake, and nobody needs to find a crowd.

    Attributes:
      classes: what was counted so far, by class.
    """

    classes: dict[int, _Class] = field(default_factory=dict)

    def add(self, found: Segments, true: Segments) -> None:
        """Counts one picture; both have the same size."""
        n, m = len(found.label), len(true.label)
        # Row n and column m are the void.
        pair = np.where(found.ids >= 0, found.ids, n) * (m + 1)
        pair = pair + np.where(true.ids >= 0, true.ids, m)
        shared = np.bincount(pair.ravel(), minlength=(n + 1) * (m + 1)).reshape(n + 1, m + 1)
        shared, void = shared[:n, :m], shared[:n, m]
        areas, true_areas = found.areas, true.areas
        union = areas[:, None] + true_areas - shared - void[:, None]
        match = (found.label[:, None] == true.label) & ~true.crowd & (2 * shared > union)
        for i, j in np.argwhere(match):
            each = self._of(true.label[j])
            each.hits += 1
            each.overlap += shared[i, j] / union[i, j]
        for j in np.flatnonzero(~match.any(0) & ~true.crowd):
            self._of(true.label[j]).missed += 1
        of_crowd = (found.label[:, None] == true.label) & true.crowd
        outside = void + np.where(of_crowd, shared, 0).sum(1)
        for i in np.flatnonzero(~match.any(1) & (2 * outside <= areas)):
            self._of(found.label[i]).wrong += 1

    def _of(self, label: int) -> _Class:
        return self.classes.setdefault(int(label), _Class())

    def numbers(self, stuff: tuple[int, ...] = ()) -> dict[str, float]:
        """{"pq", "sq", "rq"}, each a mean over the classes that were true or found anywhere.

        Where there are both, also of things and of stuff alone: "pq_things", "pq_stuff" and so on.

        Raises:
          DataError: if there was no segment at all.
        """
        if not self.classes:
            raise DataError("there is no segment to measure: no picture has a mask")
        parts = {"": list(self.classes)}
        parts["_things"] = [k for k in self.classes if k not in stuff]
        parts["_stuff"] = [k for k in self.classes if k in stuff]
        if not (parts["_things"] and parts["_stuff"]):
            parts = {"": parts[""]}
        return {
            name + part: value
            for part, labels in parts.items()
            for name, value in zip(("pq", "sq", "rq"), self._means(labels), strict=True)
        }

    def _means(self, labels: list[int]) -> tuple[float, ...]:
        rows = []
        for each in (self.classes[k] for k in labels):
            whole = each.hits + (each.wrong + each.missed) / 2
            segmentation = each.overlap / each.hits if each.hits else 0.0
            rows.append((each.overlap / whole, segmentation, each.hits / whole))
        return tuple(np.mean(rows, 0).tolist())
