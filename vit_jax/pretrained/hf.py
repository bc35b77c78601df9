"""Hugging Face's form: a folder with config.json, model.safetensors, preprocessor_config.json.

The folder may be on the disk or on the Hub. timm's folders there have a config.json of another
kind, with `architecture` in it; `state.py` opens what they hold.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from vit_jax.errors import ConfigError, nearest
from vit_jax.pretrained import arrays, names, preprocess, state
from vit_jax.pretrained.opened import Opened, backbone_fields, refuse
from vit_jax.pretrained.recipe import Recipe

WEIGHTS = (  # in this order
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
CLASSIFIER = "models.classifier.Classifier"
PROCESSORS = {  # that know what to make of the outputs; classifiers need none of their own
    "tasks.detection.Detection": "DetrImageProcessor",
    "tasks.panoptic.Panoptic": "DetrImageProcessor",
    "tasks.segmentation.Segmentation": "SegformerImageProcessor",
}
WORDS = ("tokenizer.json", "tokenizer_config.json", "config.json")  # what a tokenizer needs
WANTED = (*WORDS, "preprocessor_config.json", "model*.safetensors", WEIGHTS[1])


def download(repository: str, wanted: Sequence[str] = ()) -> Path:
    """A repository of the Hub, `OWNER/NAME` or `OWNER/NAME@REVISION`, in huggingface_hub's cache.

    Args:
      repository: which one.
      wanted: patterns of files; () is what a model needs.

    Offline (HF_HUB_OFFLINE=1, or no network) what is in the cache is used.

    Raises:
      CheckpointError: if there is no such repository, no access, or no network and no copy.
    """
    from huggingface_hub import errors, snapshot_download

    name, _, revision = repository.partition("@")
    ref = f"hf:{repository}"

    def get(*patterns: str) -> Path:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))

    try:
        if wanted:
            return get(*wanted)
        folder = get(*WANTED)
        if not any((folder / file).is_file() for file in WEIGHTS[:2]):
            folder = get(*WANTED, WEIGHTS[2])
        return folder
    except errors.GatedRepoError as error:
        raise refuse(ref, "its owner wants you to ask for access: see its page") from error
    except errors.RepositoryNotFoundError as error:
        raise refuse(
            ref, "there is no such repository, or it is private (then: hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise refuse(ref, f"the repository has no revision {revision!r}") from error
    except errors.HFValidationError as error:
        raise refuse(ref, "wanted hf:OWNER/NAME, or hf:OWNER/NAME@REVISION") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise refuse(
            ref, "it is not in the cache, and the Hub cannot be reached (no network, or offline)"
        ) from error
    except Exception as error:  # the HTTP library's own errors, which are not its interface
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise refuse(ref, f"it could not be downloaded: {reason[:200]}") from error


def open_folder(folder: Path, ref: str) -> Opened:
    """A folder in transformers' or timm's form; nothing is read yet but its small files.

    Raises:
      CheckpointError: if something is missing, damaged, or of a kind that is not known here.
    """
    config = _json(folder / "config.json", ref)
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        raise refuse(ref, f"no weights: wanted {' or '.join(WEIGHTS[:2])}")
    checked = arrays.check_hash(weights)
    open_weights = arrays.open_pth if weights.suffix == ".bin" else arrays.open_safetensors
    source = open_weights(weights)
    if "architecture" in config:
        return state.opened(source, ref, config["architecture"], config)
    kind = config.get("model_type")
    family = _family(config, ref)
    try:
        recipe = family.from_hf(config, source.shapes)
    except (KeyError, TypeError) as error:
        raise refuse(ref, f"its config.json or its weights lack {error}") from error
    file = folder / "preprocessor_config.json"
    if file.is_file():
        preprocessing, remarks = preprocess.from_hf(_json(file, ref)), ()
    else:
        preprocessing = preprocess.Preprocessing(recipe.preprocessing)
        remarks = ("no preprocessor_config.json: the usual one of this family is assumed",)
    remarks += (checked,) if checked else ()
    recipe = dataclasses.replace(recipe, task=_task_of(recipe.task, preprocessing))
    return Opened(
        ref=ref,
        format=f"Hugging Face transformers ({', '.join(config.get('architectures') or [kind])})",
        recipe=recipe,
        arrays=source,
        preprocessing=preprocessing,
        labels=_labels(config, recipe.num_classes),
        remarks=recipe.remarks + remarks,
        words=folder if (folder / WORDS[0]).is_file() else None,
    )


def _family(config: Mapping[str, Any], ref: str) -> Any:
    """The family that knows a config.json: by the model's class, or else by its type."""
    families, kind = state.families(), config.get("model_type")
    classes = {name: f for f in families for name in getattr(f, "HF_CLASSES", ())}
    for name in config.get("architectures") or ():
        if name in classes:
            return classes[name]
    kinds = {t: f for f in families for t in f.HF_TYPES}
    if kind not in kinds:
        raise refuse(ref, f"model_type={kind!r} is not known here.{nearest(str(kind), kinds)}")
    return kinds[kind]


def _task_of(task: Mapping[str, Any], prepared: preprocess.Preprocessing) -> dict[str, Any]:
    """A task, with the mean and the deviation that pictures are given, if it wants to know."""
    for spec in prepared.steps if "mean" in task else ():
        if spec["target"].endswith(".Standardize"):
            return dict(task) | {name: spec[name] for name in ("mean", "std")}
    return dict(task)


def _json(file: Path, ref: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise refuse(ref, f"there is no {file.name}") from error
    except (OSError, ValueError) as error:
        raise refuse(ref, f"{file.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise refuse(ref, f"{file.name} is no JSON object")
    return content


def _labels(config: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    found = {int(k): str(v) for k, v in (config.get("id2label") or {}).items()}
    if len(found) != classes or set(found) != set(range(classes)):
        return ()
    labels = tuple(found[i] for i in range(classes))
    return () if all(label == f"LABEL_{i}" for i, label in enumerate(labels)) else labels


def save(loaded: Any, folder: Path) -> Recipe:
    """Writes a folder that transformers opens, into an empty folder.

    Args:
      loaded: a `vit_jax.pretrained.load.Loaded`.
      folder: exists, and is empty.

    Returns:
      The recipe by which it can be read back.

    Raises:
      ConfigError: if transformers has no such model, saying what it lacks.
    """
    from safetensors.numpy import save_file

    config, recipe = published(loaded.module, loaded.labels)
    tensors = {
        name: np.asarray(array, order="C")  # `ascontiguousarray` makes a number an array of one
        for name, array in names.write(recipe.table, loaded.variables)
    }
    dtypes = {str(array.dtype) for array in tensors.values() if array.ndim > 1}
    config["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if "normalized" in recipe.task:  # what MAE's numbers are, which no module knows
        config["norm_pix_loss"] = loaded.recipe.task["normalized"]
    _write(folder / "config.json", config)
    processor = PROCESSORS.get(recipe.task["target"], "")
    _write(folder / "preprocessor_config.json", preprocess.to_hf(loaded.preprocess, processor))
    if loaded.words is not None:
        loaded.tokenizer.save(folder / WORDS[0])
    return recipe


def published(module: nn.Module, labels: Sequence[str] = ()) -> tuple[dict[str, Any], Recipe]:
    """(config.json, names) of a model in transformers; ConfigError if it has no such.

    Args:
      module: a backbone, or a whole model.
      labels: a name for each class; () is without names.
    """
    spec = backbone_fields(module)
    backbone = backbone_fields(getattr(module, "backbone", module))
    # A classifier is written by the family of its backbone, other whole models by their own.
    if spec["target"] == CLASSIFIER:
        spec = backbone
    elif hasattr(module, "backbone"):
        spec |= {"backbone": backbone}
    classes = getattr(module, "num_classes", 0)
    reasons = []
    for family in state.families():
        if spec["target"] not in family.TARGETS:
            continue
        try:
            config = family.to_hf(spec, classes)
            if labels:
                config["id2label"] = {str(i): label for i, label in enumerate(labels)}
                config["label2id"] = {label: i for i, label in enumerate(labels)}
            recipe = family.from_hf(config, {})
        except ConfigError as error:
            reasons.append(str(error))
            continue
        return config, recipe
    if not reasons:
        reasons = [f"transformers has no {spec['target']}"]
    raise ConfigError("; ".join(reasons))


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
