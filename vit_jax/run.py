"""A config, built and checked: everything a run needs before anything is trained."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from flax import linen as nn

from vit_jax import mesh, optim, processes, programs, step, vocabulary
from vit_jax.build import build, flatten
from vit_jax.contracts import Batch, Dataset, Sums, Task, Transform
from vit_jax.data import pipeline
from vit_jax.errors import CheckpointError, ConfigError, DataError
from vit_jax.pretrained import finetune
from vit_jax.pretrained.own import LABELS

# Change nothing of what is learned, but for the order in which devices round.
FREE_KEYS = (
    "data.threads",
    "data.workers",
    "checkpoint.",
    "log_every",
    "max_skipped",
    "hang_seconds",
    "data.max_broken",
    "eval.inference.",
    "mesh.",
    "sharding",
)
UNFINISHED = "config.json.tmp"
# What a dry run draws, and what a run that was killed at once leaves.
BEFORE_CLAIM = ("batch.png", LABELS, vocabulary.FILE, f"{vocabulary.FILE}.tmp", UNFINISHED)


@dataclass(frozen=True)
class Run:
    """Everything that a config describes, built and checked, before anything is trained."""

    config: dict[str, Any]
    mesh: jax.sharding.Mesh
    model: nn.Module
    task: Task
    train_data: Dataset
    eval_data: Dataset
    train_transforms: tuple[Transform, ...]
    eval_transforms: tuple[Transform, ...]
    mix: Transform | None
    total_steps: int
    warmup_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    abstract_state: step.TrainState  # shapes with shardings
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    fresh: Callable[[jax.Array], Any]  # a key -> the first variables {"params", **model_state}
    flops: int  # of one forward pass of one picture, by the rule of `vit_jax.cost`
    remarks: tuple[str, ...]  # what the data and the checkpoint had to tell
    warm_start: finetune.WarmStart | None  # what the first state takes from `config.init`
    tokenizer: vocabulary.Tokenizer | None  # of what reads captions

    @property
    def steps_per_epoch(self) -> float:
        """Updates until each training example was seen once."""
        return len(self.train_data) / self.config["batch_size"]

    @property
    def max_pixels(self) -> int:
        """Larger pictures count as broken."""
        return self.config["data"]["max_pixels"]

    @property
    def key(self) -> jax.Array:
        """The root of all randomness on the devices; step n draws from `fold_in(key, n)`."""
        make = partial(jax.random.key, self.config["seed"])
        # Not `device_put`, which leaves devices of other processes alone.
        return jax.jit(make, out_shardings=mesh.replicated(self.mesh))()

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Training batches from that step on, for ever."""
        return pipeline.train_batches(
            self.train_data,
            self.train_transforms,
            batch_size=self.config["batch_size"],
            seed=self.config["seed"],
            start_step=start_step,
            mix=self.mix,
            **self._reading,
        )

    def validation(self) -> Iterator[Batch]:
        """The whole validation split, each example once, the last batch padded."""
        return pipeline.eval_batches(
            self.eval_data,
            self.eval_transforms,
            batch_size=self.config["batch_size"],
            **self._reading,
        )

    @property
    def _reading(self) -> dict[str, Any]:
        process_index, process_count = mesh.host_part(self.mesh)
        own = {"process_index": process_index, "process_count": process_count}
        return _reading(self.config) | own

    def init(self) -> step.TrainState:
        """The state of step 0 on the mesh: fresh, or with the weights of `config.init`."""
        shardings = _shardings(self.abstract_state)
        of_variables = {"params": shardings.params, **shardings.model_state}
        fresh = self._once(self.fresh, self.key, of_variables)
        variables = self.warm_start.fill(fresh) if self.warm_start else fresh
        start = partial(step.init_state, optimizer=self.optimizer, ema=self.config["ema"] > 0)
        return self._once(start, variables, shardings)

    def _once(self, function: Callable, argument: Any, shardings: Any) -> Any:
        """One call, compiled in little time."""
        lowered = jax.jit(function, out_shardings=shardings).lower(argument)
        return lowered.compile(programs.once(mesh.platform(self.mesh)))(argument)

    def compile_train_step(
        self, batch: Mapping[str, Any] | None = None
    ) -> Callable[..., tuple[step.TrainState, Sums]]:
        """The jitted step, compiled: (state, batch, key=) -> (state, sums); `state` is donated.

        Args:
          batch: of the shapes that it is for; None is `abstract_batch`.
        """
        batch = self.abstract_batch if batch is None else batch
        function = partial(
            step.train_step,
            model=self.model,
            task=self.task,
            optimizer=self.optimizer,
            accumulate=self.config["accumulate"],
            ema_decay=self.config["ema"],
        )
        whole = mesh.replicated(self.mesh)
        out_shardings = _shardings(self.abstract_state), whole
        jitted = jax.jit(function, donate_argnums=0, out_shardings=out_shardings)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
        with jax.set_mesh(self.mesh):  # for `layers.rows`
            lowered = jitted.lower(self.abstract_state, batch, key=key)
        return lowered.compile(programs.options(mesh.platform(self.mesh)))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _reading(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config["data"][name] for name in ("max_pixels", "threads", "workers")}


def set_up(
    config: dict[str, Any],
    *,
    workdir: Path | None = None,
    devices: Sequence[jax.Device] | None = None,
    splits: Sequence[Dataset] | None = None,
) -> Run:
    """Builds what `config` describes, and checks that the parts fit each other.

    What the config leaves to the checkpoint of its `init` is filled in, in place.

    Args:
      config: as `main.parse` gives it.
      workdir: the run folder, whose tokenizer is taken if it has one.
      devices: to lay the run out on, which may be a description of a pod; None is all there are.
      splits: what to learn from and what is held out; None opens what the config names.

    Raises:
      ConfigError: if they do not.
      DataError: if the data is missing, empty or has more classes than the head.
      CheckpointError: if `config.init` cannot be read, or is of another model; or the run folder
        was trained with another tokenizer.
    """
    opened = finetune.resolve(config)
    devices = mesh.make_mesh(config["mesh"], devices)
    mesh.check_batch_size(config["batch_size"], devices, config["accumulate"])
    data = config["data"]
    with _remarks() as remarks:
        splits = splits or [
            pipeline.open_dataset(data["name"], split, data["data_dir"], **data["options"])
            for split in ("train", "validation")
        ]
    _fit_head(config, splits[0])
    tokenizer, told = vocabulary.settle(config, splits[0], workdir)
    remarks += told
    model, task = build(config["model"]), vocabulary.given(build(config["task"]), tokenizer)
    if config["accumulate"] > 1 and getattr(task, "whole_batch", False):
        raise ConfigError(
            f"accumulate={config['accumulate']}: {type(task).__name__} compares all rows of a "
            "batch with each other, and its parts would know a part of them only: set it to 1"
        )
    mix = config["train"]["mix"]
    mix = build(mix, num_classes=config["model"].get("num_classes", 0)) if mix else None
    transforms = [build(config[part]["transforms"]) for part in ("train", "eval")]
    transforms = [tuple(vocabulary.given(s, tokenizer) for s in steps) for steps in transforms]

    durations = {"examples_per_epoch": len(splits[0]), "batch_size": config["batch_size"]}
    total = optim.duration("training", **_durations(config, ""), **durations)
    warmup = config["schedule"]
    warmup_steps = optim.duration(
        "warmup", **_durations(warmup, "warmup_"), **durations, may_be_zero=True
    )
    warmup_steps = min(warmup_steps, total)  # a run cut short from the command line is no error
    schedule = optim.schedule(
        name=warmup["name"],
        learning_rate=config["learning_rate"],
        total_steps=total,
        warmup_steps=warmup_steps,
        **{k: warmup[k] for k in ("final", "warmup_from", "power", "drops", "drop_to")},
    )

    abstract_batch = _abstract_batch(config, splits[0], transforms[0], mix, devices)
    fullest = _with_room(abstract_batch, splits[1], transforms[1])
    try:
        function = partial(step.init_and_score, model=model, task=task)
        variables, fresh, flops = step.traced(function, jax.random.key(0), fullest)
    except ValueError as error:  # what a module says of a size or a name it cannot work with
        raise ConfigError(str(error)) from error
    warm_start = None
    if opened is not None:
        warm_start = finetune.warm_start(opened, model, variables, config["init_skip"])
        remarks += warm_start.remarks
    optimizer = optim.make(config["optimizer"], params=variables["params"], schedule=schedule)
    state = jax.eval_shape(
        partial(step.init_state, optimizer=optimizer, ema=config["ema"] > 0), variables
    )
    return Run(
        config=config,
        mesh=devices,
        model=model,
        task=task,
        train_data=splits[0],
        eval_data=splits[1],
        train_transforms=transforms[0],
        eval_transforms=transforms[1],
        mix=mix,
        total_steps=total,
        warmup_steps=warmup_steps,
        schedule=schedule,
        optimizer=optimizer,
        abstract_state=mesh.lay_out(state, state.params, devices, config["sharding"]),
        abstract_batch=abstract_batch,
        fresh=fresh,
        flops=flops // config["batch_size"],
        remarks=tuple(dict.fromkeys(remarks)),
        warm_start=warm_start,
        tokenizer=tokenizer,
    )


@contextmanager
def _remarks() -> Iterator[list[str]]:
    """Collects what the package logs, to be said where a person and the run's log see it."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = logging.getLogger("vit_jax")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _durations(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {unit: config[prefix + unit] for unit in ("steps", "epochs", "examples")}


def _fit_head(config: dict[str, Any], data: Dataset) -> None:
    """Sizes a head of 0 classes by the data; refuses one that is too small."""
    classes, head = len(data.class_names), config["model"].get("num_classes")
    if head is None:  # a model that tells no classes
        return
    if head == 0:
        config["model"]["num_classes"] = classes
    elif head < classes:
        raise DataError(
            f"{config['data']['name']} has {classes} classes and the head only {head}: set "
            f"--config.model.num_classes={classes}, or 0 to take the data's"
        )


def _abstract_batch(config, data, transforms, mix, devices) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, read off two real examples."""
    reading = _reading(config) | {"threads": 0, "workers": 0}
    batches = pipeline.train_batches(
        data, transforms, batch_size=2, seed=config["seed"], mix=mix, **reading
    )
    sharding = mesh.split_rows(devices)
    example = mesh.device_part(next(iter(batches)))
    if not processes.alone():
        example["stop"] = example["valid"]
    return {
        key: jax.ShapeDtypeStruct(
            (config["batch_size"], *value.shape[1:]), value.dtype, sharding=sharding
        )
        for key, value in example.items()
    }


def _with_room(batch: dict[str, Any], data: Dataset, transforms: tuple[Transform, ...]) -> dict:
    """The shapes of a batch, with as many objects as held-out pictures have, if these have more:
    a model with too few queries for them is to be refused now, not at the first evaluation.
    """
    pad = pipeline.padding(transforms, data)
    if pad is None or "boxes" not in batch:
        return batch
    rows, objects = batch["boxes"].shape[:2]
    most = max(objects, pad.boxes)
    return batch | {
        key: jax.ShapeDtypeStruct((rows, most, *batch[key].shape[2:]), batch[key].dtype)
        for key in ("boxes", "box_label", "masks")
        if key in batch
    }


def claim(
    workdir: Path,
    config: dict[str, Any],
    labels: tuple[str, ...] = (),
    tokenizer: vocabulary.Tokenizer | None = None,
) -> None:
    """Makes the run folder, or checks that the one there belongs to this config.

    Args:
      workdir: the run folder.
      config: as `set_up` has completed it.
      labels: a name for each class, kept for those who use the trained model.
      tokenizer: kept likewise.

    Raises:
      CheckpointError: if it belongs to another config, naming the keys that differ.
      ConfigError: if it cannot be written, or holds files that no run wrote.
    """
    if check_owner(workdir, config):
        return
    try:
        if workdir.exists() and any(p.name not in BEFORE_CLAIM for p in workdir.iterdir()):
            raise ConfigError(
                f"workdir {workdir} has files but no config.json, so it is no run folder; choose "
                "another --workdir"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        unfinished = workdir / UNFINISHED
        (workdir / LABELS).write_text(json.dumps(labels) + "\n")
        if tokenizer is not None:
            tokenizer.save(workdir / vocabulary.FILE)
        unfinished.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(unfinished, workdir / "config.json")
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be written: {error.strerror}") from error


def check_owner(workdir: Path, config: dict[str, Any]) -> bool:
    """Whether the folder is a run of this config; False if it is no run folder.

    Raises:
      CheckpointError: if it is a run of another config, naming the keys that differ.
    """
    file = workdir / "config.json"
    try:
        saved = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    _refuse_other(saved, config, workdir)
    return True


def _refuse_other(saved: dict[str, Any], config: dict[str, Any], workdir: Path) -> None:
    old, new = flatten(saved), flatten(config)
    different = [
        f"{key} ({old.get(key, 'absent')} there, {new.get(key, 'absent')} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
    ]
    if different:
        shown = ", ".join(different[:8]) + (", ..." if len(different) > 8 else "")
        raise CheckpointError(
            f"{workdir} belongs to another config; {len(different)} keys differ: {shown}. Choose "
            "another --workdir, or set them back"
        )
