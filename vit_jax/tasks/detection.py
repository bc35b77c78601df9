"""Detection: a set of boxes, each with a class, for each picture."""

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import boxes as geometry
from vit_jax.contracts import Array, Batch, Example, Predictions, Sums
from vit_jax.errors import ConfigError, DataError
from vit_jax.tasks.segmentation import (
    Canvas,
    name_of,
    picture_size,
    real_sizes,
    resize_labels,
)

LARGEST_COST = 1e3  # of a match; the published weights stay below 30
NO_MATCH = 1e5  # over any sum of costs that could be saved by leaving a target out
# pycocotools' twelve numbers, in its order.
NUMBERS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss on masks: Lin et al. 2017 (arXiv:1708.02002)


def match(cost: Array, present: Array) -> jax.Array:
    """Each target its own query, at the least total cost; inside jit.

    Padding takes no query: it has a column of its own to go to, which also spares the search from
    pushing it through all the others. What is not a number counts as the largest cost, and costs
    beyond it are cut, so that the search always ends.

    Args:
      cost: [B, Q, M].
      present: bool [B, M], False on padding.

    Returns:
      int32 [B, M]: the query of each target, Q where it has none.
    """
    batch, queries, targets = cost.shape
    if not targets:
        return jnp.zeros((batch, 0), jnp.int32)
    cost = jnp.swapaxes(cost.astype(jnp.float32), 1, 2)  # [B, M, Q]
    cost = jnp.nan_to_num(cost, nan=LARGEST_COST, posinf=LARGEST_COST, neginf=-LARGEST_COST)
    cost = jnp.clip(cost, -LARGEST_COST, LARGEST_COST)
    cost = jnp.where(present[..., None], cost, NO_MATCH)
    own = jnp.where(jnp.eye(targets, dtype=bool)[None] & ~present[..., None], 0.0, NO_MATCH)
    cost = jnp.concatenate([cost, own], -1)  # [B, M, Q + M]

    def assign(matrix: jax.Array) -> jax.Array:
        row, column = optax.assignment.hungarian_algorithm(matrix)
        return jnp.zeros(targets, jnp.int32).at[row].set(column.astype(jnp.int32))

    return jnp.minimum(jax.vmap(assign)(cost), queries)


@dataclass(frozen=True)
class Detection:
    """Learns a set of boxes with classes: Carion et al. 2020, "End-to-End Object Detection with
    Transformers" (arXiv:2005.12872), sections 3.1 and A.2.

    Reads the outputs `logits` [B, Q, K + 1], whose last class is "nothing", `boxes` [B, Q, 4] as
    (cx, cy, w, h) in fractions of the unpadded image, and where they are there `auxiliary`, a list
    of such dictionaries, and `masks`, logits [B, Q, h, w] over the padded image.

    Attributes:
      class_weight: of the classes, in the loss and, on probabilities, in the cost of a match.
      box_weight: of the boxes' L1 distance, in both.
      giou_weight: of the generalised IoU, in both.
      mask_weight: of the focal loss on masks.
      dice_weight: of the Dice loss on masks: Milletari et al. 2016 (arXiv:1606.04797).
      nothing_weight: of a query that matches no object, where one that does weighs 1.
      detections: how many boxes a prediction has, the most probable ones; COCO counts 100.
      threshold: probability from which a box is drawn.
    """

    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    mask_weight: float = 1.0
    dice_weight: float = 1.0
    nothing_weight: float = 0.1
    detections: int = 100
    threshold: float = 0.5
    headline = "ap"
    wants_results = True
    cell = 360

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.endswith("_weight") and not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value} must be 0 or more")
        if self.detections < 1:
            raise ConfigError(f"detections={self.detections} must be at least 1")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} must be in 0..1")

    def score(self, outputs: dict[str, Any], batch: Batch) -> tuple[jax.Array, Sums]:
        """The set loss over the valid rows, and sums.

        Every layer's queries are matched to the objects anew. The classes' loss is a mean weighted
        by `nothing_weight` over all queries; the losses of boxes and masks are sums divided by the
        objects of the global batch, or by 1 if there is none; of a batch that is cut into parts to
        save memory, each part is divided by its own. Rows that are not valid count nothing
        and have a gradient of exactly zero. A class id beyond the head makes the loss NaN, so that
        none passes unseen.

        Args:
          outputs: as of the class.
          batch: `boxes` [B, M, 4], `box_label` [B, M], -1 on padding; `valid` [B]; `masks`
            [B, M, H, W] for the masks' losses.

        Returns:
          The loss and float32 scalars: {"class_loss", "class_weight", "l1_loss", "giou_loss",
          "class_wrong", "boxes"} of the last layer, {"auxiliary_class_loss", "auxiliary_box_loss"}
          of the earlier ones and {"mask_loss", "dice_loss"}, where there are such; "count", the
          valid rows, and "loss", this loss times "count".

        Raises:
          ConfigError: if M is more than Q.
        """
        labels = jnp.asarray(batch["box_label"])
        rows, targets = labels.shape
        queries = outputs["logits"].shape[1]
        if targets > queries:
            raise ConfigError(
                f"a picture may have {targets} boxes (Pad's boxes), but the model has {queries} "
                "queries, each for one box: raise model.queries or lower boxes"
            )
        valid = batch.get("valid")
        valid = jnp.ones(rows, bool) if valid is None else jnp.asarray(valid)
        present = (labels >= 0) & valid[:, None]  # [B, M]
        truth = jnp.where(present[..., None], jnp.asarray(batch["boxes"], jnp.float32), 0.5)
        count, number = valid.sum(dtype=jnp.float32), present.sum(dtype=jnp.float32)
        # All layers at once, the last one at the end: one search for all matches.
        layers = [*outputs.get("auxiliary", ()), outputs]
        logits, found = (jnp.stack([layer[k] for layer in layers]) for k in ("logits", "boxes"))
        score = jax.vmap(self._score_layer, in_axes=(0, 0, None, None, None, None))
        parts, queries = score(logits, found, truth, labels, present, valid)
        sums = {k: v[-1] for k, v in parts.items()} | {"boxes": number, "count": count}
        classes, objects = parts["class_loss"].sum(), self._weighed_boxes(parts).sum()
        if len(layers) > 1:
            sums["auxiliary_class_loss"] = parts["class_loss"][:-1].sum()
            sums["auxiliary_box_loss"] = self._weighed_boxes(parts)[:-1].sum()
        if "masks" in outputs and "masks" in batch:
            sums |= _score_masks(outputs["masks"], batch["masks"], queries[-1], present)
            objects += self.mask_weight * sums["mask_loss"] + self.dice_weight * sums["dice_loss"]
        # The weights are the same in every layer: in each, every object has one query.
        weight = sums["class_weight"]
        loss = self.class_weight * classes / jnp.where(weight > 0, weight, 1.0)
        loss += objects / jnp.maximum(number, 1.0)
        return loss, sums | {"loss": loss * count}

    def _score_layer(
        self, logits: Array, boxes: Array, truth: Array, labels: Array, present: Array, valid: Array
    ) -> tuple[Sums, jax.Array]:
        """One layer's sums, and its query of each object [B, M], Q on padding.

        [B, Q, K + 1], [B, Q, 4]; [B, M, 4], [B, M], bool [B, M], bool [B].
        """
        # Masked before anything else as well as after: a gradient of 0 times infinity is NaN.
        real = valid[:, None, None]
        logits = jnp.where(real, logits.astype(jnp.float32), 0.0)
        boxes = jnp.where(real, boxes.astype(jnp.float32), 0.5)
        rows, queries, nothing = *logits.shape[:2], logits.shape[2] - 1
        logp = jax.nn.log_softmax(logits)
        corners, true_corners = geometry.to_corners(boxes), geometry.to_corners(truth)

        known = jnp.clip(labels, 0, nothing - 1)
        shape = (rows, queries, labels.shape[1])
        of_class = jnp.take_along_axis(jnp.exp(logp), jnp.broadcast_to(known[:, None], shape), -1)
        distance = jnp.abs(boxes[:, :, None] - truth[:, None]).sum(-1)  # [B, Q, M]
        cost = self.box_weight * distance - self.class_weight * of_class
        cost -= self.giou_weight * geometry.pairwise(geometry.giou, corners, true_corners)
        query = match(jax.lax.stop_gradient(cost), present)  # [B, M]

        taken = query[:, None, :] == jnp.arange(queries)[None, :, None]  # [B, Q, M]
        wanted = jnp.where(taken, known[:, None], 0).sum(-1)
        wanted = jnp.where(taken.any(-1), wanted, nothing)  # [B, Q]
        weights = jnp.where(taken.any(-1), 1.0, self.nothing_weight) * valid[:, None]
        losses = -jnp.take_along_axis(logp, wanted[..., None], -1)[..., 0] * weights
        class_loss = losses.sum() + jnp.where((present & (labels >= nothing)).any(), jnp.nan, 0.0)

        # A padding target reads some query, and what it reads is not used.
        at = jnp.minimum(query, queries - 1)[..., None]  # [B, M, 1]
        mine = jnp.take_along_axis(boxes, at, 1)  # [B, M, 4]
        l1 = jnp.where(present, jnp.abs(mine - truth).sum(-1), 0.0)
        overlap = geometry.giou(jnp.take_along_axis(corners, at, 1), true_corners)
        guess = jnp.take_along_axis(logits.argmax(-1), at[..., 0], 1)  # [B, M]
        wrong = (guess != labels) & present
        return {
            "class_loss": class_loss,
            "class_weight": weights.sum(),
            "l1_loss": l1.sum(),
            "giou_loss": jnp.where(present, 1 - overlap, 0.0).sum(),
            "class_wrong": wrong.sum(dtype=jnp.float32),
        }, query

    def _weighed_boxes(self, sums: Sums) -> Array:
        return self.box_weight * sums["l1_loss"] + self.giou_weight * sums["giou_loss"]

    def predict(self, outputs: dict[str, Any], batch: Batch) -> Predictions:
        """The k = min(detections, Q) most probable boxes of each picture.

        Outputs with masks need a batch with `image_mask` or `image`, whose size they cover.

        Returns:
          {"label" [B, k] int32, the likeliest class but "nothing"; "score" [B, k], its probability,
          highest first; "boxes" [B, k, 4], (x0, y0, x1, y1) as fractions of the unpadded image, not
          clipped}, and with masks {"masks" [B, k, h, w], logits over the padded image; "padded" and
          "size" [B, 2] int32, (H, W) of the image with and without padding}.
        """
        probabilities = jax.nn.softmax(outputs["logits"].astype(jnp.float32))[..., :-1]
        k = min(self.detections, probabilities.shape[1])
        score, query = jax.lax.top_k(probabilities.max(-1), k)  # [B, k]
        label = jnp.take_along_axis(probabilities.argmax(-1), query, 1)
        boxes = jnp.take_along_axis(outputs["boxes"].astype(jnp.float32), query[..., None], 1)
        found = {
            "label": label.astype(jnp.int32),
            "score": score,
            "boxes": geometry.to_corners(boxes),
        }
        if "masks" in outputs:
            found["masks"] = jnp.take_along_axis(outputs["masks"], query[..., None, None], 1)
            found |= real_sizes(batch)
        return found

    def summarize(
        self, sums: Sums, results: Iterable[tuple[Predictions, Example]] | None = None
    ) -> dict:
        """Sums of a split -> losses and the share of wrong classes; with `results` COCO's AP too.

        The losses are ratios of whole sums, so they do not depend on what was batched with what.

        Args:
          sums: of `score`, added up.
          results: (prediction of a row, the dataset's own example), read once, one after the other.

        Returns:
          {"loss", "class_loss", "l1_loss", "giou_loss", "class_error"} and the parts there are,
          unweighted; with `results` `average_precision`'s, and with masks on both sides the same
          of the masks, "mask_ap" and so on.

        Raises:
          DataError: if no row was valid, or there is no object to measure with.
        """
        if not float(sums["count"]):
            raise DataError("there was no valid example to measure: no picture, or all are broken")
        sums = {k: float(v) for k, v in sums.items()}
        boxes = max(sums["boxes"], 1.0)
        weights = sums["class_weight"] or 1.0
        classes = sums["class_loss"] + sums.get("auxiliary_class_loss", 0.0)
        objects = self._weighed_boxes(sums) + sums.get("auxiliary_box_loss", 0.0)
        objects += self.mask_weight * sums.get("mask_loss", 0.0)
        objects += self.dice_weight * sums.get("dice_loss", 0.0)
        numbers = {
            "loss": self.class_weight * classes / weights + objects / boxes,
            "class_loss": sums["class_loss"] / weights,
            "l1_loss": sums["l1_loss"] / boxes,
            "giou_loss": sums["giou_loss"] / boxes,
            "class_error": sums["class_wrong"] / boxes,
        }
        numbers |= {k: sums[k] / boxes for k in ("mask_loss", "dice_loss") if k in sums}
        return numbers if results is None else numbers | average_precision(results)

    def draw(
        self, image: np.ndarray, example: Example, prediction: Predictions, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str, bool]:
        """A picture and its boxes -> (picture, "3 of 4 found, 1 wrong", False).

        Boxes of a probability of `threshold` or more have their class's colour and name; objects
        that none of them hits are white. Right means that every object, crowds aside, is hit by a
        box of its class with an IoU of 0.5, and that there is no other box. A small picture comes
        back enlarged, so that the names can be read.
        """
        size = image.shape[:2]
        chosen = np.asarray(prediction["score"]) >= self.threshold
        labels, scores = (np.asarray(prediction[k])[chosen] for k in ("label", "score"))
        boxes = geometry.to_pixels(np.asarray(prediction["boxes"])[chosen], size)
        canvas = Canvas(image)
        if "masks" in prediction and len(boxes):
            # The surer one where two overlap; 0 is no mask.
            ids = np.zeros(size, np.int64)
            masks = masks_on(prediction, size)[chosen]
            for i in np.argsort(scores):
                ids[masks[i]] = i + 1
            canvas.regions(ids, {i + 1: canvas.colour(k) for i, k in enumerate(labels)})
        title, right = f"{len(boxes)} found", True
        if "boxes" in example:
            hit, good = compared(boxes, labels, scores, example)
            title = f"{hit.sum()} of {len(hit)} found"
            wrong = int((~good).sum())
            title += f", {wrong} wrong" if wrong else ""
            right = bool(hit.all()) and not wrong
            for box in np.asarray(example["boxes"])[~crowds(example)][~hit]:
                canvas.box(box, (255, 255, 255))
        for i in np.argsort(scores):  # the surest on top
            text = f"{name_of(names, int(labels[i]))} {100 * scores[i]:.0f}%"
            canvas.box(boxes[i], canvas.colour(labels[i]), text)
        return canvas.drawn(), title, right

    def draw_target(
        self, image: np.ndarray, row: Batch, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str]:
        """A batch's picture and row -> (picture with its boxes and masks, "3 objects")."""
        labels = np.asarray(row["box_label"])
        real = labels >= 0
        count = int(real.sum())
        canvas = Canvas(image)
        if "masks" in row:
            ids = np.full(image.shape[:2], -1)
            for i in np.flatnonzero(real):
                ids[np.asarray(row["masks"][i])] = i
            canvas.regions(ids, {int(i): canvas.colour(labels[i]) for i in np.flatnonzero(real)})
        mask = np.asarray(row.get("image_mask", np.ones(image.shape[:2], bool)))
        size = int(mask.any(1).sum()), int(mask.any(0).sum())
        corners = geometry.to_corners(np.asarray(row["boxes"])[real])
        for box, label in zip(geometry.to_pixels(corners, size), labels[real].tolist()):
            canvas.box(box, canvas.colour(label), name_of(names, label))
        return canvas.drawn(), f"{count} object{'s' * (count != 1)}"


def _score_masks(logits: Array, truth: Array, query: Array, present: Array) -> Sums:
    """Focal and Dice losses of each object's query's mask, added up over the objects.

    Logits [B, Q, h, w] are enlarged to the truth's [B, M, H, W], as in the authors' code; both
    cover the padding, where there is nothing to find.
    """
    at = jnp.minimum(query, logits.shape[1] - 1)[..., None, None]
    mine = jnp.take_along_axis(logits, at, 1).astype(jnp.float32)  # [B, M, h, w]
    real = present[..., None, None]
    mine = jax.image.resize(jnp.where(real, mine, 0.0), truth.shape, "bilinear", antialias=False)
    truth = jnp.asarray(truth, jnp.float32)
    p = jax.nn.sigmoid(mine)
    entropy = -truth * jax.nn.log_sigmoid(mine) - (1 - truth) * jax.nn.log_sigmoid(-mine)
    p_true = p * truth + (1 - p) * (1 - truth)
    alpha = ALPHA * truth + (1 - ALPHA) * (1 - truth)
    focal = (alpha * (1 - p_true) ** GAMMA * entropy).mean((2, 3))  # [B, M]
    shared, both = (p * truth).sum((2, 3)), p.sum((2, 3)) + truth.sum((2, 3))
    dice = 1 - (2 * shared + 1) / (both + 1)
    return {
        "mask_loss": jnp.where(present, focal, 0.0).sum(),
        "dice_loss": jnp.where(present, dice, 0.0).sum(),
    }


def crowds(example: Example) -> np.ndarray:
    """Which objects are crowds, bool [m]: all False where the example does not say."""
    return np.asarray(example.get("crowd", np.zeros(len(example["boxes"]))), bool)


def compared(
    boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, example: Example
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in pixels against an example's -> (objects that were hit, boxes that are right).

    The surest box chooses first, among the objects of its class that are still free, the one of
    the greatest IoU, at least 0.5. A box that lies by half in a crowd of its class is right too.

    Returns:
      bool [m], without the crowds, and bool [n].
    """
    crowd = crowds(example)
    truth, classes = np.asarray(example["boxes"], float), np.asarray(example["box_label"])
    overlaps = geometry.pairwise(geometry.iou, boxes, truth[~crowd])  # [n, m]
    overlaps = np.where(labels[:, None] == classes[~crowd], overlaps, 0)
    hit, good = np.zeros(overlaps.shape[1], bool), np.zeros(len(boxes), bool)
    for i in np.argsort(-scores, kind="stable"):
        free = np.where(hit, 0, overlaps[i])
        if free.max(initial=0) >= 0.5:
            hit[free.argmax()] = good[i] = True
    inside = geometry.pairwise(geometry.intersections, boxes, truth[crowd])
    inside = np.where(labels[:, None] == classes[crowd], inside, 0).max(1, initial=0)
    return hit, good | ((inside >= 0.5 * geometry.areas(boxes)) & (inside > 0))


def masks_on(prediction: Predictions, size: tuple[int, int]) -> np.ndarray:
    """A row's mask logits [k, h, w] -> bool [k, H, W] at the picture's own size.

    As DETR's published code: enlarged to the padded image, cut to the real part, and from there by
    nearest neighbours.
    """
    masks = [mask > 0 for mask in logits_on(prediction)]
    return np.array([resize_labels(mask, size) for mask in masks], bool).reshape(-1, *size)


def logits_on(prediction: Predictions) -> Iterable[np.ndarray]:
    """A row's masks, one after the other, at the size of the unpadded image: float32 [H, W]."""
    (padded_h, padded_w), (h, w) = (np.asarray(prediction[k]) for k in ("padded", "size"))
    for mask in np.asarray(prediction["masks"], np.float32):
        yield cv2.resize(mask, (int(padded_w), int(padded_h)))[:h, :w]


def average_precision(results: Iterable[tuple[Predictions, Example]]) -> dict[str, float]:
    """COCO's twelve numbers, by pycocotools: of boxes, and of masks where both sides have them.

    On the pictures' own pixels. An object's size, which says whether it counts as small (under
    32 x 32 pixels), medium or large (from 96 x 96), is its `area` where the example has that, else
    that of its mask, else that of its box; COCO's is the annotation's area, not the box's. Crowds
    are neither found nor missed.

    Args:
      results: (prediction of a row, the dataset's own example), read once, one after the other.

    Returns:
      {"ap", "ap50", "ap75", "ap_small", .., "ar_large"}, in 0..1, of which those are left out for
      which there is no object of that size; then the same with "mask_" in front.

    Raises:
      DataError: if there is no object at all.
    """
    from pycocotools import mask as coding

    truths: list[dict] = []
    found: list[dict] = []
    sizes, with_masks = [], True
    for picture, (prediction, example) in enumerate(results, 1):
        size = picture_size(example)
        sizes.append({"id": picture, "height": size[0], "width": size[1]})
        masked = "masks" in prediction and "masks" in example
        with_masks &= masked
        corners = np.asarray(example["boxes"], np.float64).reshape(-1, 4)
        area = geometry.areas(corners)
        if "masks" in example:
            area = np.asarray(example["masks"]).sum((1, 2))
        area = np.asarray(example.get("area", area), float)
        crowd = crowds(example)
        for i, label in enumerate(np.asarray(example["box_label"]).tolist()):
            entry = {"image_id": picture, "category_id": label, "area": float(area[i])}
            entry |= {"bbox": _as_coco(corners[i]), "iscrowd": int(crowd[i])}
            if masked:
                mask = np.asfortranarray(example["masks"][i], np.uint8)
                entry["segmentation"] = coding.encode(mask)
            truths.append(entry)
        corners = geometry.to_pixels(np.asarray(prediction["boxes"], np.float64), size)
        masks = masks_on(prediction, size) if masked else None
        for i, label in enumerate(np.asarray(prediction["label"]).tolist()):
            entry = {"image_id": picture, "category_id": label, "iscrowd": 0}
            entry |= {"bbox": _as_coco(corners[i]), "score": float(prediction["score"][i])}
            if masked:
                entry["segmentation"] = coding.encode(np.asfortranarray(masks[i], np.uint8))
            found.append(entry)
    if not any(not entry["iscrowd"] for entry in truths):
        raise DataError("there is no object to measure with: no picture has a box")
    numbers = _evaluated(sizes, truths, found, "bbox")
    if with_masks:
        of_masks = _evaluated(sizes, truths, found, "segm")
        numbers |= {f"mask_{name}": value for name, value in of_masks.items()}
    return numbers


def _as_coco(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = box.tolist()
    return [x0, y0, x1 - x0, y1 - y0]


def _evaluated(sizes: list, truths: list, found: list, kind: str) -> dict[str, float]:
    from pycocotools import mask as coding
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if kind == "segm":
        areas = [float(coding.area(entry["segmentation"])) for entry in found]
    else:
        areas = [entry["bbox"][2] * entry["bbox"][3] for entry in found]
    categories = sorted({entry["category_id"] for entry in [*truths, *found]})

    def indexed(entries: list[dict]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": sizes,
            "categories": [{"id": i, "name": str(i)} for i in categories],
            # Ids from 1: pycocotools writes 0 where nothing matches.
            "annotations": [entry | {"id": i} for i, entry in enumerate(entries, 1)],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        found = [entry | {"area": area} for entry, area in zip(found, areas, strict=True)]
        evaluation = COCOeval(indexed(truths), indexed(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = zip(NUMBERS, evaluation.stats.tolist(), strict=True)
    return {name: value for name, value in values if value >= 0}  # -1: nothing to measure
