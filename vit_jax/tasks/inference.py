"""A segmenter asked several times: by windows, mirrored and at several scales; logits averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.contracts import Array

Apply = Any  # of a model: (variables, image, ..., train=) -> logits [B, H, W, K]


@dataclass(frozen=True)
class Averaged:
    """Stands in a model's place in evaluation, and asks it more than once.

    Windows are Zheng et al. 2021 (arXiv:2012.15840), section 4.1, as in their published code:
    squares that overlap, the last ones flush with the lower and right edge, their logits averaged.
    Mirrored and resized pictures are asked like that each, and their probabilities averaged.
    All of it goes by the real part of each picture, not by the padding of its batch.

    Attributes:
      model: a segmenter: its `apply` gives logits [B, H, W, K] for `image` [B, H, W, 3].
      window: side of the windows; 0, or more than the picture's, is the whole picture.
      stride: from one window to the next; 0 is two thirds of a window.
      flip: whether the mirrored picture is asked too.
      scales: of the picture's sides.

    Raises:
      ValueError: if a number cannot be.
    """

    model: Any
    window: int = 0
    stride: int = 0
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if self.window < 0 or not 0 <= self.stride <= self.window:
            raise ValueError(
                f"window={self.window} and stride={self.stride} must be at least 0, and the stride "
                "at most the window, or pixels would be left out"
            )
        if not self.scales or not all(0 < scale <= 8 for scale in self.scales):
            raise ValueError(f"scales={self.scales!r} must hold numbers over 0 and up to 8")

    def __call__(self, image: Array, image_mask: Array | None = None, *, train: bool) -> jax.Array:
        """As `apply`, whose variables are bound elsewhere; `step.inputs` reads this signature."""
        raise TypeError("call apply(variables, ...)")

    def apply(
        self, variables: Any, image: Array, image_mask: Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """[B, H, W, 3], and bool [B, H, W] that is True on real pixels -> logits [B, H, W, K]."""
        ask = partial(self._windows, partial(self.model.apply, variables, train=False))
        if image_mask is None:
            image_mask = jnp.ones(image.shape[:3], bool)
        size = jnp.stack([image_mask.any(2).sum(1), image_mask.any(1).sum(1)], 1)  # [B, 2]
        views = [
            (scale, flip) for scale in self.scales for flip in ((False, True)[: 1 + self.flip])
        ]
        if len(views) == 1 and self.scales[0] == 1:
            return ask(image, size)
        total = 0.0
        for scale, flip in views:
            logits = self._view(ask, image, size, scale, flip)
            total = total + jax.nn.softmax(logits.astype(jnp.float32))
        # The mean's logarithm is what the task takes the softmax of.
        return jnp.log(jnp.maximum(total / len(views), 1e-12))

    def _view(self, ask: Apply, image: Array, size: Array, scale: float, flip: bool) -> jax.Array:
        """Logits for a picture of another size or mirrored, back on the picture's own pixels."""
        H, W = image.shape[1:3]
        x, seen = image, size
        if scale != 1:
            x = _resized(image, (max(round(H * scale), 1), max(round(W * scale), 1)))
            seen = jnp.clip(jnp.round(size * scale), 1).astype(size.dtype)
        if flip:
            x = _mirrored(x, seen)
        logits = ask(x, seen)
        if flip:
            logits = _mirrored(logits, seen)
        return _resized(logits, (H, W)) if scale != 1 else logits

    def _windows(self, model: Apply, image: Array, size: Array) -> jax.Array:
        """[B, H, W, 3] whose real parts are [B, 2] (height, width) -> logits [B, H, W, K]."""
        B, H, W = image.shape[:3]
        window = tuple(min(self.window or n, n) for n in (H, W))
        if window == (H, W):
            return model(image)
        stride = self.stride or max(self.window * 2 // 3, 1)
        counts = [-(-(n - w) // stride) + 1 for n, w in zip((H, W), window)]

        def step(carry, place):
            total, count = carry
            # The last window that a picture needs is moved back to end with it, and those after
            # it are in the same place: they count for nothing.
            room = jnp.maximum(size - jnp.array([window]), 0)  # [B, 2]
            start = jnp.minimum(place[None] * stride, room)
            needed = ((place == 0)[None] | ((place - 1)[None] * stride < room)).all(1)  # [B]
            part = jax.vmap(partial(_cut, size=window))(image, start)
            logits = model(part).astype(jnp.float32)
            weight = needed[:, None, None, None].astype(jnp.float32)
            put = jax.vmap(_added)
            ones = jnp.ones((B, *window, 1))
            return (put(total, logits * weight, start), put(count, ones * weight, start)), None

        places = jnp.stack(jnp.meshgrid(*map(jnp.arange, counts), indexing="ij"), -1).reshape(-1, 2)
        part = jax.ShapeDtypeStruct((B, *window, image.shape[-1]), image.dtype)
        classes = jax.eval_shape(model, part).shape[-1]
        zeros = (jnp.zeros((B, H, W, classes)), jnp.zeros((B, H, W, 1)))
        # One after the other: windows side by side would take their number's share of the memory.
        (total, count), _ = jax.lax.scan(step, zeros, places)
        return total / jnp.maximum(count, 1)


def _cut(image: Array, start: Array, *, size: Sequence[int]) -> jax.Array:
    return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (*size, image.shape[-1]))


def _added(total: Array, part: Array, start: Array) -> jax.Array:
    at = (start[0], start[1], 0)
    old = jax.lax.dynamic_slice(total, at, part.shape)
    return jax.lax.dynamic_update_slice(total, old + part, at)


def _mirrored(x: Array, size: Array) -> jax.Array:
    """[B, H, W, C], left and right swapped within each row's width; the padding stays."""
    place = jnp.arange(x.shape[2])[None]  # [1, W]
    width = size[:, 1:]  # [B, 1]
    at = jnp.where(place < width, width - 1 - place, place)
    return jnp.take_along_axis(x, at[:, None, :, None], 2)


def _resized(x: Array, size: tuple[int, int]) -> jax.Array:
    shape = (x.shape[0], *size, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False)
