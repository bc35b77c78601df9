"""Segmentation: a class for each pixel; and how pictures are coloured with what was found."""

import io
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vit_jax.contracts import Array, Batch, Example, Outputs, Predictions, Sums
from vit_jax.errors import ConfigError, DataError

IGNORED = 255  # of a segmentation
ORIENTATION, TURNED = 274, (5, 6, 7, 8)  # EXIF: height and width are swapped
# Far apart for the eye, those first that the colour-blind tell apart too: Okabe and Ito's, then
# others between them.
COLOURS = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178)),
    *((213, 94, 0), (204, 121, 167), (128, 222, 90), (145, 70, 200), (120, 80, 40)),
    *((20, 20, 130), (0, 206, 200), (170, 20, 60), (130, 130, 0), (150, 150, 235)),
    *((255, 205, 150), (30, 70, 60), (230, 60, 230), (150, 150, 150), (255, 150, 190)),
)
GOLDEN = 0.61803398875  # steps of the hue that never come near each other


@dataclass(frozen=True)
class Segmentation:
    """Learns the class of each pixel: the mean cross-entropy over the pixels that are not ignored.

    Reads logits [B, H, W, K], or {"logits", "auxiliary": [logits, ...]} from a model that is being
    trained; Zhao et al. 2017 (arXiv:1612.01105), section 3.3, have the loss on earlier maps.

    Attributes:
      auxiliary_weight: of each auxiliary head's loss: 0.4, as there.
      class_weights: what a pixel of each class weighs in the mean, so that classes of few pixels
        are learned too; all the same if there are none.
    """

    auxiliary_weight: float = 0.4
    class_weights: tuple[float, ...] = ()
    headline = "miou"
    wants_results = True
    cell = 360

    def __post_init__(self):
        if not 0 <= self.auxiliary_weight < math.inf:
            raise ConfigError(f"auxiliary_weight={self.auxiliary_weight} must be 0 or more")
        if not all(0 <= weight < math.inf for weight in self.class_weights):
            raise ConfigError(f"class_weights={self.class_weights} must be 0 or more")

    def score(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, Sums]:
        """The mean loss over the pixels that count, and sums.

        A pixel counts where its `segmentation` [B, H, W] is not 255 and its row is valid; the rest
        has a gradient of exactly zero. A class beyond the head makes the loss NaN, so that none
        passes unseen.

        Returns:
          The loss and {"loss", "count", the pixels or their weights, "confusion" [K, K], the pixels
          of each true class (rows) that were taken for each class (columns)}, float32.

        Raises:
          ConfigError: if there are weights for another number of classes.
        """
        logits, auxiliary = _parts(outputs)
        labels = jnp.asarray(batch["segmentation"])
        counted = labels != IGNORED
        if "valid" in batch:
            counted &= jnp.asarray(batch["valid"])[:, None, None]
        classes = logits.shape[-1]
        known = (labels >= 0) & (labels < classes)
        at = jnp.where(known, labels, 0)[..., None]
        weights = jnp.ones_like(counted, jnp.float32)
        if self.class_weights:
            if len(self.class_weights) != classes:
                given = len(self.class_weights)
                raise ConfigError(f"class_weights has {given} numbers for {classes} classes")
            weights = jnp.asarray(self.class_weights, jnp.float32)[at[..., 0]]

        def total(logits: jax.Array) -> jax.Array:
            # Masked before the logarithm as well as after: a gradient of 0 times infinity is NaN.
            logits = jnp.where(counted[..., None], logits.astype(jnp.float32), 0.0)
            losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), at, -1)[..., 0] * weights
            return jnp.where(counted, jnp.where(known, losses, jnp.nan), 0.0).sum()

        loss = total(logits) + self.auxiliary_weight * sum(total(x) for x in auxiliary)
        count = jnp.where(counted, weights, 0.0).sum()
        pair = at[..., 0] * classes + logits.argmax(-1)
        pair = jnp.where(counted & known, pair, classes**2)  # beyond the last: dropped
        confusion = jnp.bincount(pair.ravel(), length=classes**2 + 1)[:-1]
        confusion = confusion.reshape(classes, classes).astype(jnp.float32)
        sums = {"loss": loss, "count": count, "confusion": confusion}
        return loss / jnp.where(count > 0, count, 1.0), sums

    def predict(self, outputs: Outputs, batch: Batch) -> Predictions:
        """The likeliest class of each pixel, at the model's resolution.

        Returns:
          {"segmentation" [B, H, W], uint8 where K allows it; "padded" and "size" [B, 2] int32,
          (H, W) of the image with and without its padding}.
        """
        logits, _ = _parts(outputs)
        dtype = jnp.uint8 if logits.shape[-1] <= IGNORED else jnp.int32
        # Gives the sizes also where the batch has neither image nor mask.
        image = {"image": logits} | batch
        return {"segmentation": logits.argmax(-1).astype(dtype)} | real_sizes(image)

    def summarize(
        self, sums: Sums, results: Iterable[tuple[Predictions, Example]] | None = None
    ) -> dict:
        """Sums of a split -> {"loss", "miou", "pixel_accuracy", "iou_0", "iou_1", ...}.

        The IoUs are those of the whole split: of a class that neither occurs nor was seen there is
        none, and the mean is over the others. With `results` they are taken on the pictures' own
        pixels, to which each prediction is brought by nearest neighbours; else on the batches'.

        Args:
          sums: of `score`, added up.
          results: (prediction of a row, the dataset's own example), read once, one after the other.

        Raises:
          DataError: if no pixel counted.
        """
        count = float(sums["count"])
        if not count:
            raise DataError("there was no pixel to measure: no picture, or all is ignored")
        confusion = np.asarray(sums["confusion"], np.float64)
        if results is not None:
            confusion = np.zeros_like(confusion)
            for prediction, example in results:
                found = labels_on(prediction, example["segmentation"].shape)
                confusion += confusion_of(found, example["segmentation"], len(confusion))
        right = np.diag(confusion)
        union = confusion.sum(0) + confusion.sum(1) - right
        seen = np.flatnonzero(union)
        iou = right[seen] / union[seen]
        return {
            "loss": float(sums["loss"]) / count,
            "miou": float(iou.mean()),
            "pixel_accuracy": float(right.sum() / confusion.sum()),
            **{f"iou_{k}": float(value) for k, value in zip(seen, iou)},
        }

    def draw(
        self, image: np.ndarray, example: Example, prediction: Predictions, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str, bool]:
        """A picture under its classes' colours -> (picture with a legend, "93 % of pixels", True).

        Right means that at least nine in ten of the pixels that count are. A small picture comes
        back enlarged, so that the names can be read.
        """
        found = labels_on(prediction, image.shape[:2])
        picture, legend = _coloured(image, found, names)
        if "segmentation" not in example:
            return picture, legend[0], True
        truth = np.asarray(example["segmentation"])
        counted = truth != IGNORED
        accuracy = (found == truth)[counted].mean() if counted.any() else 1.0
        # Rounded down: no picture with a wrong pixel shall read 100 %.
        return picture, f"{math.floor(100 * accuracy)} % of pixels", bool(accuracy >= 0.9)

    def draw_target(
        self, image: np.ndarray, row: Batch, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str]:
        """A batch's picture and row -> (picture under its classes' colours, "12 % ignored")."""
        labels = np.asarray(row["segmentation"])
        picture, _ = _coloured(image, labels, names)
        ignored = math.ceil(100 * (labels == IGNORED).mean())
        return picture, f"{ignored} % ignored" if ignored else ""


def _coloured(
    image: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """A picture under the colours of its pixels' classes [H, W], and their names, most first."""
    canvas = Canvas(image)
    values, counts = np.unique(labels[labels != IGNORED], return_counts=True)
    values = values[np.argsort(-counts, kind="stable")].tolist()
    canvas.regions(np.where(labels == IGNORED, -1, labels), {k: canvas.colour(k) for k in values})
    found = [name_of(names, k) for k in values]
    return canvas.drawn(list(zip(found, map(canvas.colour, values)))), found


def _parts(outputs: Outputs) -> tuple[Array, Sequence[Array]]:
    if isinstance(outputs, dict):
        return outputs["logits"], outputs.get("auxiliary", ())
    return outputs, ()


def confusion_of(found: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Classes [H, W] found and true -> [K, K], rows true; ignored pixels count nothing."""
    counted = truth != IGNORED
    pair = truth[counted].astype(np.int64) * classes + found[counted]
    return np.bincount(pair, minlength=classes**2).reshape(classes, classes)


def labels_on(prediction: Predictions, size: tuple[int, int]) -> np.ndarray:
    """A row's `segmentation` [H, W], cut to the real part, at the size of its picture."""
    h, w = (int(n) for n in prediction["size"])
    return resize_labels(np.asarray(prediction["segmentation"])[:h, :w], size)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] -> [H, W]: the label at the middle of each new pixel."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(int)
        for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def real_sizes(batch: Batch) -> dict[str, jax.Array]:
    """{"padded": (H, W) of a batch's images, "size": the same without padding}, int32 [B, 2]."""
    image = batch["image_mask"] if "image_mask" in batch else batch["image"]
    rows, H, W = image.shape[:3]
    padded = jnp.broadcast_to(jnp.array([[H, W]], jnp.int32), (rows, 2))
    if "image_mask" not in batch:
        return {"padded": padded, "size": padded}
    mask = jnp.asarray(batch["image_mask"])
    size = jnp.stack([mask.any(2).sum(1), mask.any(1).sum(1)], 1)
    # A row that is no picture has no size; one pixel lets it be drawn like the others.
    return {"padded": padded, "size": jnp.maximum(size, 1).astype(jnp.int32)}


def picture_size(example: Example) -> tuple[int, int]:
    """(H, W) of an example's picture, standing upright; of a file from its header alone."""
    image = example["image"]
    if not isinstance(image, bytes):
        return image.shape[:2]
    with Image.open(io.BytesIO(image)) as opened:
        W, H = opened.size
        return (W, H) if opened.getexif().get(ORIENTATION, 1) in TURNED else (H, W)


def name_of(names: Sequence[str], label: int) -> str:
    """A class's name, or its number where there is none."""
    return names[label] if 0 <= label < len(names) else f"class {label}"


class Canvas:
    """A picture to draw on, enlarged by a whole factor where it is too small for letters.

    Attributes:
      picture: uint8 [H, W, 3], as it is so far.
      factor: its pixels for each of the original's.
    """

    SIDE = 400  # pixels that the longer side should have
    FONT = cv2.FONT_HERSHEY_SIMPLEX

    def __init__(self, image: np.ndarray):
        self.factor = math.ceil(self.SIDE / max(image.shape[:2]))
        self.picture = self._enlarged(image).copy()
        # Of letters and lines: the same on the page however large the picture is.
        self.unit = max(self.picture.shape[:2]) / 640
        self.thickness = max(round(2 * self.unit), 1)
        self.tags: list[tuple[tuple[int, int, int, int], tuple, str]] = []

    def _enlarged(self, image: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(image, self.factor, 0), self.factor, 1)

    @staticmethod
    def colour(label: int) -> tuple[int, int, int]:
        """The fixed colour of a class, (red, green, blue)."""
        if label < len(COLOURS):
            return COLOURS[label]
        hue = int(180 * (label * GOLDEN % 1))
        hsv = np.uint8([[[hue, (230, 150)[label % 2], (235, 170, 110)[label % 3]]]])
        return tuple(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].tolist())

    def regions(self, ids: np.ndarray, colours: dict[int, tuple]) -> None:
        """Tints the pixels [H, W] of each id in its colour, stronger at their rim.

        Ids of -1 and over; those without a colour are left as they are.
        """
        ids = ids.astype(np.int32) + 1
        table = np.zeros((max(int(ids.max()), max(colours, default=0) + 1) + 1, 4), np.float32)
        for k, colour in colours.items():
            table[k + 1] = *colour, 1
        ids = self._enlarged(ids).astype(np.float32)  # what OpenCV takes
        square = np.ones((2 * self.thickness + 1,) * 2, np.uint8)
        rim = cv2.dilate(ids, square) != cv2.erode(ids, square)
        chosen = table[ids.astype(np.int32)]  # [H, W, 4]
        share = np.where(rim, np.float32(0.85), np.float32(0.6))[..., None]
        # Over grey, so that the colour says the class and not what colour the thing has.
        grey = cv2.cvtColor(self.picture, cv2.COLOR_RGB2GRAY)[..., None]
        tinted = ((1 - share) * grey + share * chosen[..., :3]).round().astype(np.uint8)
        self.picture = np.where(chosen[..., 3:] > 0, tinted, self.picture)

    def box(self, box: np.ndarray, colour: tuple, text: str = "") -> None:
        """Draws (x0, y0, x1, y1), in the original's pixels; its text is written over all boxes."""
        H, W = self.picture.shape[:2]
        top = np.array([W, H, W, H]) - 1
        corners = np.clip(np.nan_to_num(box) * self.factor, 0, top).round().astype(int).tolist()
        x0, y0, x1, y1 = corners
        # Dark around the colour: seen on any ground.
        cv2.rectangle(self.picture, (x0, y0), (x1, y1), (0, 0, 0), self.thickness + 2)
        cv2.rectangle(self.picture, (x0, y0), (x1, y1), colour, self.thickness)
        if text:
            self.tags.append((tuple(corners), colour, text))

    def tag(self, at: tuple[float, float], colour: tuple, text: str) -> None:
        """Writes over (x, y), in the original's pixels, with its middle there."""
        _, _, width, height, depth = self._measure(text)
        x, y = (round(n * self.factor) for n in at)
        y += height + depth
        self.tags.append(((x - width // 2, y, x, y), colour, text))

    def drawn(self, legend: Sequence[tuple[str, tuple]] = ()) -> np.ndarray:
        """The finished picture, with the tags, and a legend of (name, colour) below it."""
        for corners, colour, text in self.tags:
            self._write(corners, colour, text)
        self.tags = []
        return np.concatenate([self.picture, self._legend(legend)]) if legend else self.picture

    def _measure(self, text: str) -> tuple[str, float, int, int, int]:
        """What is written, its scale, and its width, height and depth below the line."""
        # OpenCV's letters are those of ASCII.
        text = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in text if not unicodedata.combining(c))
        text = text.encode("ascii", "replace").decode()
        scale = max(0.6 * self.unit, 0.42)
        (width, height), depth = cv2.getTextSize(text, self.FONT, scale, self._pen)
        return text, scale, width, height, depth

    @property
    def _pen(self) -> int:
        return max(round(1.3 * self.unit), 1)

    def _write(self, corners: Sequence[int], colour: tuple, text: str) -> None:
        text, scale, width, height, depth = self._measure(text)
        H, W = self.picture.shape[:2]
        pad = max(round(3 * self.unit), 2)
        tall, wide = height + depth + pad, width + 2 * pad
        x0, y0 = corners[:2]
        # Above the box; inside it at the picture's upper edge.
        top = y0 - tall if y0 >= tall else y0
        left, top = max(min(x0, W - wide), 0), max(min(top, H - tall), 0)
        cv2.rectangle(self.picture, (left, top), (left + wide, top + tall), colour, -1)
        self._put(self.picture, text, (left + pad, top + height + pad // 2 + 1), scale, colour)

    def _put(self, picture: np.ndarray, text: str, at: tuple, scale: float, ground: tuple) -> None:
        light = np.dot(ground, (0.299, 0.587, 0.114)) > 140
        ink = (0, 0, 0) if light else (255, 255, 255)
        cv2.putText(picture, text, at, self.FONT, scale, ink, self._pen, cv2.LINE_AA)

    def _legend(self, entries: Sequence[tuple[str, tuple]]) -> np.ndarray:
        """White, as wide as the picture: a coloured square before each name, in even columns."""
        measured = [self._measure(name) for name, _ in entries]
        line = round(1.7 * max(height + depth for *_, height, depth in measured))
        W, gap = self.picture.shape[1], line // 2
        column = max(width for _, _, width, _, _ in measured) + line + 2 * gap
        columns = max(W // column, 1)
        rows = math.ceil(len(entries) / columns)
        strip = np.full((rows * line + gap, W, 3), 255, np.uint8)
        for i, ((text, scale, _, height, _), (_, colour)) in enumerate(zip(measured, entries)):
            x, y = gap + i % columns * column, gap // 2 + i // columns * line
            side = round(0.75 * line)
            corner = (y + (line - side) // 2, x)
            strip[corner[0] : corner[0] + side, corner[1] : corner[1] + side] = colour
            at = (x + side + gap // 2, y + (line + height) // 2)
            self._put(strip, text, at, scale, (255, 255, 255))
        return strip
