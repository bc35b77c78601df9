"""TensorFlow Datasets by name, prepared as array_record files; TensorFlow is not needed."""

import contextlib
import io
import logging
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.contracts import Dataset, Example
from vit_jax.data.geometry import Pixels, check_boxes, picture_size
from vit_jax.data.masks import Classes, check_same_size, read_mask
from vit_jax.data.share import Part, balanced
from vit_jax.errors import ConfigError, DataError, nearest

DEFAULT_DIR = "~/tensorflow_datasets"
FORMAT = "array_record"
CHUNK = 1024  # records read at once
SPLITS = {"train": ("train",), "validation": ("validation", "val", "test")}
SEGMENTATION = ("segmentation_mask", "annotation", "segmentation")  # what sets call their masks
_ADE20K = (  # Zhou et al. 2017: the benchmark's 150 classes, in their order
    "wall building sky floor tree ceiling road bed windowpane grass cabinet sidewalk person "
    "earth door table mountain plant curtain chair car water painting sofa shelf house sea "
    "mirror rug field armchair seat fence desk rock wardrobe lamp bathtub railing cushion base "
    "box column signboard chest_of_drawers counter sand sink skyscraper fireplace refrigerator "
    "grandstand path stairs runway case pool_table pillow screen_door stairway river bridge "
    "bookcase blind coffee_table toilet flower book hill bench countertop stove palm "
    "kitchen_island computer swivel_chair boat bar arcade_machine hovel bus towel light truck "
    "tower chandelier awning streetlight booth television_receiver airplane dirt_track apparel "
    "pole land bannister escalator ottoman bottle buffet poster stage van ship fountain "
    "conveyer_belt canopy washer plaything swimming_pool stool barrel basket waterfall tent bag "
    "minibike cradle oven ball food step tank trade_name microwave pot animal bicycle lake "
    "dishwasher screen blanket sculpture hood sconce vase traffic_light tray ashcan fan pier "
    "crt_screen plate monitor bulletin_board shower radiator glass clock flag"
)
ADE20K = tuple(name.replace("_", " ") for name in _ADE20K.split())
CAPTIONS = ("captions", "caption")  # what sets call their texts
CROWD = ("is_crowd", "is_difficult")  # what they call objects that nobody is blamed for
# What the values of masks mean, which their features do not say. ADE20K's 0 is anything else.
KNOWN = {
    "camvid": Classes(
        (
            *("sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence"),
            *("car", "pedestrian", "bicyclist"),
        ),
        ignored=(11,),
    ),
    "scene_parse150": Classes(ADE20K, first=1, ignored=(0,)),
}

log = logging.getLogger(__name__)


class Tfds:
    """One split of a prepared dataset whose examples have an `image` and what a task wants of it.

    That is a `label`; or `boxes`, `box_label` and, where the set has them, `crowd` and `area`; or
    `segmentation`; or `captions`, where it has those.

    Pictures are handed on as the bytes of their files. The files of records are opened by each
    process for itself, so that an instance can be pickled.

    Attributes:
      class_names: of the label's feature, of the objects', or of the values of masks.
      split: the dataset's own name of the split, such as "test" for cifar10's "validation".
    """

    def __init__(self, folder: Path, name: str, split: str, classes: Classes | None = None):
        self.folder, self.dataset, self.split = folder, name, split
        self._classes = classes
        builder = self._builder()
        features = dict(builder.info.features.items())
        self._mask = next((k for k in SEGMENTATION if k in features), "") if classes else ""
        self._decoded = [key for key in ("image", self._mask) if key]
        self._captions = _caption_key(features)
        if self._captions:
            self.class_names = ()
        elif classes:
            self.class_names = classes.names
        elif "label" in features:
            self.class_names = tuple(features["label"].names)
        else:
            self.class_names = tuple(_objects(features)["label"].names)
        self._length = builder.info.splits[split].num_examples
        self._source = None

    enough_captions = 10_000  # their pictures are read with them

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
                decoders={key: tfds.decode.SkipDecoding() for key in self._decoded},
            )
        return self._source

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Many at once: fifteen times as fast as one after the other.

        Raises:
          DataError: if a record cannot be read.
        """
        return [self._example(record) for record in self._read(indices)]

    def _read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return self._records.__getitems__([int(index) for index in indices])
        except Exception as error:  # of the reader, in C++, and of the parser
            raise DataError(f"a damaged record: {error}") from error

    def _example(self, record: dict[str, Any]) -> Example:
        image = bytes(record["image"])
        if self._captions:
            return {"image": image, "captions": self._texts(record)}
        if self._mask:
            values = read_mask(bytes(record[self._mask]))
            check_same_size(values, image)
            return {"image": image, "segmentation": self._classes.labels(values)}
        if "label" in record:
            return {"image": image, "label": int(record["label"])}
        objects = record["objects"]
        labels = np.array(objects["label"], np.int32).reshape(-1)
        wrong = labels[(labels < 0) | (labels >= len(self.class_names))]
        if len(wrong):
            raise DataError(
                f"a box has the class {wrong[0]}, but the {len(self.class_names)} classes are 0 to "
                f"{len(self.class_names) - 1}"
            )
        H, W = picture_size(image)
        # Each box is (top, left, bottom, right), as shares of the picture.
        shares = np.array(objects["bbox"], np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
        boxes, kept = check_boxes(shares * np.float32((W, H, W, H)), (H, W))
        crowd = next((np.array(objects[key], bool) for key in CROWD if key in objects), None)
        example = {"image": image, "boxes": boxes[kept], "box_label": labels[kept]}
        if crowd is not None:
            example["crowd"] = crowd.reshape(-1)[kept]
        if "area" in objects:
            example["area"] = np.array(objects["area"], np.float32).reshape(-1)[kept]
        return example

    def _texts(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """The captions of a record; DataError if there is none, or one is not UTF-8."""
        found = record[self._captions]
        found = found["text"] if isinstance(found, Mapping) else found
        found = [found] if isinstance(found, (bytes, str)) else list(found)
        try:
            texts = [t.decode() if isinstance(t, bytes) else str(t) for t in found]
        except UnicodeDecodeError as error:
            raise DataError(f"a caption is not UTF-8: {error}") from error
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise DataError("its caption is empty")
        return tuple(texts)

    def labels(self) -> np.ndarray:
        """Of all examples, int [N]; reads every record once."""
        chunks = [range(i, min(i + CHUNK, len(self))) for i in range(0, len(self), CHUNK)]
        return np.array([int(r["label"]) for chunk in chunks for r in self._read(chunk)])

    def size(self, index: int) -> Pixels:
        """(H, W) of a picture."""
        return picture_size(bytes(self._read([index])[0]["image"]))

    def name(self, index: int) -> str:
        """Such as `cifar10 test 17`."""
        return f"{self.dataset} {self.split} {index}"


def _caption_key(features: Mapping[str, Any]) -> str:
    """What holds the captions: one text, several, or several entries with a `text`."""
    import tensorflow_datasets as tfds

    def is_text(feature: Any) -> bool:
        return isinstance(feature, tfds.features.Text)

    for key in CAPTIONS:
        feature = features.get(key)
        inner = getattr(feature, "feature", feature)
        inner = inner["text"] if hasattr(inner, "keys") and "text" in inner else inner
        if is_text(inner):
            return key
    return ""


def _objects(features: Mapping[str, Any]) -> Mapping[str, Any]:
    """The features of one object; nothing where the set has no objects with boxes and classes."""
    inner = getattr(features.get("objects"), "feature", {})
    return inner if {"bbox", "label"} <= set(inner) else {}


def open(
    split: str,
    *,
    name: str,
    data_dir: str = "",
    class_names: Sequence[str] = (),
    first: int = 0,
    ignored: Sequence[int] = (),
    share: float = 1.0,
    beside: Sequence[str] = (),
) -> Dataset:
    """The split "train" or "validation" of the dataset that TFDS calls `name`.

    It has an `image`, and `captions`, or a `label` to classify it by, or `objects` with `bbox` and
    `label`, or a picture of classes: `segmentation_mask` (or `annotation`).

    "validation" is the dataset's "val", or its "test" where it has no other. A dataset that is not
    in `data_dir` ("" is ~/tensorflow_datasets) is downloaded and prepared there first.

    Args:
      split: "train" or "validation".
      name: such as "cifar10", with a configuration and a version if wanted: "ds/config:1.0.0".
      data_dir: what TFDS calls so.
      class_names: of the values of a segmentation, which TFDS does not tell; known for camvid and
        scene_parse150 (ADE20K).
      first: the value that the first of them belongs to.
      ignored: values that count as nothing; 255 always does.
      share: of "train", as of `data.share.balanced`; its labels are all read for that.
      beside: names of datasets from elsewhere, to suggest where `name` is misspelt.

    Raises:
      ConfigError: if TFDS knows no such dataset and `data_dir` has none, with the nearest names.
      DataError: if it is not there and cannot be prepared, or has nothing to learn.
    """
    if split not in SPLITS:
        raise ConfigError(f"{name} has no split {split!r}.{nearest(split, SPLITS)}")
    root = Path(data_dir or DEFAULT_DIR).expanduser()
    folder = prepared(root, name) or _prepare(root, name, beside)
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(folder).info
    features = dict(info.features.items())
    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise DataError(f"{name} in {folder} has no 'image', only {sorted(features)}")
    classes, captions = None, _caption_key(features)
    labelled = isinstance(features.get("label"), tfds.features.ClassLabel)
    if not (captions or labelled or _objects(features)):
        if not any(isinstance(features.get(key), tfds.features.Image) for key in SEGMENTATION):
            raise DataError(
                f"{name} in {folder} has no 'label' of the kind tfds.features.ClassLabel, no "
                f"'objects' with 'bbox' and 'label' and no 'segmentation_mask'; it has "
                f"{sorted(features)}"
            )
        classes = _classes(name, tuple(class_names), first, tuple(ignored))
    elif class_names or first or ignored:
        raise ConfigError(
            f"data.options: class_names, first and ignored are for pictures of classes, and {name} "
            f"has names of its own"
        )
    own = next((s for s in SPLITS[split] if s in info.splits), None)
    if own is None:
        raise DataError(f"{name} in {folder} has no {split} split, only {sorted(info.splits)}")
    if own != split:
        log.info("%s has no split %r: its %r stands in", name, split, own)
    whole = Tfds(folder, name, own, classes)
    if share == 1 or split != "train":
        return whole
    if not labelled:
        raise ConfigError(f"data.options.share={share} needs labels, and {name} has none")
    return Part(whole, balanced(whole.labels(), share))


def _classes(name: str, names: tuple[str, ...], first: int, ignored: tuple[int, ...]) -> Classes:
    known = KNOWN.get(name.split("/")[0].split(":")[0])
    if names:
        return Classes(names, first, ignored)
    if known is None:
        raise DataError(
            f"nothing says what the values of {name}'s masks are called: give "
            "data.options.class_names, one for each value"
        )
    return known


def prepared(root: Path, name: str) -> Path | None:
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
