"""A share of a dataset's examples, as many of each class: what is learned from few labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vit_jax.contracts import Dataset, Example
from vit_jax.data.geometry import Pixels
from vit_jax.errors import ConfigError

SEED = 0


def balanced(labels: np.ndarray, share: float) -> np.ndarray:
    """Places of a share of the examples, sorted; the same each time, and a larger share has them
    all.

    Of each class as many as of any other, at least one, but no more than it has.

    Args:
      labels: int [N].
      share: above 0, and at most 1, which is all examples.

    Raises:
      ConfigError: if the share is none.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"data.options.share={share} must be above 0, and at most 1")
    if share == 1:
        return np.arange(len(labels))
    classes = np.unique(labels)
    each = max(round(share * len(labels) / len(classes)), 1)
    chosen = []
    for label in classes:
        # A stream of its own: how many others there are changes nothing.
        rng = np.random.default_rng([SEED, int(label)])
        chosen.append(rng.permutation(np.flatnonzero(labels == label))[:each])
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Part:
    """Some examples of a dataset that reads them when asked.

    Attributes:
      dataset: the whole, which reads many at once.
      places: of the examples in it.
    """

    dataset: Dataset
    places: np.ndarray

    @property
    def class_names(self) -> tuple[str, ...]:
        """The whole's."""
        return self.dataset.class_names

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[int(self.places[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        return self.dataset.__getitems__([int(self.places[index]) for index in indices])

    def name(self, index: int) -> str:
        """The whole's name of the example."""
        return self.dataset.name(int(self.places[index]))

    def size(self, index: int) -> Pixels:
        """(H, W) of a picture."""
        return self.dataset.size(int(self.places[index]))
