"""Geometry that moves a picture, its boxes and its masks together, and the padding of a batch.

A transform here only decides, from the picture's size and from chance, on a few moves: a resize, a
cut, a flip. `moved` carries them out on everything an example holds. So the size that comes out is
known without a pixel (`sized`), which is how every host finds the shape of a global batch.

Boxes are (x0, y0, x1, y1) in pixels, edges and not centres: a mask that covers the columns 3 and 4
has x0 = 3 and x1 = 5. What lies outside is clipped, and a box of which nothing is left is dropped
with its label, its mask and its crowd mark. Transforms of colour, such as
`data.transforms.ColorJitter`, leave all that alone and may stand between.
"""

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np

from vit_jax.contracts import Batch, Dataset, Example
from vit_jax.data import operations
from vit_jax.data.decode import ORIENTATION, READERS
from vit_jax.errors import ConfigError, DataError

IGNORED = 255  # of a segmentation
OBJECTS = ("boxes", "box_label", "crowd", "masks", "area")  # entries with a row for each object
DETR_SIZES = tuple(range(480, 801, 32))
Pixels = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Resized:
    """To that size."""

    size: Pixels


@dataclass(frozen=True)
class Cut:
    """The part of `size` whose upper left corner is (top, left), wholly inside the picture."""

    top: int
    left: int
    size: Pixels


@dataclass(frozen=True)
class Flipped:
    """Left and right swapped."""


Move = Resized | Cut | Flipped


def moved(example: Example, moves: Iterable[Move], interpolation: str = "bilinear") -> Example:
    """The example after the moves; labels of pixels are never mixed (nearest neighbour).

    `image` uint8 [H, W, 3]; `boxes` [m, 4], `box_label` [m], `crowd` [m], `masks` [m, H, W] and
    `segmentation` [H, W] where the example has them.
    """
    example = dict(example)
    for move in moves:
        H, W = example["image"].shape[:2]
        match move:
            case Resized((h, w)) if (h, w) != (H, W):
                example["image"] = operations.resize(example["image"], (h, w), interpolation)
                if "boxes" in example:
                    boxes = example["boxes"] * np.float32((w / W, h / H, w / W, h / H))
                    example["boxes"] = np.minimum(boxes, np.float32((w, h, w, h)))  # rounding
                for key in ("masks", "segmentation"):
                    if key in example:
                        example[key] = _nearest(example[key], (h, w))
            case Cut(top, left, (h, w)):
                window = (slice(top, top + h), slice(left, left + w))
                example["image"] = example["image"][window]
                if "segmentation" in example:
                    example["segmentation"] = example["segmentation"][window]
                if "masks" in example:
                    example["masks"] = example["masks"][:, *window]
                if "boxes" in example:
                    example["boxes"] = example["boxes"] - np.float32((left, top, left, top))
                    example = _clipped(example, (h, w))
            case Flipped():
                example["image"] = cv2.flip(example["image"], 1)
                for key in ("masks", "segmentation"):
                    if key in example:
                        example[key] = np.ascontiguousarray(example[key][..., ::-1])
                if "boxes" in example:
                    x0, y0, x1, y1 = example["boxes"].T
                    example["boxes"] = np.stack([W - x1, y0, W - x0, y1], 1).astype(np.float32)
    return example


def _nearest(labels: np.ndarray, size: Pixels) -> np.ndarray:
    """[..., H, W] -> [..., *size]: the label at each new pixel's centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(int)
        for new, old in zip(size, labels.shape[-2:], strict=True)
    )
    return labels.take(rows, -2).take(columns, -1)  # five times as fast as both at once


def _clipped(example: Example, size: Pixels) -> Example:
    """The example with its boxes inside the picture, and without the objects that are outside."""
    boxes = np.clip(example["boxes"], 0, np.float32((size[1], size[0], size[1], size[0])))
    left = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return example | {"boxes": boxes} | _kept(example | {"boxes": boxes}, left)


def _kept(example: Example, which: np.ndarray) -> Example:
    return {key: example[key][which] for key in OBJECTS if key in example}


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """Bool [m, H, W] -> the box around each, float32 [m, 4]; zeros where a mask is empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks):
        left, top, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
        box[:] = left, top, left + width, top + height
    return boxes


def picture_size(picture: np.ndarray | bytes) -> Pixels:
    """(H, W) of a picture or of a picture file, from its header, standing upright.

    Raises:
      DataError: if the bytes are no picture.
    """
    if not isinstance(picture, bytes):
        return picture.shape[:2]
    readers = (each for start, mark, each in READERS if picture.startswith(mark, start))
    reader = next(readers, None)
    if reader is None:
        raise DataError("no picture that can be read")
    try:
        with reader(io.BytesIO(picture)) as opened:
            (W, H), turned = opened.size, opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception as error:  # a reader of foreign bytes may raise anything
        raise DataError(f"damaged: {error}") from error
    return (W, H) if turned else (H, W)


def check_boxes(boxes: np.ndarray, size: Pixels, slack: float = 1.0) -> tuple[np.ndarray, ...]:
    """Boxes as an annotator left them -> (boxes inside the picture, which of them to keep).

    Published sets, COCO among them, have boxes without area and boxes that end a pixel outside:
    the former are not kept, nor are those that lie wholly outside, and the rest is clipped.

    Args:
      boxes: [m, 4] (x0, y0, x1, y1) in pixels.
      size: the picture's (H, W).
      slack: a box may be inverted by that many pixels and count as one without area.

    Returns:
      float32 [m, 4] and bool [m].

    Raises:
      DataError: at a box that is inverted or not finite, saying which one and its numbers.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    H, W = size
    for number, box in enumerate(boxes):
        shown = ", ".join(f"{side:g}" for side in box)
        if not np.isfinite(box).all():
            raise DataError(f"box {number} is not finite: (x0, y0, x1, y1) = ({shown})")
        if (box[2:] < box[:2] - slack).any():
            raise DataError(f"box {number} is inverted: (x0, y0, x1, y1) = ({shown})")
    inside = np.clip(boxes, 0, np.float32((W, H, W, H)))
    return inside, (inside[:, 2:] > inside[:, :2]).all(1)


def check_labels(example: Example, classes: int) -> None:
    """DataError if an object's or a pixel's class is none of 0 .. classes - 1.

    255 in `segmentation` is ignored. Looked at where the data is read, on the host: under jit no
    value can be, and a loss would only turn into no number.
    """
    for key, what in (("label", "it"), ("box_label", "an object"), ("segmentation", "a pixel")):
        if key not in example:
            continue
        labels = np.asarray(example[key])
        wrong = (labels < 0) | (labels >= classes)
        if key == "segmentation":
            wrong &= labels != IGNORED
        if wrong.any():
            note = ", or 255 to be ignored" if key == "segmentation" else ""
            raise DataError(
                f"{what} has the class id {labels[wrong].flat[0]}, and the data says that there "
                f"are {classes} classes: ids must be 0 to {classes - 1}{note}"
            )


class _Geometry:
    """What the transforms share: they only choose `moves`."""

    interpolation = "bilinear"

    def moves(
        self, size: Pixels, rng: np.random.Generator, example: Example | None
    ) -> Sequence[Move]:
        """What to do to a picture of that size; the size that results and the numbers drawn from
        `rng` do not depend on `example`, which is None where only the size is wanted.
        """
        raise NotImplementedError

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` uint8 [H, W, 3] with what lies on it -> the same entries, moved."""
        moves = self.moves(example["image"].shape[:2], rng, example)
        return moved(example, moves, self.interpolation)

    def sized(self, size: Pixels, rng: np.random.Generator) -> Pixels:
        """The size that `__call__` would return; draws the same numbers from `rng`."""
        for move in self.moves(size, rng, None):
            size = size if isinstance(move, Flipped) else move.size
        return size


def short_side(size: Pixels, short: int, longest: int | None) -> Pixels:
    """The size whose short side is `short`, or less, for the long side to be at most `longest`.

    Rounded as DETR's published code does, so that its pictures come out pixel for pixel.
    """
    H, W = size
    if longest is not None and max(size) / min(size) * short > longest:
        short = round(longest * min(size) / max(size))
    if min(size) == short:
        return size
    return (int(short * H / W), short) if W < H else (short, int(short * W / H))


@dataclass(frozen=True)
class Resize(_Geometry):
    """Resizes to (H, W), whatever the aspect ratio."""

    size: Pixels
    interpolation: str = "bilinear"

    def __post_init__(self):
        _check_sizes("size", self.size, 2)
        operations.interpolation(self.interpolation)

    def moves(self, size, rng, example):
        """One resize."""
        return [Resized(tuple(self.size))]


@dataclass(frozen=True)
class ResizeShortSide(_Geometry):
    """Resizes the short side to `sizes`, keeping the aspect ratio; the long one is capped.

    Carion et al. 2020 (arXiv:2005.12872), section 4: one of 480, 512 .. 800 in training, 800 in
    evaluation, the long side at most 1333.

    Attributes:
      sizes: one is drawn, each as likely.
      longest: of the long side; None is no limit.
      interpolation: as of `data.transforms.Resize`.
    """

    sizes: tuple[int, ...] = DETR_SIZES
    longest: int | None = 1333
    interpolation: str = "bilinear"

    def __post_init__(self):
        _check_sizes("sizes", self.sizes)
        _check_longest(self.longest)
        operations.interpolation(self.interpolation)

    def moves(self, size, rng, example):
        """One resize."""
        return [Resized(short_side(size, _one_of(self.sizes, rng), self.longest))]


@dataclass(frozen=True)
class ResizeOrCrop(_Geometry):
    """DETR's training geometry: a resize, or a resize, a random part and a resize of that.

    Carion et al. 2020 (arXiv:2005.12872), section 4 and the published code.

    Attributes:
      sizes: short sides of the result, as of `ResizeShortSide`.
      longest: of its long side.
      first: short sides before a part is cut out.
      part: each side of the part is drawn between these, and is at most the picture's.
      p: that a part is cut out at all.
      interpolation: as of `data.transforms.Resize`.
    """

    sizes: tuple[int, ...] = DETR_SIZES
    longest: int | None = 1333
    first: tuple[int, ...] = (400, 500, 600)
    part: Pixels = (384, 600)
    p: float = 0.5
    interpolation: str = "bilinear"

    def __post_init__(self):
        _check_sizes("sizes", self.sizes)
        _check_sizes("first", self.first)
        _check_sizes("part", self.part, 2)
        _check_longest(self.longest)
        _check_share("p", self.p)
        operations.interpolation(self.interpolation)

    def moves(self, size, rng, example):
        """One resize, or a resize, a cut and a resize."""
        moves = []
        if rng.random() < self.p:
            size = short_side(size, _one_of(self.first, rng), None)
            low, high = self.part
            h, w = (int(rng.integers(min(low, n), min(high, n) + 1)) for n in size)
            cut = _random_cut(size, (h, w), rng)
            moves, size = [Resized(size), cut], (h, w)
        return [*moves, Resized(short_side(size, _one_of(self.sizes, rng), self.longest))]


@dataclass(frozen=True)
class ScaleJitterCrop(_Geometry):
    """Resizes by a random factor and cuts out a random part: what segmenters are trained on.

    As mmsegmentation's RandomResize and RandomCrop. A picture that is smaller than `size` after
    the resize stays so: `Pad` fills it up, with 255 in the segmentation.

    Attributes:
      size: of the part (H, W).
      scale: of the factor, uniform.
      short: the short side at a factor of 1; None is the picture's own.
      longest: the long side at a factor of 1, at most.
      most: a part in which one class has a larger share of the counted pixels than this is drawn
        again, up to ten times; 1 takes the first.
      interpolation: as of `data.transforms.Resize`.
    """

    size: Pixels
    scale: tuple[float, float] = (0.5, 2.0)
    short: int | None = None
    longest: int | None = None
    most: float = 0.75
    interpolation: str = "bilinear"

    TRIES: ClassVar[int] = 10

    def __post_init__(self):
        _check_sizes("size", self.size, 2)
        _check_longest(self.short, "short")
        _check_longest(self.longest)
        _check_share("most", self.most)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={self.scale!r} must be (lowest, highest), both over 0")
        operations.interpolation(self.interpolation)

    def moves(self, size, rng, example):
        """A resize and a cut."""
        base = short_side(size, self.short or min(size), self.longest)
        factor = rng.uniform(*self.scale)
        resized = tuple(max(round(n * factor), 1) for n in base)
        part = tuple(min(n, m) for n, m in zip(self.size, resized))
        # How often the part is drawn depends on the labels, but not how much is drawn from `rng`.
        own = np.random.default_rng(rng.integers(2**63))
        labels = None
        if example is not None and self.most < 1 and "segmentation" in example:
            labels = _nearest(example["segmentation"], resized)
        for _ in range(self.TRIES):
            cut = _random_cut(resized, part, own)
            if labels is None or self._varied(labels, cut):
                break
        return [Resized(resized), cut]

    def _varied(self, labels: np.ndarray, cut: Cut) -> bool:
        (top, left), (h, w) = (cut.top, cut.left), cut.size
        counts = np.bincount(labels[top : top + h, left : left + w].ravel(), minlength=256)
        counts = counts[:IGNORED]
        return counts.max() < self.most * counts.sum()


@dataclass(frozen=True)
class RandomFlip(_Geometry):
    """Swaps left and right with probability `p`."""

    p: float = 0.5

    def __post_init__(self):
        _check_share("p", self.p)

    def moves(self, size, rng, example):
        """A flip, or nothing."""
        return [Flipped()] if rng.random() < self.p else []


@dataclass(frozen=True)
class Pad:
    """The last step: rows of different sizes become a batch of one of a few fixed shapes.

    The pipeline gives a batch the smallest of `shapes` that holds all its rows, over all hosts.
    Pictures lie in the upper left corner; the rest is zeros, `image_mask` is False there and
    `segmentation` 255. Entries that have no place in a batch, such as captions, are left out,
    and so are crowds and boxes without area inside the picture: they are nothing to learn from.

    Attributes:
      shapes: (H, W) of the batches.
      boxes: M, the most a picture may have; 0 leaves boxes and masks out of the batch, and -1 is
        as many as the fullest picture of the dataset has, which `fitted` looks up.
      masks: whether `masks` [B, M, H, W] go into the batch.
      segmentation: whether `segmentation` does, where the data has it.
    """

    shapes: tuple[Pixels, ...]
    boxes: int = 0
    masks: bool = False
    segmentation: bool = True

    def __post_init__(self):
        if not self.shapes or isinstance(self.shapes[0], int):
            raise ValueError(f"shapes={self.shapes!r} must be pairs, such as ((480, 640),)")
        for shape in self.shapes:
            _check_sizes("shapes", shape, 2)
        whole = tuple(max(shape[axis] for shape in self.shapes) for axis in (0, 1))
        if whole not in [tuple(shape) for shape in self.shapes]:
            raise ValueError(
                f"shapes={self.shapes!r} must hold {whole} too: a batch may have pictures of the "
                "greatest height and others of the greatest width"
            )
        if self.boxes < -1 or (self.masks and not self.boxes):
            raise ValueError(f"boxes={self.boxes!r} must be -1 or more, and not 0 with masks")

    def fitted(self, dataset: Dataset) -> "Pad":
        """With room for the objects of a dataset that knows its `fullest` picture.

        Raises:
          ConfigError: if a picture has more than `boxes`, or that is -1 and nobody knows.
        """
        if not self.boxes or not hasattr(dataset, "fullest"):
            if self.boxes < 0:
                raise ConfigError(
                    f"Pad's boxes={self.boxes} takes the number from the dataset, and this one "
                    "does not know it: say how many boxes a picture may have"
                )
            return self
        index, count = dataset.fullest()
        if self.boxes < 0:
            return dataclasses.replace(self, boxes=max(count, 1))
        if count > self.boxes:
            raise ConfigError(_too_many(dataset.name(index), count, self.boxes))
        return self

    def shape(self, sizes: Iterable[Pixels]) -> Pixels:
        """The shape of least area that holds all sizes; ConfigError if none does."""
        sizes = list(sizes)
        need = tuple(max((size[axis] for size in sizes), default=1) for axis in (0, 1))
        self.check(need, "the batch")
        fitting = [s for s in self.shapes if s[0] >= need[0] and s[1] >= need[1]]
        return tuple(min(fitting, key=math.prod))

    def check(self, size: Pixels, name: str) -> None:
        """ConfigError if no shape holds a picture of that size, called `name`."""
        if not any(s[0] >= size[0] and s[1] >= size[1] for s in self.shapes):
            raise ConfigError(
                f"{name} is {size[0]} x {size[1]} pixels (height x width) after the transforms, "
                f"and fits none of Pad's shapes {_shown(self.shapes)}: add one, or resize to less"
            )

    def empty(self, rows: int, shape: Pixels, like: Example) -> Batch:
        """A batch of rows that hold nothing, with the entries for which `like` has something."""
        batch: Batch = {
            "image": np.zeros((rows, *shape, 3), np.float32),
            "image_mask": np.zeros((rows, *shape), bool),
        }
        if "label" in like:
            batch["label"] = np.zeros(rows, np.int32)
        if "tokens" in like:
            batch["tokens"] = np.zeros((rows, *np.shape(like["tokens"])), np.int32)
        if self.boxes and "boxes" in like:
            batch["boxes"] = np.zeros((rows, self.boxes, 4), np.float32)
            batch["box_label"] = np.full((rows, self.boxes), -1, np.int32)
        if self.masks and "masks" in like:
            batch["masks"] = np.zeros((rows, self.boxes, *shape), bool)
        if self.segmentation and "segmentation" in like:
            batch["segmentation"] = np.full((rows, *shape), IGNORED, np.int32)
        return batch

    def put(self, batch: Batch, row: int, example: Example, name: str) -> None:
        """Writes an example into a row of an empty batch.

        Raises:
          ConfigError: if the picture is not standardised, is larger than the batch, or has more
            than M boxes; it starts with `name`.
        """
        image = example["image"]
        H, W = image.shape[:2]
        if image.dtype != np.float32:
            raise ConfigError("Pad must come after Standardize: zeros are the padding")
        self.check((H, W), name)
        batch["image"][row, :H, :W] = image
        batch["image_mask"][row, :H, :W] = True
        for key in ("label", "tokens"):
            if key in batch:
                batch[key][row] = example[key]
        if "segmentation" in batch:
            _check_drawn(example["segmentation"], (H, W), "segmentation", name)
            batch["segmentation"][row, :H, :W] = example["segmentation"]
        if "boxes" in batch:
            boxes = np.asarray(example["boxes"], np.float32).reshape(-1, 4)
            boxes = np.clip(boxes, 0, np.float32((W, H, W, H)))
            kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
            if "crowd" in example:
                kept &= ~np.asarray(example["crowd"], bool)
            count = int(kept.sum())
            if count > self.boxes:
                raise ConfigError(_too_many(name, count, self.boxes))
            x0, y0, x1, y1 = boxes[kept].T
            batch["boxes"][row, :count] = np.stack(
                [(x0 + x1) / (2 * W), (y0 + y1) / (2 * H), (x1 - x0) / W, (y1 - y0) / H], 1
            )
            batch["box_label"][row, :count] = np.asarray(example["box_label"])[kept]
            if "masks" in batch:
                _check_drawn(example["masks"], (H, W), "masks", name)
                batch["masks"][row, :count, :H, :W] = example["masks"][kept]

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """One example -> its row, in the smallest shape that holds it."""
        batch = self.empty(1, self.shape([example["image"].shape[:2]]), example)
        self.put(batch, 0, example, "the picture")
        return {key: value[0] for key, value in batch.items()}


def _too_many(name: str, count: int, most: int) -> str:
    return (
        f"{name} has {count} boxes, and Pad's boxes={most} is the most a picture may have: set it "
        f"to {count} or more"
    )


def fullest(counts: Iterable[int]) -> tuple[int, int]:
    """Which of a dataset's pictures has most objects to learn, and how many: its `fullest`."""
    return max(enumerate(counts), key=lambda pair: pair[1], default=(0, 0))


def _check_drawn(labels: np.ndarray, size: Pixels, what: str, name: str) -> None:
    if len(labels) and labels.shape[-2:] != size:
        raise ConfigError(
            f"{what} of {name} has {labels.shape[-2]} x {labels.shape[-1]} pixels after the "
            f"transforms, and the picture {size[0]} x {size[1]}: every step that moves the "
            "picture must be of data.geometry"
        )


def _shown(shapes: Sequence[Pixels]) -> str:
    return ", ".join(f"{height} x {width}" for height, width in shapes)


def _one_of(values: Sequence[int], rng: np.random.Generator) -> int:
    return values[int(rng.integers(len(values)))]


def _random_cut(size: Pixels, part: Pixels, rng: np.random.Generator) -> Cut:
    top, left = (int(rng.integers(n - m + 1)) for n, m in zip(size, part))
    return Cut(top, left, tuple(part))


def _check_sizes(name: str, sizes: Sequence[int], count: int | None = None) -> None:
    right = not isinstance(sizes, int) and len(sizes) > 0 and (count or len(sizes)) == len(sizes)
    if not right or not all(isinstance(n, int) and n > 0 for n in sizes):
        wanted = "pixels: (two, numbers)" if count else "numbers of pixels: (800,)"
        raise ValueError(f"{name}={sizes!r} must be {wanted}")


def _check_longest(value: int | None, name: str = "longest") -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r} must be a number of pixels or None")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie between 0 and 1")
