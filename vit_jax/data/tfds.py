"""TensorFlow Datasets by name, prepared as array_record files; TensorFlow is not needed."""

import contextlib
import io
import logging
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax.contracts import Dataset, Example
from vit_jax.errors import ConfigError, DataError, nearest

DEFAULT_DIR = "~/tensorflow_datasets"
FORMAT = "array_record"
SPLITS = {"train": ("train",), "validation": ("validation", "test")}

log = logging.getLogger(__name__)


class Tfds:
    """One split of a prepared dataset whose examples have an `image` and a `label`.

    Pictures are handed on as the bytes of their files. The files of records are opened by each
    process for itself, so that an instance can be pickled.

    Attributes:
      class_names: of the label's feature.
      split: the dataset's own name of the split, such as "test" for cifar10's "validation".
    """

    def __init__(self, folder: Path, name: str, split: str):
        self.folder, self.dataset, self.split = folder, name, split
        builder = self._builder()
        self.class_names = tuple(builder.info.features["label"].names)
        self._length = builder.info.splits[split].num_examples
        self._source = None

    def _builder(self):
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    def __len__(self) -> int:
        return self._length

    @property
    def _records(self):
        if self._source is None:
            import tensorflow_datasets as tfds

            self._source = self._builder().as_data_source(
                split=self.split,
                decoders={"image": tfds.decode.SkipDecoding()},
            )
        return self._source

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Many at once: fifteen times as fast as one after the other.

        Raises:
          DataError: if a record cannot be read.
        """
        try:
            records = self._records.__getitems__([int(index) for index in indices])
        except Exception as error:  # of the reader, in C++, and of the parser
            raise DataError(f"a damaged record: {error}") from error
        return [{"image": bytes(r["image"]), "label": int(r["label"])} for r in records]

    def name(self, index: int) -> str:
        """Such as `cifar10 test 17`."""
        return f"{self.dataset} {self.split} {index}"


def open(split: str, *, name: str, data_dir: str = "", beside: Sequence[str] = ()) -> Dataset:
    """The split "train" or "validation" of the dataset that TFDS calls `name`.

    "validation" is the dataset's "test" where it has no other. A dataset that is not in `data_dir`
    ("" is ~/tensorflow_datasets) is downloaded and prepared there first.

    Args:
      split: "train" or "validation".
      name: such as "cifar10", with a configuration and a version if wanted: "ds/config:1.0.0".
      data_dir: what TFDS calls so.
      beside: names of datasets from elsewhere, to suggest where `name` is misspelt.

    Raises:
      ConfigError: if TFDS knows no such dataset and `data_dir` has none, with the nearest names.
      DataError: if it is not there and cannot be prepared, or has no picture with a label.
    """
    if split not in SPLITS:
        raise ConfigError(f"{name} has no split {split!r}.{nearest(split, SPLITS)}")
    root = Path(data_dir or DEFAULT_DIR).expanduser()
    folder = _prepared(root, name) or _prepare(root, name, beside)
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(folder).info
    for feature, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if feature not in info.features or not isinstance(info.features[feature], kind):
            raise DataError(
                f"{name} in {folder} has no {feature!r} of the kind tfds.features.{kind.__name__}, "
                f"which classification needs; it has {sorted(info.features)}"
            )
    own = next((s for s in SPLITS[split] if s in info.splits), None)
    if own is None:
        raise DataError(f"{name} in {folder} has no {split} split, only {sorted(info.splits)}")
    if own != split:
        log.info("%s has no split %r: its %r stands in", name, split, own)
    return Tfds(folder, name, own)


def _prepared(root: Path, name: str) -> Path | None:
    """The newest prepared version below `root`; None if there is none."""
    path, _, version = name.partition(":")
    infos = (root / path).glob(f"{version or '*'}/dataset_info.json")
    found = [info.parent for info in infos if info.parent.name.replace(".", "").isdigit()]
    return max(found, key=lambda f: [int(n) for n in f.name.split(".")], default=None)


def _prepare(root: Path, name: str, beside: Sequence[str]) -> Path:
    """Downloads and prepares a dataset; its folder."""
    import tensorflow_datasets as tfds

    with _quiet():
        names = tfds.list_builders(with_community_datasets=False)
    base = name.split("/")[0].split(":")[0]
    if base not in names:
        here = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
        raise ConfigError(
            f"data.name={name!r} is no dataset of vit_jax.data or of TFDS, and not in {root}."
            f"{nearest(base, [*names, *here, *beside])}"
        )
    try:
        _check_network()
        with _quiet():
            builder = tfds.builder(name, data_dir=root, file_format=FORMAT)
            builder.download_and_prepare(file_format=FORMAT)
    except (Exception, SystemExit) as error:  # network, disk, TensorFlow, licence: each its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name} is not prepared in data_dir={root}, and could not be downloaded ({reason}). "
            f"Copy it there as {root / base}/VERSION in array_record form, or prepare it where "
            f"there is a network: tfds build {name} --file_format={FORMAT}"
        ) from error
    return Path(builder.data_dir)


def _check_network() -> None:
    """OSError where no name resolves: the downloads would retry that for ten minutes."""
    if not urllib.request.getproxies():
        socket.getaddrinfo("www.tensorflow.org", 443)


@contextlib.contextmanager
def _quiet():
    """Keeps what TFDS prints about a missing TensorFlow away from a person who needs none."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
