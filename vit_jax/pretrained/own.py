"""Run folders of `vit_jax.main`: the best checkpoint, or the last, and its config."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import checkpoint
from vit_jax.bucket import Folder
from vit_jax.build import build
from vit_jax.data.text import FILE
from vit_jax.errors import ConfigError
from vit_jax.pretrained import names
from vit_jax.pretrained.arrays import Arrays
from vit_jax.pretrained.opened import Opened, backbone_fields, refuse
from vit_jax.pretrained.preprocess import Preprocessing
from vit_jax.pretrained.recipe import Recipe

LABELS = "labels.json"  # one name for each class, in the run folder
TOKENIZE = "data.text.Tokenize"  # the step that is for texts
HIDE = "data.patches.HidePatches"  # the step that leaves a picture as it is and adds to it


def is_run(folder: Path) -> bool:
    """Whether `vit_jax.main` trained there."""
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def open_folder(run: Folder, ref: str) -> Opened:
    """A run's best checkpoint; the running mean of its parameters where it kept one.

    Raises:
      CheckpointError: if the folder holds no checkpoint that can be read.
    """
    folder = run.files
    try:
        config = json.loads((folder / "config.json").read_text())
        model = dict(config["model"])
    except (OSError, ValueError, KeyError) as error:
        raise refuse(ref, f"config.json is not that of a run: {error}") from error
    saved = checkpoint.read(run.root)
    variables = saved.ema or {"params": saved.params, **saved.model_state}
    flat = {path: np.asarray(array) for path, array in names.flat(variables).items()}
    steps, labels = config["eval"]["transforms"], ()
    if (folder / LABELS).is_file():
        labels = tuple(json.loads((folder / LABELS).read_text()))
    return Opened(
        ref=ref,
        format=f"a run folder, step {saved.step}" + (", running mean" if saved.ema else ""),
        recipe=_recipe(model, config),
        arrays=Arrays(
            {path: array.shape for path, array in flat.items()},
            {path: array.dtype.name for path, array in flat.items()},
            flat.__getitem__,
        ),
        preprocessing=Preprocessing(tuple(s for s in steps if s["target"] not in (TOKENIZE, HIDE))),
        labels=labels,
        words=folder if (folder / FILE).is_file() else None,
    )


def _recipe(model: dict[str, Any], config: dict[str, Any]) -> Recipe:
    if "backbone" not in model:  # a named size of a whole model brings its own
        module = build(model)
        model = backbone_fields(module) | {"backbone": backbone_fields(module.backbone)}
    backbone = dict(model.pop("backbone"))
    classes = model.pop("num_classes", None)
    for spec in (model, backbone):
        spec.pop("dtype", None)  # of the run's computation; a loaded model has its own
    try:
        build(backbone)
    except ConfigError as error:
        raise refuse(str(config.get("workdir", "the run")), str(error)) from error
    text = [s for s in config["eval"]["transforms"] if s["target"] == TOKENIZE]
    return Recipe(
        origin="vit_jax",
        backbone=backbone,
        table=names.Ours(),
        num_classes=classes,
        classifier=model,
        task=config["task"],
        inputs={"tokens": ((text[0]["length"],), "int32")} if text else {},
        beside=tuple(s for s in config["eval"]["transforms"] if s["target"] == HIDE),
        inference=dict(config["eval"].get("inference", {})),
    )
