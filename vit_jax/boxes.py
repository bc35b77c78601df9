"""Boxes: formats, areas, overlaps; on numpy and on jax arrays alike.

Boxes are arrays [..., 4]: "corners" (x0, y0, x1, y1) or "centres" (cx, cy, w, h), in pixels or as
fractions of the image. Edges are meant, not middles of pixels: a box that covers the columns 3 and
4 has x0 = 3, x1 = 5 and the width 2. An inverted box (x1 < x0) has the area 0, as one without width
has; such a box overlaps with nothing. Results are jax arrays if an argument is one.
"""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.contracts import Array


def to_corners(boxes: Array) -> Array:
    """(cx, cy, w, h) [..., 4] -> (x0, y0, x1, y1) [..., 4]."""
    cx, cy, w, h = _columns(boxes)
    return _stacked(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


def to_centres(boxes: Array) -> Array:
    """(x0, y0, x1, y1) [..., 4] -> (cx, cy, w, h) [..., 4]."""
    x0, y0, x1, y1 = _columns(boxes)
    return _stacked((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)


def to_pixels(boxes: Array, size: tuple) -> Array:
    """Fractions of an image of `size` (H, W) -> pixels, in either format, [..., 4] -> [..., 4].

    H and W are numbers, or arrays that broadcast with `boxes[..., 0]`.
    """
    H, W = size
    a, b, c, d = _columns(boxes)
    return _stacked(a * W, b * H, c * W, d * H)


def to_fractions(boxes: Array, size: tuple) -> Array:
    """Pixels of an image of `size` (H, W) -> fractions; the inverse of `to_pixels`."""
    H, W = size
    return to_pixels(boxes, (1 / H, 1 / W))


def clipped(boxes: Array, size: tuple = (1, 1)) -> Array:
    """Corners [..., 4] -> the same, none outside an image of `size` (H, W).

    A box that lies wholly outside ends up on the edge, with the area 0.
    """
    H, W = size
    xp = _namespace(boxes)
    x0, y0, x1, y1 = _columns(boxes)
    return _stacked(*(xp.clip(side, 0, top) for side, top in ((x0, W), (y0, H), (x1, W), (y1, H))))


def areas(boxes: Array) -> Array:
    """Corners [..., 4] -> areas [...]; 0 if a box is inverted."""
    x0, y0, x1, y1 = _columns(boxes)
    xp = _namespace(boxes)
    return xp.maximum(x1 - x0, 0) * xp.maximum(y1 - y0, 0)


def intersections(a: Array, b: Array) -> Array:
    """Corners [..., 4] and [..., 4], which broadcast -> the area of what they share [...]."""
    xp = _namespace(a, b)
    (a0, a1, a2, a3), (b0, b1, b2, b3) = _columns(a), _columns(b)
    w = xp.minimum(a2, b2) - xp.maximum(a0, b0)
    h = xp.minimum(a3, b3) - xp.maximum(a1, b1)
    return xp.maximum(w, 0) * xp.maximum(h, 0)


def iou(a: Array, b: Array) -> Array:
    """Intersection over union of corners [..., 4] and [..., 4], which broadcast -> [...] in 0..1.

    0 if neither has an area.
    """
    shared = intersections(a, b)
    return _ratio(shared, areas(a) + areas(b) - shared)


def giou(a: Array, b: Array) -> Array:
    """Generalised IoU: Rezatofighi et al. 2019 (arXiv:1902.09630), algorithm 1; in -1..1.

    The IoU less the share of the smallest box around both that neither covers. 0 if that box has no
    area. Unlike the IoU it has a gradient for boxes apart, and none that is not finite.

    Args:
      a: corners [..., 4].
      b: corners [..., 4], which broadcast with `a`.
    """
    xp = _namespace(a, b)
    (a0, a1, a2, a3), (b0, b1, b2, b3) = _columns(a), _columns(b)
    shared = intersections(a, b)
    union = areas(a) + areas(b) - shared
    w, h = xp.maximum(a2, b2) - xp.minimum(a0, b0), xp.maximum(a3, b3) - xp.minimum(a1, b1)
    around = xp.maximum(w, 0) * xp.maximum(h, 0)
    return _ratio(shared, union) - _ratio(around - union, around)


def pairwise(measure: Callable, a: Array, b: Array) -> Array:
    """`measure` (`iou`, `giou`, `intersections`) of each of [..., n, 4] with each of [..., m, 4].

    Returns:
      [..., n, m]; n and m may be 0.
    """
    return measure(a[..., :, None, :], b[..., None, :, :])


def _ratio(part: Array, whole: Array) -> Array:
    """The ratio, 0 where `whole` is not over 0, with finite gradients there too."""
    xp = _namespace(part, whole)
    # Tells "nothing" from NaN: what is not a number must stay one.
    empty = whole <= 0
    return xp.where(empty, 0, part / xp.where(empty, 1, whole))


def _columns(boxes: Array) -> tuple[Array, ...]:
    return tuple(boxes[..., i] for i in range(4))


def _stacked(*columns: Array) -> Array:
    return _namespace(*columns).stack(columns, -1)


def _namespace(*arrays: Array) -> ModuleType:
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np
