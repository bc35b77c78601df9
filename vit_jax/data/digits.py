"""scikit-learn's handwritten digits: 1,797 real pictures that come with a dependency."""

import functools
import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

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
    images, target = _whole()
    rng = np.random.default_rng(0)
    held_out = np.zeros(len(target), bool)
    for label in range(10):
        members = np.flatnonzero(target == label)
        held_out[rng.permutation(members)[: int(HELD_OUT * len(members))]] = True
    if split == "validation":
        places = np.flatnonzero(held_out)
    else:
        places = np.flatnonzero(~held_out)
        places = places[balanced(target[places], share)]
    grey = np.rint(images[places] * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    return Digits(np.repeat(grey[..., None], 3, axis=-1), target[places], places)


@functools.cache
def _whole() -> tuple[np.ndarray, np.ndarray]:
    """All pictures, grey levels 0..16, [N, 8, 8], and their labels [N].

    Read from scikit-learn's file, since importing scikit-learn takes longer than all else here.
    """
    found = importlib.util.find_spec("sklearn")
    folders = found.submodule_search_locations if found else ()
    files = [Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders or ()]
    file = next((file for file in files if file.is_file()), None)
    if file is None:  # a version that keeps it elsewhere, or none, which says so
        from sklearn.datasets import load_digits

        data = load_digits()
        return data.images, data.target
    with gzip.open(file, "rt") as text:
        table = np.loadtxt(text, delimiter=",")  # [N, 65]
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
