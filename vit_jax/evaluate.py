"""A model on held-out data: numbers of the whole split, and pictures with what it says of them."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import bucket, checkpoint, mesh, processes, programs, step
from vit_jax.build import build
from vit_jax.contracts import Batch, Dataset, Example, Predictions, Sums
from vit_jax.data import pipeline
from vit_jax.errors import CheckpointError, DataError
from vit_jax.interrupt import Interrupt, Reader
from vit_jax.report import Report, sentence
from vit_jax.run import Run, check_owner, set_up

SHOWN = 32  # held-out pictures in predictions.png, at most


def evaluate(config: dict[str, Any], workdir: str | Path) -> dict[str, dict[str, float]]:
    """Evaluates the last checkpoint of a run, and the best one where another is kept.

    Args:
      config: as `main.parse` gives it.
      workdir: the run folder, or `gs://BUCKET/RUN`.

    Returns:
      {"step 460 validation": {"accuracy": ...}, ...}, as it is said.

    Raises:
      ConfigError, DataError: as for training.
      CheckpointError: if the folder is of another config, or holds no checkpoint.
    """
    with bucket.run_folder(workdir) as folder:
        return _evaluate(config, folder)


def _evaluate(config: dict[str, Any], folder: bucket.Folder) -> dict[str, dict[str, float]]:
    workdir = folder.files
    run = set_up(config, workdir=workdir)
    if not check_owner(workdir, config):
        raise CheckpointError(f"{workdir} is no run folder: there is nothing to evaluate")
    if not (workdir / "checkpoints").is_dir():
        raise CheckpointError(f"{workdir} holds no checkpoint yet")
    results = {}
    durations = run.total_steps, run.steps_per_epoch, config["batch_size"]
    with Report(None, *durations, quiet=not processes.first()) as report:
        # A run that goes on in this folder is not to notice.
        checkpoints = checkpoint.Checkpoints(
            folder.root, **config["checkpoint"], warn=report.warn, read_only=True
        )
        try:
            if not checkpoints.steps():
                raise CheckpointError(f"{workdir} holds no checkpoint yet")
            state, last = checkpoints.restore(run.abstract_state)
            states = {last: state}
            best = checkpoints.best()
            if best not in (None, last):
                states[best] = checkpoints.restore(run.abstract_state, step=best)[0]
        finally:
            checkpoints.close()
        eval_step = EvalStep(run)
        for number, state in states.items():
            with memory_errors(run):
                found = evaluate_split(run, eval_step, rows_of(state), report, Interrupt([]))
            for name, numbers in found.items():
                note = " (best)" if number == best else ""
                results[f"step {number}{note} {name}"] = numbers
                report.say(f"step {number}{note} {name}: {sentence(numbers)}")
        drawn = draw(run, eval_step, list(rows_of(state).values())[-1], SHOWN)
        if processes.first():
            from vit_jax import pictures

            pictures.predictions(workdir / "predictions.png", drawn, run.task.cell)
    return results


class EvalStep:
    """The jitted step (variables, batch) -> (sums, predictions), for each shape of a batch once."""

    def __init__(self, run: Run):
        """Of a run.

        The model is asked as `config.eval.inference` says, where that names something, such as
        `tasks.inference.Averaged`, which takes the model and has its `apply`.

        Raises:
          ConfigError: if that does not exist, or refuses a value.
        """
        # Only the recipes of segmentation have this key.
        spec, model = run.config["eval"].get("inference"), run.model
        if spec:
            model = build(spec, model=model)
        function = partial(step.eval_step, model=model, task=run.task)
        self._jitted = jax.jit(
            function,
            out_shardings=mesh.replicated(run.mesh),
            compiler_options=programs.options(mesh.platform(run.mesh)),
        )
        self._mesh = run.mesh

    def __call__(self, variables: Any, batch: Batch) -> tuple[Sums, Predictions]:
        """Sums of a batch, on every process, and what the task predicts."""
        with jax.set_mesh(self._mesh):  # for `layers.rows`
            return self._jitted(variables, batch)

    def compile(self, variables: Any, batch: Batch) -> None:
        """What a call would compile; the call itself may wait for other processes."""
        with jax.set_mesh(self._mesh):
            self._jitted.lower(variables, batch).compile()  # which JAX keeps for the call


def reader(run: Run, batches: Iterator[Batch], interrupt: Interrupt) -> Iterator[Batch]:
    """The batches; a signal ends the waiting by `CutError` where that may take long.

    That is so where other processes make them, or train as well: all wait for the first one.
    """
    if run.config["data"]["workers"] or not processes.alone():
        return Reader(batches, interrupt)
    return batches


def rows_of(state: step.TrainState) -> dict[str, Any]:
    """Each set of variables that is evaluated: the parameters, and their running mean if kept."""
    rows = {"validation": {"params": state.params, **state.model_state}}
    return rows | ({"validation_ema": state.ema} if state.ema else {})


def broken_pictures(run: Run, batch: Batch, data: Dataset) -> list[str]:
    """What is wrong with a batch's broken pictures; DataError if the config says to stop."""
    texts = pipeline.broken(batch, data, run.max_pixels)
    if texts and run.config["data"]["on_broken"] == "stop":
        raise DataError(f"{texts[0]} (--config.data.on_broken=skip would go on without it)")
    return texts


def evaluate_split(
    run: Run,
    eval_step: Callable,
    rows: dict[str, Any],
    report: Report,
    interrupt: Interrupt,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]] | None:
    """Each set of variables on the whole validation split, read once.

    None if a signal came: of several processes to any, as all learn of it with the same batch.
    `alive` is called whenever something is done.
    """
    sums: dict[str, dict] = {name: {} for name in rows}
    found: dict[str, list] = {name: [] for name in rows}
    skipped = 0
    for batch in reader(run, run.validation(), interrupt):
        own = {"index": batch["index"].astype(np.int32), "valid": batch["valid"]}
        own["stop"] = np.full_like(batch["valid"], bool(interrupt.came))
        all_rows = mesh.gather(own, run.mesh)
        if all_rows["stop"].any():
            return None
        for text in broken_pictures(run, all_rows, run.eval_data):
            skipped += 1
            report.warn(f"left out of the evaluation, a broken picture: {text}")
        placed = mesh.put_batch(batch, run.mesh)
        for name, variables in rows.items():
            new, predictions = eval_step(variables, placed)
            new = jax.device_get(new)
            sums[name] = {
                k: sums[name].get(k, 0) + np.asarray(v, np.float64) for k, v in new.items()
            }
            if run.task.wants_results:
                predictions = jax.device_get(predictions)
                found[name] += [
                    (int(all_rows["index"][row]), {k: v[row] for k, v in predictions.items()})
                    for row in np.flatnonzero(all_rows["valid"])
                ]
        alive()
    results = {}

    def result(index: int) -> Example:
        alive()
        return run.eval_data[index]

    for name, total in sums.items():
        # What does not add up is compared with the data as it is, not as the model sees it.
        pairs = ((prediction, result(index)) for index, prediction in found[name])
        results[name] = run.task.summarize(total, pairs if run.task.wants_results else None)
    if skipped:
        for numbers in results.values():
            numbers["broken_pictures"] = float(skipped)
    return results


def memory_errors(run: Run) -> Any:
    """A context: too little memory becomes one sentence, with a batch size that fits the run."""
    unit = mesh.batch_unit(run.mesh, run.config["accumulate"])
    return mesh.memory_errors(run.config["batch_size"], unit)


def draw(run: Run, eval_step: Callable, variables: Any, count: int = SHOWN) -> list[tuple]:
    """`count` held-out pictures, spread over the split, as the task draws its predictions.

    Fewer where the task's pictures are so large that they would not fit a sheet.
    """
    from vit_jax import pictures  # Matplotlib, which a run's first step need not await

    count = min(count, pictures.fitting(run.task.cell))
    chosen = np.unique(np.linspace(0, len(run.eval_data) - 1, count).astype(int))
    subset = _Subset(run.eval_data, chosen)
    drawn = []
    batches = pipeline.eval_batches(
        subset, run.eval_transforms, batch_size=run.config["batch_size"], max_pixels=run.max_pixels
    )
    for batch in batches:
        placed = mesh.put_batch(batch, run.mesh, whole=True)
        predictions = jax.device_get(eval_step(variables, placed)[1])
        for row in np.flatnonzero(batch["valid"]):
            example = pipeline.decoded(subset[int(batch["index"][row])], run.max_pixels)
            prediction = {k: v[row] for k, v in predictions.items()}
            drawn.append(
                run.task.draw(example["image"], example, prediction, run.eval_data.class_names)
            )
    return drawn


class _Subset:
    """Some examples of a dataset."""

    def __init__(self, dataset, indices: np.ndarray):
        self.dataset, self.indices = dataset, indices
        self.class_names = dataset.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))

    def size(self, index: int) -> tuple[int, int]:
        return pipeline.size_of(self.dataset, int(self.indices[index]))

    def __getattr__(self, name: str) -> Any:
        # Where the whole dataset knows its `fullest` picture, its batches are as wide as that.
        if name != "fullest":
            raise AttributeError(name)
        return self.dataset.fullest
