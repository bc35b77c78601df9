"""Which patches of a picture are hidden from a model that is to restore them."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vit_jax.contracts import Example
from vit_jax.errors import ConfigError, nearest

WAYS = ("token", "mixed")


@dataclass(frozen=True)
class HidePatches:
    """Draws the patches to hide, as many of each picture, after the last step that resizes.

    Each set of squares of that number is as likely as any other: He et al. 2022
    (arXiv:2111.06377), section 3; Xie et al. 2022 (arXiv:2111.09886), section 3.2, whose squares
    are larger than the patches.

    Adds `patch_mask` bool [h, w], True is hidden; and with the way "mixed" `patch_source` int32
    [h, w]: which patch of the picture, row by row, is to be seen in each place, -1 for none, where
    a learned token stands. Patches that are not hidden have their own place there.

    Attributes:
      patch: side of the model's patches, in pixels.
      ratio: share of the squares, rounded up to whole ones.
      unit: side of the squares that are hidden as a whole, a multiple of `patch`; 0 is `patch`.
      way: what is seen of a hidden patch: "token"; or "mixed", Dosovitskiy et al. 2021
        (arXiv:2010.11929), appendix B.1.2: the token for 80 % of them, another patch of the picture
        for 10 %, and the patch itself for the rest.
    """

    patch: int
    ratio: float = 0.75
    unit: int = 0
    way: str = "token"

    SHARES: ClassVar[tuple[float, float]] = (0.8, 0.9)  # below the first a token, then another

    def __post_init__(self):
        if not 0 < self.ratio < 1:
            raise ValueError(
                f"a mask ratio of {self.ratio} hides {'all' if self.ratio >= 1 else 'nothing'}: it "
                "must lie between 0 and 1, both excluded"
            )
        if self.patch < 1 or self.unit % self.patch or self.unit < 0:
            raise ValueError(
                f"unit={self.unit} must be a multiple of patch={self.patch}, which must be above 0"
            )
        if self.way not in WAYS:
            raise ValueError(f"way={self.way!r} does not exist.{nearest(self.way, WAYS)}")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`image` [H, W, 3] -> the same with `patch_mask`, and `patch_source` where it is mixed.

        Raises:
          ConfigError: if squares do not divide the image, or all of them would be hidden.
        """
        unit = self.unit or self.patch
        H, W = example["image"].shape[:2]
        if H % unit or W % unit:
            raise ConfigError(
                f"HidePatches: squares of {unit} pixels must divide the image, which has {H} x {W} "
                "(height x width)"
            )
        squares = (H // unit) * (W // unit)
        # A little below: in floating point 0.14 of 50 is above 7.
        count = math.ceil(squares * self.ratio - 1e-6)
        if count >= squares:
            raise ConfigError(
                f"HidePatches: a ratio of {self.ratio} hides all {squares} squares of {unit} "
                f"pixels; at most {squares - 1}/{squares} leaves one"
            )
        flat = np.zeros(squares, bool)
        flat[rng.permutation(squares)[:count]] = True
        fine = unit // self.patch
        mask = flat.reshape(H // unit, W // unit).repeat(fine, 0).repeat(fine, 1)  # [h, w]
        hidden = {"patch_mask": mask}
        if self.way == "mixed":
            hidden["patch_source"] = self._source(mask, rng)
        return example | hidden

    def _source(self, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[h, w]: -1, another place, or its own."""
        own = np.arange(mask.size, dtype=np.int32)
        drawn = rng.random(mask.size)
        # Any place but its own: steps around the circle of all.
        other = (own + rng.integers(1, max(mask.size, 2), mask.size)) % mask.size
        token, swapped = self.SHARES
        source = np.where(drawn < token, -1, np.where(drawn < swapped, other, own))
        return np.where(mask.reshape(-1), source, own).astype(np.int32).reshape(mask.shape)
