"""Restoring hidden patches: their pixels, or their mean colours."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vit_jax.contracts import Array, Batch, Example, Predictions, Sums
from vit_jax.errors import ConfigError, DataError, nearest

LOSSES = ("l2", "l1")
GREY, WHITE = 128, 255  # of hidden patches, and between two pictures
EPSILON = 1e-6  # of a patch's variance, as in MAE's code
SIDE = 96  # pixels that a drawn picture has at least


@dataclass(frozen=True)
class _Masked:
    """What both tasks share: sums over the hidden patches, and how they are drawn.

    Attributes:
      mean: what was subtracted from the image's channels in [0, 1].
      std: what the difference was divided by.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    headline = "loss"
    wants_results = False
    cell = 330

    def __post_init__(self):
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ConfigError(
                f"mean={self.mean} and std={self.std} must be three numbers each, those of std "
                "above 0"
            )

    def predict(self, outputs: Array, batch: Batch) -> Predictions:
        """The pictures as the model got them, and with their hidden patches restored.

        Returns:
          {"seen" uint8 [B, H, W, 3], "patch_mask" bool [B, h, w], "restored" uint8 [B, H, W, 3],
          which is "seen" where nothing is hidden, "loss" [B], of each picture}.
        """
        mask = _mask(batch)
        picture = self._levels(jnp.asarray(batch["image"], jnp.float32))
        restored = self._restored(outputs, batch, mask)
        hidden = _on_pixels(mask, picture.shape[1:3])[..., None]
        losses = jnp.where(mask, self._losses(outputs, batch, mask), 0.0).sum((1, 2))
        return {
            "seen": _uint8(picture),
            "patch_mask": mask,
            "restored": jnp.where(hidden, _uint8(restored), _uint8(picture)),
            "loss": losses / jnp.maximum(mask.sum((1, 2)), 1),
        }

    def draw(
        self, image: np.ndarray, example: Example, prediction: Predictions, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str, None]:
        """(picture, hidden and restored, side by side as the model has them; "75 % hidden, loss
        0.41"; None: nothing is right or wrong).
        """
        seen, mask = (np.asarray(prediction[k]) for k in ("seen", "patch_mask"))
        shown = beside([seen, covered(seen, mask), np.asarray(prediction["restored"])])
        return shown, f"{100 * mask.mean():.0f} % hidden, loss {prediction['loss']:.3g}", None

    def draw_target(
        self, image: np.ndarray, row: Batch, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str]:
        """A batch's picture and row -> (picture and hidden, "12 of 16 patches hidden")."""
        mask = np.asarray(row["patch_mask"])
        title = f"{mask.sum()} of {mask.size} patches hidden"
        return beside([image, covered(image, mask)]), title

    def _sums(self, losses: Array, batch: Batch) -> tuple[jax.Array, Sums, jax.Array]:
        """Losses [B, h, w] -> the mean over the hidden patches of valid rows, sums, which those
        are.
        """
        counted = _mask(batch)
        if "valid" in batch:
            counted &= jnp.asarray(batch["valid"])[:, None, None]
        total = jnp.where(counted, losses, 0.0).sum()
        count = counted.sum(dtype=jnp.float32)
        return total / jnp.maximum(count, 1.0), {"loss": total, "count": count}, counted

    def _levels(self, image: Array) -> jax.Array:
        """Standardised -> 0 to 1, [B, H, W, 3]."""
        mean, std = (jnp.asarray(n, jnp.float32) for n in (self.mean, self.std))
        return image * std[None, None, None] + mean[None, None, None]

    def _losses(self, outputs: Array, batch: Batch, mask: Array) -> jax.Array:
        """Of each patch, hidden or not: [B, h, w]."""
        raise NotImplementedError

    def _restored(self, outputs: Array, batch: Batch, mask: Array) -> jax.Array:
        """Whole pictures, 0 to 1, [B, H, W, 3]."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaskedPixels(_Masked):
    """Learns to restore the pixels of hidden patches, from pictures float32 [B, H, W, 3].

    The loss is the mean over the hidden patches of valid rows: of the squared differences, MAE (He
    et al. 2022, arXiv:2111.06377, section 3), or of the absolute ones, SimMIM (Xie et al. 2022,
    arXiv:2111.09886, section 3.4).

    Attributes:
      loss: "l2" or "l1".
      normalized: whether each patch is compared with itself less its mean, over its deviation, its
        variance taken as of a sample (n - 1): MAE, section 4.1. What is drawn gets both back from
        the true patch.
    """

    loss: str = "l2"
    normalized: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ConfigError(f"there is no loss {self.loss!r}.{nearest(self.loss, LOSSES)}")

    def score(self, outputs: Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """Pictures [B, H, W, 3] -> the mean loss over the hidden patches, and sums.

        Returns:
          The loss and {"loss", "count", the hidden patches of valid rows}, float32 scalars.

        Raises:
          ConfigError: if the batch has no `patch_mask`, or it does not fit the picture.
        """
        return self._sums(self._losses(outputs, batch, _mask(batch)), batch)[:2]

    def summarize(self, sums: Sums, results: None = None) -> dict[str, float]:
        """Sums of a split -> {"loss"}; DataError if nothing was hidden in any valid picture."""
        return {"loss": float(sums["loss"]) / _count(sums)}

    def _losses(self, outputs: Array, batch: Batch, mask: Array) -> jax.Array:
        target, _, _ = self._target(batch, mask)
        difference = _patches(outputs.astype(jnp.float32), mask) - target
        each = jnp.abs(difference) if self.loss == "l1" else jnp.square(difference)
        return each.mean(-1)

    def _target(self, batch: Batch, mask: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What to restore, [B, h, w, pixels], and what normalised it: mean and deviation."""
        target = _patches(jnp.asarray(batch["image"], jnp.float32), mask)
        if not self.normalized:
            return target, jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
        mean = target.mean(-1, keepdims=True)
        deviation = jnp.sqrt(target.var(-1, ddof=1, keepdims=True) + EPSILON)
        return (target - mean) / deviation, mean, deviation

    def _restored(self, outputs: Array, batch: Batch, mask: Array) -> jax.Array:
        _, mean, deviation = self._target(batch, mask)
        patches = _patches(outputs.astype(jnp.float32), mask) * deviation + mean
        side = _sides(outputs.shape[1:3], mask.shape[1:])
        whole = rearrange(patches, "b h w (i j c) -> b (h i) (w j) c", i=side[0], j=side[1], c=3)
        return self._levels(whole)


@dataclass(frozen=True)
class MaskedColours(_Masked):
    """Learns the mean colour of hidden patches, from logits [B, h, w, 8**bits].

    Dosovitskiy et al. 2021 (arXiv:2010.11929), appendix B.1.2: each channel's mean in 0..1 is cut
    into 2**bits equal parts, 512 colours with 3 bits; the number of a colour is that of red, of
    green and of blue, the last one fastest.

    Attributes:
      bits: of each channel.
    """

    bits: int = 3

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits} must be 1 to 8")

    @property
    def levels(self) -> int:
        """Parts of each channel."""
        return 2**self.bits

    def score(self, outputs: Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """Logits [B, h, w, K] -> the mean cross-entropy over the hidden patches, and sums.

        Returns:
          The loss and {"loss", "correct", "count", the hidden patches of valid rows}, float32.

        Raises:
          ConfigError: if the batch has no `patch_mask`, or K is not the number of colours.
        """
        mask = _mask(batch)
        loss, sums, counted = self._sums(self._losses(outputs, batch, mask), batch)
        hit = (outputs.argmax(-1) == self._colours(batch, mask)) & counted
        return loss, sums | {"correct": hit.sum(dtype=jnp.float32)}

    def summarize(self, sums: Sums, results: None = None) -> dict[str, float]:
        """Sums of a split -> {"loss", "accuracy"}; DataError if nothing was hidden."""
        count = _count(sums)
        return {"loss": float(sums["loss"]) / count, "accuracy": float(sums["correct"]) / count}

    def _colours(self, batch: Batch, mask: Array) -> jax.Array:
        """The true colour of each patch: int32 [B, h, w]."""
        picture = self._levels(jnp.asarray(batch["image"], jnp.float32))
        side = _sides(picture.shape[1:3], mask.shape[1:])
        cut = "b (h i) (w j) c -> b h w c (i j)"
        mean = rearrange(picture, cut, i=side[0], j=side[1]).mean(-1)  # [B, h, w, 3]
        part = jnp.clip(jnp.floor(mean * self.levels), 0, self.levels - 1).astype(jnp.int32)
        return (part[..., 0] * self.levels + part[..., 1]) * self.levels + part[..., 2]

    def _losses(self, outputs: Array, batch: Batch, mask: Array) -> jax.Array:
        if outputs.shape[-1] != self.levels**3:
            raise ConfigError(
                f"the model tells {outputs.shape[-1]} classes of a patch, and there are "
                f"{self.levels**3} colours of {self.bits} bits a channel"
            )
        logits = jax.nn.log_softmax(outputs.astype(jnp.float32))
        at = self._colours(batch, mask)[..., None]
        return -jnp.take_along_axis(logits, at, -1)[..., 0]

    def _restored(self, outputs: Array, batch: Batch, mask: Array) -> jax.Array:
        number, parts = outputs.argmax(-1), self.levels  # [B, h, w]
        of_channels = (number // parts**2, number // parts % parts, number % parts)
        colour = (jnp.stack(of_channels, -1) + 0.5) / parts  # [B, h, w, 3]
        return _on_pixels(colour, jnp.asarray(batch["image"]).shape[1:3])


def _mask(batch: Batch) -> jax.Array:
    """`patch_mask` [B, h, w]; ConfigError if there is none."""
    if "patch_mask" not in batch:
        raise ConfigError(
            "the batch has no patch_mask: the transforms of training and of evaluation need a step "
            "data.patches.HidePatches, after the last that changes the size"
        )
    return jnp.asarray(batch["patch_mask"])


def _sides(pixels: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a patch; ConfigError if patches do not fill the picture."""
    sides = tuple(n // m for n, m in zip(pixels, grid, strict=True))
    if any(side * m != n for side, m, n in zip(sides, grid, pixels, strict=True)):
        shown = ["x".join(map(str, size)) for size in (grid, pixels)]
        raise ConfigError(f"a patch_mask of {shown[0]} does not fit a picture of {shown[1]} pixels")
    return sides


def _patches(image: Array, mask: Array) -> jax.Array:
    """[B, H, W, 3] -> [B, h, w, pixels]: row by row, the channel fastest."""
    i, j = _sides(image.shape[1:3], mask.shape[1:])
    return rearrange(image, "b (h i) (w j) c -> b h w (i j c)", i=i, j=j)


def _on_pixels(grid: Array, size: tuple[int, int]) -> jax.Array:
    """[B, h, w, ...] -> [B, H, W, ...]: each patch's value on all of its pixels."""
    i, j = _sides(size, grid.shape[1:3])
    return jnp.repeat(jnp.repeat(grid, i, 1), j, 2)


def _uint8(levels: Array) -> jax.Array:
    return (255 * jnp.clip(levels, 0, 1) + 0.5).astype(jnp.uint8)


def _count(sums: Sums) -> float:
    count = float(sums["count"])
    if not count:
        raise DataError("there was no hidden patch to measure: no picture, or all are broken")
    return count


def covered(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] with grey in the place of the patches that are True in [h, w]."""
    i, j = (n // m for n, m in zip(image.shape[:2], mask.shape, strict=True))
    return np.where(mask.repeat(i, 0).repeat(j, 1)[..., None], np.uint8(GREY), image)


def beside(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures of one size -> one, with white between them; small ones are enlarged."""
    factor = math.ceil(SIDE / max(pictures[0].shape[:2]))
    large = [picture.repeat(factor, 0).repeat(factor, 1) for picture in pictures]
    gap = np.full((large[0].shape[0], max(large[0].shape[1] // 24, 1), 3), WHITE, np.uint8)
    parts = [part for picture in large for part in (gap, picture)]
    return np.concatenate(parts[1:], 1)
