"""Training that starts from a checkpoint: `config.init`.

A config may leave to its checkpoint what model it is and how pictures are prepared, by specs whose
target starts with `init.`: `init.model`, a whole one, `init.backbone`, `init.task`,
`init.preprocessing` and `init.standardize`.
"""

import json
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.build import TARGET
from vit_jax.errors import CheckpointError, ConfigError, nearest
from vit_jax.pretrained import names, resample
from vit_jax.pretrained.load import open_checkpoint
from vit_jax.pretrained.opened import Opened, backbone_fields

MARK = "init."
MARKS = ("init.model", "init.backbone", "init.task", "init.preprocessing", "init.standardize")
# What a config may set for any backbone; one that has no such field goes without.
OPTIONAL = ("drop_path", "dropout", "attention_dropout", "scan", "remat", "image_size", "norm")
# Tasks that the models of another one serve as well.
SERVES = {"tasks.panoptic.Panoptic": ("tasks.detection.Detection",)}
# A published checkpoint whose whole model serves a task, to be named where none is given.
EXAMPLES = {
    "tasks.detection.Detection": "hf:facebook/detr-resnet-50",
    "tasks.segmentation.Segmentation": "hf:openmmlab/upernet-swin-tiny",
}
SHOWN = 6


def resolve(config: dict[str, Any]) -> Opened | None:
    """Fills in, in place, what a config leaves to the checkpoint of its `init`.

    Returns:
      The checkpoint, None if the config names none.

    Raises:
      ConfigError: if a part is left to a checkpoint and `init` is empty, or does not exist, or a
        whole model was made for another task.
      CheckpointError: as of `open_checkpoint`.
    """
    marked = _marked(config)
    if not config["init"]:
        if marked:
            example = "hf:google/vit-base-patch16-224-in21k"
            if config["model"].get(TARGET) == "init.model":
                example = EXAMPLES.get(config["task"][TARGET], example)
            raise ConfigError(
                f"config.init is empty, and {marked[0]} is to come from it: --config.init=REF, "
                f"such as {example}, a checkpoint file or a run folder"
            )
        return None
    opened = open_checkpoint(config["init"])
    size = (config["image_size"], config["image_size"])

    def filled(spec: Any) -> Any:
        if isinstance(spec, Mapping):
            target = spec.get(TARGET, "")
            if target == "init.backbone":
                return _backbone(opened, {k: v for k, v in spec.items() if k != TARGET})
            if target == "init.model":
                _check_task(opened, config["task"])
                return _model(opened, {k: v for k, v in spec.items() if k != TARGET})
            if target == "init.task":
                return dict(opened.recipe.task) | {k: v for k, v in spec.items() if k != TARGET}
            if target == "init.standardize":
                steps = opened.preprocessing.steps
                return next(dict(s) for s in steps if s[TARGET].endswith(".Standardize"))
            if isinstance(target, str) and target.startswith(MARK):
                raise ConfigError(f"target {target!r} does not exist.{nearest(target, MARKS)}")
            return {k: filled(v) for k, v in spec.items()}
        if isinstance(spec, (list, tuple)):
            items: list[Any] = []
            for item in spec:
                if isinstance(item, Mapping) and item.get(TARGET) == "init.preprocessing":
                    items += [dict(s) for s in opened.preprocessing.resized(size).steps]
                else:
                    items.append(filled(item))
            return items
        return spec

    # Plain data, as it will be read back from the run folder.
    config.update(json.loads(json.dumps(filled(config))))
    return opened


def _marked(spec: Any, path: str = "config") -> list[str]:
    """Where a spec leaves something to the checkpoint."""
    if isinstance(spec, Mapping):
        target = spec.get(TARGET)
        if isinstance(target, str) and target.startswith(MARK):
            return [path]
        return [p for k, v in spec.items() for p in _marked(v, f"{path}.{k}")]
    if isinstance(spec, (list, tuple)):
        return [p for i, v in enumerate(spec) for p in _marked(v, f"{path}[{i}]")]
    return []


def _backbone(opened: Opened, fields: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's backbone with a config's fields, as plain data."""
    native = opened.module()
    spec = backbone_fields(getattr(native, "backbone", native))
    spec.pop("dtype")
    for name, value in fields.items():
        absent = name not in spec and name != "dtype"
        if absent and name in OPTIONAL and (name in ("image_size", "norm") or not value):
            continue
        spec[name] = value
    return spec


def _check_task(opened: Opened, task: Mapping[str, Any]) -> None:
    """A whole model serves the task that it was made for."""
    theirs, ours = opened.recipe.task[TARGET], task[TARGET]
    if ours not in (theirs, "init.task", *SERVES.get(theirs, ())):
        raise ConfigError(
            f"config.init={opened.ref} is a model for {theirs}, and config.task is {ours}: a "
            "checkpoint of that task was wanted"
        )


def _model(opened: Opened, fields: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's whole model with a config's fields, those of `backbone` in it too."""
    native = opened.module()
    if not hasattr(native, "backbone"):
        raise ConfigError(f"{opened.ref} is a backbone alone: it has no model to start from")
    spec = backbone_fields(native)
    if "num_classes" in spec:
        spec["num_classes"] = 0  # as many as the data has
    for inner in spec.values():
        if isinstance(inner, dict):  # which no JSON could hold otherwise
            inner.pop("dtype", None)
    spec |= fields
    if "dtype" not in fields:
        del spec["dtype"]
    return spec | {"backbone": _backbone(opened, dict(fields.get("backbone", {})))}


@dataclass(frozen=True)
class WarmStart:
    """What a model takes from a checkpoint, found out from shapes alone.

    Attributes:
      opened: the checkpoint.
      module: the model that is to start from it.
      taken: our paths, blocks one by one, that come from the checkpoint.
      remarks: for a person.
    """

    opened: Opened
    module: nn.Module
    taken: frozenset[str]
    remarks: tuple[str, ...]

    def fill(self, variables: Any) -> Any:
        """Fresh variables with the checkpoint's in their place, in the same layout."""
        fresh = names.flat(variables)
        own = resample.unstacked(fresh)
        paths = self.opened.read(self.opened.module())
        paths = {_below_backbone(k, paths): v for k, v in paths.items()}
        places = _places(paths := resample.unstacked(paths), own)
        chosen = {places[k]: v for k, v in paths.items() if places[k] in self.taken}
        shapes = {k: tuple(v.shape) for k, v in own.items()}
        fitted, _ = resample.fit(chosen, shapes, self.module)
        merged = {k: jnp.asarray(fitted.get(k, v), v.dtype) for k, v in own.items()}
        whole = resample.stacked_like(merged, fresh)
        placed = {k: jax.device_put(v, fresh[k].sharding) for k, v in whole.items()}
        return names.nested(placed)


def warm_start(opened: Opened, module: nn.Module, variables: Any, skip: str = "") -> WarmStart:
    """Which arrays of a checkpoint a model takes; nothing is read.

    A head may be of another size, or absent on either side: the model's then starts anew. Positions
    and position biases of another size are resampled. Norms may be frozen on one side and learn on
    the other. Everything else must match.

    Args:
      opened: the checkpoint.
      module: the model.
      variables: its variables, or their shapes.
      skip: pattern of our paths below the collection that start anew though they would match, or
        may be missing on either side; "" is none.

    Raises:
      CheckpointError: with all that does not match, on both sides.
      ConfigError: if `skip` is no regular expression, or matches nothing.
    """
    native = opened.module()
    match = opened.match(native)
    match.check(opened.ref)
    theirs = resample.unstacked(names.flat(opened.abstract(native)))
    theirs = {_below_backbone(k, theirs): tuple(v.shape) for k, v in theirs.items()}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    ours = {k: tuple(v.shape) for k, v in resample.unstacked(names.flat(abstract)).items()}
    places = _places(theirs, ours)
    frozen = {p.partition("/")[0] for p, place in places.items() if p != place}
    theirs = {places[path]: shape for path, shape in theirs.items()}
    skipped = _skipped(skip, ours.keys() | theirs.keys())

    taken, fresh, heads, wrong = set(), [], {}, []
    for path, shape in ours.items():
        there = theirs.get(path)
        if path in skipped:
            fresh.append(path)
        elif there == shape or (there and resample.resizable(path, there, shape, module)):
            taken.add(path)
        elif "/backbone/" not in path:
            heads[path] = f"{list(there)} there" if there else "not there"
        else:
            wrong.append(
                f"{path} {list(shape)}: " + (f"{list(there)} there" if there else "absent")
            )
    unused = [p for p in theirs if p not in ours and p not in skipped and "/backbone/" in p]
    wrong += [f"{path} {list(theirs[path])}: the model has no such" for path in unused]
    if wrong or not taken:
        shown = "; ".join(wrong[:SHOWN]) + (
            f"; and {len(wrong) - SHOWN} more" * (len(wrong) > SHOWN)
        )
        raise CheckpointError(
            f"{opened.ref} does not fit the model; {len(wrong)} arrays: {shown}. Name in "
            "--config.init_skip what is to start anew"
        )
    remarks = [f"weights from {opened.ref} ({opened.format}): {len(taken)} of {len(ours)} arrays"]
    if frozen:
        change = "frozen here, learned" if "params" in frozen else "learned here, frozen"
        remarks.append(f"scales and biases of norms are {change} in the checkpoint")
    absent = []
    for head in dict.fromkeys(path.split("/")[1] for path in heads):
        one = max((p for p in heads if p.split("/")[1] == head), key=lambda p: len(ours[p]))
        if heads[one] == "not there":
            absent.append(head)
        remarks.append(f"{head} starts anew: {list(ours[one])} here, {heads[one]}")
    if len(absent) > 1:
        remarks = [r for r in remarks if not r.endswith("here, not there")]
        remarks.append(f"not in the checkpoint, so they start anew: {', '.join(sorted(absent))}")
    if dropped := {p.split("/")[1] for p in theirs if p not in ours and "/backbone/" not in p}:
        remarks.append(f"left out of the checkpoint: {', '.join(sorted(dropped))}")
    if fresh:
        remarks.append(f"init_skip: {len(fresh)} arrays start anew, such as {fresh[0]}")
    told = resample.sentences({p: theirs[p] for p in taken}, ours, module)
    return WarmStart(opened, module, frozenset(taken), (*opened.remarks, *remarks, *told))


def _places(theirs: Iterable[str], ours: Container[str]) -> dict[str, str]:
    """Their paths -> ours: as they are, but for numbers that lie in another collection here.

    A frozen norm keeps its scale and bias with its statistics, one that learns among `params`.
    """

    def place(path: str) -> str:
        _, _, rest = path.partition("/")
        others = (f"{collection}/{rest}" for collection in ("params", "batch_stats"))
        return path if path in ours else next((p for p in others if p in ours), path)

    return {path: place(path) for path in theirs}


def _below_backbone(path: str, paths: Mapping[str, Any]) -> str:
    """A backbone by itself has the names that it would have in a whole model."""
    if any("/backbone/" in p for p in paths):
        return path
    collection, _, rest = path.partition("/")
    return f"{collection}/backbone/{rest}"


def _skipped(pattern: str, paths: Any) -> set[str]:
    if not pattern:
        return set()
    try:
        found = {p for p in paths if re.search(pattern, p.partition("/")[2])}
    except re.error as error:
        raise ConfigError(
            f"config.init_skip={pattern!r} is no regular expression: {error}"
        ) from error
    if not found:
        raise ConfigError(f"config.init_skip={pattern!r} matches no array of the model")
    return found
