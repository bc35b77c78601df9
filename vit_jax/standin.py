"""Blank pictures in the place of a dataset, for those who want to know only what it costs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.errors import ConfigError

# Training examples, held-out ones, classes: ILSVRC 2012 (Russakovsky et al. 2015, table 2), CIFAR
# (Krizhevsky 2009), ADE20K's benchmark (Zhou et al. 2017), COCO 2017 (Lin et al. 2014), and those
# of the TFDS catalogue.
KNOWN = {
    "imagenet2012": (1_281_167, 50_000, 1000),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "camvid": (367, 101, 11),
    "scene_parse150": (20_210, 2_000, 150),
    "bccd": (205, 87, 3),
    "coco": (118_287, 5_000, 80),
}
MADE_HERE = ("digits", "scenes")  # datasets that need no files


class StandIn:
    """Blank pictures of one size, as many as a dataset has: shapes are all that is read of them."""

    def __init__(self, examples: int, classes: int, task: str):
        self.class_names = tuple(f"class {i}" for i in range(classes))
        self._examples, self._task = examples, task

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = {"image": np.zeros((480, 640, 3), np.uint8)}
        if self._task == "detection":
            boxes = np.array([[100, 100, 200, 200]], np.float32)
            return image | {"boxes": boxes, "box_label": np.zeros(1, np.int32)}
        if self._task == "segmentation":
            return image | {"segmentation": np.zeros((480, 640), np.int32)}
        if self._task in ("contrastive", "captioning"):
            return image | {"captions": ("a picture",)}
        return image | {"label": 0}

    def name(self, index: int) -> str:
        """What a person calls the example."""
        return f"stand-in {index}"


def splits_of(
    config: Mapping[str, Any], examples: int | None = None, classes: int | None = None
) -> tuple[list[Any] | None, str]:
    """Datasets to stand in for those of a config, and what to say of them; nothing is downloaded.

    None leaves it to `run.set_up` to open what the config names.

    Raises:
      ConfigError: if it is not known how many examples and classes there are.
    """
    name = config["data"]["name"]
    task = config["task"]["target"].split(".")[1]
    known = KNOWN.get(name.partition("/")[0].partition(":")[0])
    openable = name in MADE_HERE or config["data"]["data_dir"]
    if examples is None and classes is None and known is None and openable:
        return None, ""
    if known is None and (examples is None or classes is None):
        raise ConfigError(
            f"data.name={name!r} is not among the datasets whose sizes are known "
            f"({', '.join(KNOWN)}): say --examples=N and --classes=K"
        )
    train, held_out, known_classes = known or (0, 0, 0)
    train = train if examples is None else examples
    held_out = held_out or max(train // 25, 1)
    classes = known_classes if classes is None else classes
    remark = f"blank pictures stand in for {name}: {train:,} examples, {classes:,} classes"
    return [StandIn(n, classes, task) for n in (train, held_out)], remark
