"""scikit-learn's handwritten digits: 1,797 real pictures that come with a dependency."""

from dataclasses import dataclass

import numpy as np

from vit_jax.contracts import Dataset, Example
from vit_jax.data.share import balanced
from vit_jax.errors import ConfigError, nearest

HELD_OUT = 0.2
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Digits:
    """Digits of 8x8 pixels (Alpaydin & Kaynak 1998, UCI), grey levels 0..16 stretched to 0..255.

    Attributes:
      images: uint8 [N, 8, 8, 3].
      labels: int [N].
      places: of each example in scikit-learn's array.
      class_names: "0" to "9".
    """

    images: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    class_names: tuple[str, ...] = tuple("0123456789")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        """Such as `digits 1203`, the number in scikit-learn's array."""
        return f"digits {self.places[index]}"


def open(split: str, *, data_dir: str = "", share: float = 1.0) -> Dataset:
    """The split "train" (1,442 pictures) or "validation" (355).

    Of each class, a fifth is held out, drawn once and for all with a fixed seed; the remainder of
    the division stays in "train". Nothing is read from `data_dir`. Of "train", a `share` as of
    `data.share.balanced`.

    Raises:
      ConfigError: if there is no such split, or no such share.
    """
    if split not in SPLITS:
        raise ConfigError(f"digits has no split {split!r}.{nearest(split, SPLITS)}")
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    data = load_digits()
    rng = np.random.default_rng(0)
    held_out = np.zeros(len(data.target), bool)
    for label in range(10):
        members = np.flatnonzero(data.target == label)
        held_out[rng.permutation(members)[: int(HELD_OUT * len(members))]] = True
    if split == "validation":
        places = np.flatnonzero(held_out)
    else:
        places = np.flatnonzero(~held_out)
        places = places[balanced(data.target[places], share)]
    grey = np.rint(data.images[places] * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    return Digits(np.repeat(grey[..., None], 3, axis=-1), data.target[places], places)
