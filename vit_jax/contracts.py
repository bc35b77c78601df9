"""The words two parts of the program agree on: batches, features, tasks, datasets, transforms.

A batch is a flat dictionary of arrays. The names below are the only place a format is stated:

    image         [B, H, W, 3] float32, standardised
    valid         [B] bool, False on rows that only pad the last batch or whose picture is broken
    index         [B] int64, the example's place in its dataset, -1 on padding; stays on the host
    label         [B] int32
    label_probs   [B, K] float32, the targets after mixup or cutmix
    image_mask    [B, H, W] bool, True on real pixels
    boxes         [B, M, 4] float32 (cx, cy, w, h) as fractions of the unpadded image
    box_label     [B, M] int32, -1 is padding
    segmentation  [B, H, W] int32, 255 is ignored
    tokens        [B, T] int32: start, words, end, padding; 1, ..., 2, 0 in vocabularies of our own
    patch_mask    [B, h, w] bool, True is hidden
    patch_source  [B, h, w] int32: -1 is the mask token, else the place of the patch seen there
    masks         [B, M, H, W] bool, the pixels of each object that can be seen
    stop          [B] bool, True on the rows of a process that was asked to stop; of several only

An example's `boxes` are [m, 4] float32 (x0, y0, x1, y1) in pixels; it may have `crowd` [m] bool and
`area` [m], in pixels, besides. Its `captions` are a tuple of str, of which `data.text.Tokenize`
makes `tokens`.

A model's `__call__(self, image, *, train)` names the batch entries it reads, and sees no others;
what it takes by keyword only is no batch entry.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray
Batch = dict[str, Array]
Example = dict[str, Any]
Outputs = Any  # what the model's docstring says: logits [B, K] for a classifier
Sums = dict[str, Array]  # numbers that add over batches and hosts; "count" is what divides the loss
Predictions = dict[str, Array]  # arrays whose first axis is the batch
Transform = Callable[[Example, np.random.Generator], Example]

HOST_KEYS = frozenset({"index"})  # batch entries that never travel to the device
ROW_AXES = ("data", "fsdp")  # axes of the mesh that split a batch


@flax.struct.dataclass
class Features:
    """What every backbone returns, so that any head can stand on it.

    Attributes:
      maps: feature maps [B, h, w, C], fine to coarse.
      pooled: the global description [B, C]: a class token or a mean.
    """

    maps: tuple[Array, ...]
    pooled: Array


@runtime_checkable
class Dataset(Protocol):
    """A deterministic sequence of examples, in numpy.

    An example holds `image` (uint8 [H, W, 3], or the bytes of a picture file, decoded later) and
    what the task wants, such as `label`. Reading a broken example raises `DataError`. A dataset of
    pictures of several sizes may tell that of one without decoding it, `size(index)` -> (H, W), and
    one of boxes its picture with most of them, `fullest()` -> (index, count); one of captions those
    of an example without its picture, `captions(index)`, and how many examples tell as much as all,
    `enough_captions`; any the `order(rng)` in which an epoch reads it, a permutation.

    Attributes:
      class_names: one name for each label.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def name(self, index: int) -> str:
        """What a person calls the example: a file's path, or the dataset's name and the index."""
        ...


class Task(Protocol):
    """What to learn and how to measure it: a frozen dataclass of plain numbers.

    Attributes:
      headline: the number that ranks checkpoints; lower is better if it ends in "loss".
      wants_results: whether `summarize` needs the predictions of a whole split.
      cell: pixels on a side that a drawn picture needs, to be made out.

    A task that compares the rows of a batch with each other says so by `whole_batch = True`: its
    batch is never computed in parts.
    """

    headline: str
    wants_results: bool
    cell: int

    def score(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, Sums]:
        """The mean loss over the valid rows, and sums that add; `count` divides the loss."""
        ...

    def predict(self, outputs: Outputs, batch: Batch) -> Predictions:
        """What a person reads: labels with probabilities, boxes, masks, captions."""
        ...

    def summarize(
        self, sums: Sums, results: Iterable[tuple[Predictions, Example]] | None = None
    ) -> dict[str, float]:
        """Sums of a whole split -> numbers: the only place where a ratio is taken.

        `results` are, where they are wanted, the prediction of each example and the example as its
        dataset gives it, at its own size.
        """
        ...

    def draw(
        self, image: np.ndarray, example: Example, prediction: Predictions, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str, bool | None]:
        """One uint8 picture with its prediction -> (picture, title, whether it is right).

        None where nothing is right or wrong.
        """
        ...

    def draw_target(
        self, image: np.ndarray, row: Batch, names: tuple[str, ...]
    ) -> tuple[np.ndarray, str]:
        """A batch's picture, uint8 [H, W, 3], with what its row is to teach -> (picture, title)."""
        ...
