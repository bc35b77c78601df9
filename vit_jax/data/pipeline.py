"""From a dataset to batches, by Grain: a batch is a function of the seed and the step alone."""

import dataclasses
import importlib
import inspect
import itertools
import pkgutil
import sys
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

import vit_jax.data
from vit_jax import children
from vit_jax.contracts import Batch, Dataset, Example, Transform
from vit_jax.data import tfds
from vit_jax.data import transforms as of_pictures
from vit_jax.data.decode import MAX_PIXELS, decode
from vit_jax.data.geometry import (
    OBJECTS,
    Pad,
    Pixels,
    check_boxes,
    check_labels,
    picture_size,
)
from vit_jax.data.text import Tokenize
from vit_jax.errors import ConfigError, DataError, nearest

READY = 2  # batches that are made in advance
BLANK = (256, 256, 3)  # a picture's shape where none can be read
TRIED = 16  # examples among which to look for a picture that can be read
FOREVER = sys.maxsize // 4
ROWS, PAIRS, EVALUATION, ORDER = range(4)  # independent streams of randomness
# Steps that move a picture and leave what lies on it where it was.
PICTURE_ONLY = (
    of_pictures.Resize,
    of_pictures.ResizeCenterCrop,
    of_pictures.CenterCrop,
    of_pictures.RandomResizedCrop,
    of_pictures.RandomCrop,
    of_pictures.RandomFlip,
    of_pictures.RandAugment,
)
ON_PICTURE = ("boxes", "masks", "segmentation")


def open_dataset(name: str, split: str, data_dir: str = "", **options: Any) -> Dataset:
    """The split "train" or "validation" of a dataset.

    Args:
      name: a module of `vit_jax.data` that defines `open`, such as "digits" or "folder"; any other
        name is a dataset of TFDS, such as "cifar10".
      split: which one.
      data_dir: where the data lies.
      **options: what that module's `open` takes besides.

    Raises:
      ConfigError: if there is no such dataset or option, with the nearest names.
      DataError: if the data is missing, empty or broken.
    """
    own = [info.name for info in pkgutil.iter_modules(vit_jax.data.__path__)]
    own = {n: importlib.import_module(f"vit_jax.data.{n}") for n in own}
    own = {n: module for n, module in own.items() if hasattr(module, "open") and module != tfds}
    accepted = set(inspect.signature(own.get(name, tfds).open).parameters)
    accepted -= {"split", "data_dir", "name", "beside"}
    for option in options:
        if option not in accepted:
            hint = nearest(option, accepted) or " It has none."
            raise ConfigError(f"data.options: {name} has no option {option!r}.{hint}")
    if name in own:
        return own[name].open(split, data_dir=data_dir, **options)
    return tfds.open(split, name=name, data_dir=data_dir, beside=tuple(own), **options)


def decoded(example: Example, max_pixels: int | None = None) -> Example:
    """The example with its `image` as uint8 [H, W, 3]; `max_pixels` None is `decode`'s own limit.

    Raises:
      DataError: if the picture cannot be decoded.
    """
    image = example["image"]
    if isinstance(image, bytes):
        image = decode(image, max_pixels=MAX_PIXELS if max_pixels is None else max_pixels)
    return example | {"image": image}


def size_of(dataset: Dataset, index: int) -> Pixels:
    """(H, W) of a picture: as the dataset knows it, else from its header.

    Raises:
      DataError: if it cannot be read.
    """
    if hasattr(dataset, "size"):
        return dataset.size(index)
    return picture_size(dataset[index]["image"])


def train_batches(
    dataset: Dataset,
    transforms: Sequence[Transform],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    mix: Transform | None = None,
    max_pixels: int | None = None,
    threads: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Batches for ever: each epoch sees each example once, in an order of its own.

    Example n of the stream, counted over all epochs, is a function of (seed, n): so the batches do
    not depend on threads, workers, hosts or on where the stream starts. Host p of P gets rows
    [p B/P, (p + 1) B/P) of each global batch of B.

    Args:
      dataset: where the examples come from.
      transforms: applied one after the other; the last result has a fixed size, or the last of
        them is `data.geometry.Pad`, which makes a batch of pictures of different sizes.
      batch_size: B, over all hosts.
      seed: 0 to 2**32 - 1.
      start_step: number of the first batch; any costs the same.
      mix: called on each pair of rows 2i, 2i + 1, such as `MixUpCutMix`.
      max_pixels: larger pictures count as broken; None is the limit of `decode`.
      threads: that decode and transform; 0 makes each batch when it is asked for.
      workers: processes that do so, with a share of the threads each; 0 is this process alone.
      process_index: p.
      process_count: P.

    Returns:
      An iterator; `close()` ends its threads and processes. A batch has `image`, `label` and what
      else the examples hold, `index` (in the dataset), `valid` (False where the picture is broken:
      its row is all zeros, see `broken`), and what `mix` adds. With `Pad`, what that says, in the
      smallest of its shapes that holds every row of the global batch: each host works that out
      from the sizes of all its pictures, which `dataset.size(index)` tells, or the files' headers.

    Raises:
      ConfigError: if the sizes do not fit, or a transform would leave boxes or masks behind; while
        iterating, if pictures of different sizes meet, or one does not fit `Pad`.
      DataError: if the dataset is empty, or, with `Pad`, the first pictures are all broken; while
        iterating, naming the picture, if a class is beyond `class_names`, a box is inverted or not
        finite, or masks are not of the picture's size.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r} must lie between 0 and 2**32 - 1")
    rows = _rows_of_host(batch_size, process_count)
    if mix is not None and rows % 2:
        raise ConfigError(
            f"batch_size={batch_size} over {process_count} hosts is {rows} rows each, but mixing "
            f"pairs of rows needs an even number: try {batch_size + process_count}"
        )
    template = _template(dataset, transforms, mix, max_pixels)
    batches = _Batches(
        dataset=dataset,
        transforms=_before_pad(transforms),
        rows=rows,
        stride=batch_size,
        first=process_index * rows,
        seed=seed,
        shuffled=True,
        mix=mix,
        max_pixels=max_pixels,
        threads=-(-threads // max(workers, 1)),
        template=template,
        pad=padding(transforms, dataset),
    )
    return _iterate(batches, start_step, threads > 0, workers)


def eval_batches(
    dataset: Dataset,
    transforms: Sequence[Transform],
    *,
    batch_size: int,
    max_pixels: int | None = None,
    threads: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every example exactly once, in order; then it ends.

    The last batch is as large as the others, padded with rows of zeros whose `valid` is False and
    whose `index` is -1; every host gets the same number of batches. Arguments, results and errors
    are those of `train_batches`.
    """
    rows = _rows_of_host(batch_size, process_count)
    template = _template(dataset, transforms, None, max_pixels)
    batches = _Batches(
        dataset=dataset,
        transforms=_before_pad(transforms),
        rows=rows,
        stride=batch_size,
        first=process_index * rows,
        seed=0,
        shuffled=False,
        mix=None,
        max_pixels=max_pixels,
        threads=-(-threads // max(workers, 1)),
        template=template,
        pad=padding(transforms, dataset),
    )
    return _iterate(batches, 0, threads > 0, workers)


def broken(batch: Batch, dataset: Dataset, max_pixels: int | None = None) -> list[str]:
    """For each row whose picture is broken, its name and why: `cats/a.jpg: the file is empty`."""
    texts = []
    for row in np.flatnonzero((batch["index"] >= 0) & ~batch["valid"]):
        index = int(batch["index"][row])
        try:
            decoded(dataset[index], max_pixels)
            reason = "could not be read, but can be now"
        except DataError as error:
            reason = str(error)
        texts.append(f"{dataset.name(index)}: {reason}")
    return texts


def _rows_of_host(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"batch_size={batch_size} must be a multiple of the {process_count} hosts, such as "
            f"{max(batch_size // process_count, 1) * process_count}"
        )
    return batch_size // process_count


def _random(seed: int, stream: int, position: int) -> np.random.Generator:
    """The chance of one place in a stream."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, position]))


def padding(transforms: Sequence[Transform], dataset: Dataset | None = None) -> Pad | None:
    """The last step, if it is `Pad`; with a dataset, with room for its objects.

    Raises:
      ConfigError: if a picture of the dataset has more objects than `Pad` is told.
    """
    pad = transforms[-1] if transforms and isinstance(transforms[-1], Pad) else None
    return pad.fitted(dataset) if pad and dataset is not None else pad


def _before_pad(transforms: Sequence[Transform]) -> tuple[Transform, ...]:
    """All steps but `Pad`; ConfigError if that is not the last, or its shapes cannot be chosen."""
    pad = padding(transforms)
    steps = tuple(transforms[:-1] if pad else transforms)
    if any(isinstance(step, Pad) for step in steps):
        raise ConfigError("Pad must be the last of the transforms")
    if pad and len(pad.shapes) > 1:
        moving = [step for step in steps if not isinstance(step, Tokenize)]
        known = [hasattr(step, "sized") for step in moving]
        if not all(known[: sum(known)]):
            late, early = known.index(True, known.index(False)), known.index(False)
            raise ConfigError(
                f"{type(moving[late]).__name__} must come before {type(moving[early]).__name__}: "
                "Pad chooses among several shapes by the sizes that come out of the first steps"
            )
    return steps


def _template(
    dataset: Dataset, transforms: Sequence[Transform], mix: Transform | None, max_pixels: int | None
) -> Example | dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of a row of each entry, read off the first picture that is not broken.

    With `Pad`, which knows them, that example itself, without its arrays.
    """
    if not len(dataset):
        raise DataError("the dataset has no examples")
    pad, reason = padding(transforms), ""
    example: Example = {"image": np.zeros(BLANK, np.uint8), "label": 0}
    for index in range(min(len(dataset), TRIED)):
        try:
            example = decoded(dataset[index], max_pixels)
            break
        except DataError as error:
            reason = reason or f"{dataset.name(index)}: {error}"
    else:
        if pad is not None:
            raise DataError(f"none of the first {index + 1} pictures can be read. {reason}")
    _check_moves(example, transforms)
    _before_pad(transforms)
    if pad is not None:
        if mix is not None:
            raise ConfigError(f"{type(mix).__name__} cannot mix pictures of different sizes (Pad)")
        for key, wanted in (("boxes", pad.boxes), ("masks", pad.masks)):
            if wanted and key not in example:
                raise ConfigError(f"Pad's {key}={wanted}, and the dataset has no {key}")
        tokens = _tokens(example, transforms)
        return dict.fromkeys(example) | tokens
    rng = _random(0, ROWS, 0)
    for transform in transforms:
        example = transform(example, rng)
    row = {k: np.asarray(v) for k, v in example.items() if not _is_text(v)}
    row["valid"] = np.array(True)
    if "label" in row:
        row["label"] = row["label"].astype(np.int32)
    elif mix is not None:
        raise ConfigError(f"{type(mix).__name__} mixes labels, and the dataset has none")
    if mix is not None:
        pair = mix({k: np.stack([v, v]) for k, v in row.items()}, rng)
        row = {k: v[0] for k, v in pair.items()}
    return {k: (v.shape, v.dtype) for k, v in (row | {"index": np.int64(0)}).items()}


def _tokens(example: Example, transforms: Sequence[Transform]) -> Example:
    """The `tokens` that a step makes of the example's captions; nothing where there is none."""
    for step in transforms:
        if isinstance(step, Tokenize):
            return {"tokens": step(example, _random(0, ROWS, 0))["tokens"]}
    return {}


def _is_text(value: Any) -> bool:
    """Whether an example's entry is words, which have no place in a batch."""
    return isinstance(value, str) or (
        isinstance(value, (tuple, list)) and any(isinstance(item, str) for item in value)
    )


def _check(example: Example, dataset: Dataset, index: int) -> None:
    """DataError, with the picture's name, for what no skipping of single pictures would mend."""
    try:
        check_labels(example, len(dataset.class_names))
        if "boxes" in example:
            check_boxes(example["boxes"], example["image"].shape[:2])
            _check_counts(example)
        for key in ("masks", "segmentation"):
            if key in example and example[key].shape[-2:] != example["image"].shape[:2]:
                H, W = example[key].shape[-2:]
                raise DataError(
                    f"its {key} have {H} x {W} pixels (height x width), and the picture "
                    f"{example['image'].shape[0]} x {example['image'].shape[1]}"
                )
    except DataError as error:
        raise DataError(f"{dataset.name(index)}: {error}") from error


def _check_counts(example: Example) -> None:
    counts = {key: len(example[key]) for key in OBJECTS if key in example}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} {key}" for key, count in counts.items())
        raise DataError(f"its objects are not told one by one: it has {shown}")


def _check_moves(example: Example, transforms: Sequence[Transform]) -> None:
    """ConfigError if a step would move the picture away under its boxes or masks."""
    lying = [key for key in ON_PICTURE if key in example]
    for transform in transforms if lying else ():
        if isinstance(transform, PICTURE_ONLY):
            name = type(transform).__name__
            raise ConfigError(
                f"data.transforms.{name} moves the picture and not its {lying[0]}: take a step of "
                "data.geometry, such as Resize, ResizeShortSide, ScaleJitterCrop or RandomFlip"
            )


@dataclasses.dataclass
class _Batches:
    """Batch n of one host, by its number: what Grain prefetches and spreads over processes."""

    dataset: Dataset
    transforms: tuple[Transform, ...]
    rows: int  # of this host
    stride: int  # rows of all hosts
    first: int  # this host's first row
    seed: int
    shuffled: bool
    mix: Transform | None
    max_pixels: int | None
    threads: int
    template: Example | dict[str, tuple[tuple[int, ...], np.dtype]]
    pad: Pad | None = None

    def __post_init__(self):
        self._sizes: dict[int, Pixels | None] = {}  # of pictures, as their headers say
        self._orders: dict[int, np.ndarray] = {}  # of the last few epochs
        self._pool = None
        if self.threads:  # they start with the first batch
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="vit-jax-data")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def __len__(self) -> int:
        return FOREVER if self.shuffled else -(-len(self.dataset) // self.stride)

    def __getitem__(self, number: int) -> Batch:
        start = int(number) * self.stride + self.first
        indices = self._indices(start, self.rows)
        batch = self._empty(int(number)) | {"index": indices}
        # Parts are of whole pairs, and more than one a thread, since pictures differ in cost.
        size = max(-(-self.rows // (2 * max(self.threads, 1))), 16)
        size += size % 2
        parts = [slice(row, row + size) for row in range(0, self.rows, size)]
        run = self._pool.map if self._pool and len(parts) > 1 else map
        list(run(lambda part: self._fill(batch, part, start), parts))
        return batch

    def close(self) -> None:
        """Ends the threads; what they have not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _empty(self, number: int) -> Batch:
        """Rows that hold nothing."""
        if self.pad is not None:
            batch = self.pad.empty(self.rows, self._shape(number), self.template)
            return batch | {"valid": np.zeros(self.rows, bool)}
        return {
            key: np.zeros((self.rows, *shape), dtype)
            for key, (shape, dtype) in self.template.items()
        }

    def _shape(self, number: int) -> Pixels:
        """Of a batch, over all hosts: what its pictures' sizes become, without their pixels."""
        if len(self.pad.shapes) == 1:
            return tuple(self.pad.shapes[0])
        start, sizes = number * self.stride, []
        stream = ROWS if self.shuffled else EVALUATION
        for place, index in enumerate(self._indices(start, self.stride), start):
            size = self._size(int(index)) if index >= 0 else None
            if size is None:
                continue
            rng = _random(self.seed, stream, place)
            for transform in self.transforms:
                size = transform.sized(size, rng) if hasattr(transform, "sized") else size
            self.pad.check(size, self.dataset.name(int(index)))
            sizes.append(size)
        return self.pad.shape(sizes)

    def _size(self, index: int) -> Pixels | None:
        """Of a picture before the transforms; None if it is broken."""
        if index not in self._sizes:
            try:
                self._sizes[index] = size_of(self.dataset, index)
            except DataError:
                self._sizes[index] = None
        return self._sizes[index]

    def _indices(self, start: int, rows: int) -> np.ndarray:
        """Which examples stand from that place of the stream on; -1 after the end."""
        count, places = len(self.dataset), start + np.arange(rows)
        if not self.shuffled:
            return np.where(places < count, places, -1)
        epochs = places // count
        parts = [self._order(int(e))[places[epochs == e] % count] for e in np.unique(epochs)]
        return np.concatenate(parts)

    def _order(self, epoch: int) -> np.ndarray:
        # Not Grain's index shuffle, which needs no memory but milliseconds an index where a
        # dataset is small: this is 8 bytes an example, and milliseconds an epoch.
        order = self._orders.get(epoch)
        if order is None:
            rng = _random(self.seed, ORDER, epoch)
            if hasattr(self.dataset, "order"):
                order = self.dataset.order(rng)
            else:
                order = rng.permutation(len(self.dataset))
            self._orders = dict([*self._orders.items()][-READY:]) | {epoch: order}
        return order

    def _fill(self, batch: Batch, part: slice, start: int) -> None:
        """Makes the rows of `part` in place."""
        indices = batch["index"][part]
        stream = ROWS if self.shuffled else EVALUATION
        for row, read in zip(range(part.start, part.start + len(indices)), self._read(indices)):
            # An exception here would lose the batch: a broken picture is a row of zeros.
            if isinstance(read, DataError) or read is None:
                continue
            rng = _random(self.seed, stream, start + row)
            try:
                example, transforms = self._opened(read, rng)
            except DataError:
                continue
            _check(example, self.dataset, int(batch["index"][row]))
            for transform in transforms:
                example = transform(example, rng)
            if self.pad is not None:
                name = self.dataset.name(int(batch["index"][row]))
                self.pad.put(batch, row, example, name)
            else:
                self._put(batch, row, example)
            batch["valid"][row] = True
        if self.mix is not None:
            for row in range(part.start, part.start + len(indices), 2):
                pair = {key: value[row : row + 2] for key, value in batch.items()}
                rng = _random(self.seed, PAIRS, (start + row) // 2)
                for key, value in self.mix(pair, rng).items():
                    batch[key][row : row + 2] = value

    def _opened(
        self, read: Example, rng: np.random.Generator
    ) -> tuple[Example, tuple[Transform, ...]]:
        """The example with a picture, and the transforms left to do.

        A step that cuts a part out of the picture may read its file itself, to decode less of it.
        What lies on the picture never comes with such a step (`_check_moves`).
        """
        file, first = read["image"], self.transforms[:1]
        if isinstance(file, bytes) and first and hasattr(first[0], "from_file"):
            limit = MAX_PIXELS if self.max_pixels is None else self.max_pixels
            return read | {"image": first[0].from_file(file, rng, limit)}, self.transforms[1:]
        return decoded(read, self.max_pixels), self.transforms

    def _read(self, indices: np.ndarray) -> list[Example | DataError | None]:
        """Examples as the dataset has them; None for padding."""
        wanted = [int(index) for index in indices if index >= 0]
        read: list[Example | DataError | None] = []
        if hasattr(self.dataset, "__getitems__"):
            try:
                read = list(self.dataset.__getitems__(wanted)) if wanted else []
            except DataError:
                read = []  # one of them is broken: find out which
        if len(read) != len(wanted):
            read = [self._read_one(index) for index in wanted]
        return read + [None] * (len(indices) - len(read))  # only the end is padded

    def _read_one(self, index: int) -> Example | DataError:
        try:
            return self.dataset[index]
        except DataError as error:
            return error

    def _put(self, batch: Batch, row: int, example: Example) -> None:
        for key, value in example.items():
            if _is_text(value):
                continue
            shape = np.shape(value)
            if shape != batch[key].shape[1:]:
                name = self.dataset.name(int(batch["index"][row]))
                raise ConfigError(
                    f"{key} of {name} has shape {list(shape)} and others "
                    f"{list(batch[key].shape[1:])}: the transforms must end in a fixed size, as "
                    "with Resize(size=(H, W)), ResizeCenterCrop, RandomCrop or RandomResizedCrop"
                )
            batch[key][row] = value


def _iterate(batches: _Batches, start: int, ahead: bool, workers: int) -> Iterator[Batch]:
    # Threads of ours do what OpenCV's own would do, without two pools fighting for the cores.
    cv2.setNumThreads(0)
    dataset = grain.MapDataset.source(batches)[start:]
    options = grain.ReadOptions(
        num_threads=READY if ahead else 0, prefetch_buffer_size=READY if ahead else 0
    )
    stream = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain hands its flags on to the processes it starts
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers)
        stream = stream.mp_prefetch(processes, worker_init_fn=_start_worker)
    iterator = iter(stream)
    # Once, at the latest before the interpreter takes apart what closing needs.
    close = weakref.finalize(iterator, _close, iterator, batches)
    try:
        if workers:
            with children.starting():
                first = list(itertools.islice(iterator, workers))
            yield from first
        yield from iterator
    finally:
        close()


def _close(iterator: grain.DatasetIterator, batches: _Batches) -> None:
    iterator.close()
    batches.close()


def _start_worker(*_: int) -> None:
    """Leaves signals to the parent, and ends with it even if it is killed."""
    children.ignore_signals()
    children.end_with_parent()
    cv2.setNumThreads(0)
