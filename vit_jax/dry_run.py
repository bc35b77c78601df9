"""What a run would be: sizes, memory, a time estimate and one augmented batch, without training."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import bucket, cost, mesh, pictures
from vit_jax.contracts import Batch
from vit_jax.evaluate import memory_errors
from vit_jax.report import Report
from vit_jax.run import Run, set_up
from vit_jax.train import describe

TIMED_STEPS = 3


def dry_run(config: dict[str, Any], workdir: str | Path) -> Path:
    """Builds everything that `train` would, says what it is, and draws `batch.png` in `workdir`.

    The time estimate comes from a few steps of a state that is thrown away.

    Returns:
      The picture's path.
    """
    with bucket.run_folder(workdir) as folder:
        return _dry_run(config, folder)


def _dry_run(config: dict[str, Any], folder: bucket.Folder) -> Path:
    run = set_up(config, workdir=folder.files)
    with Report(None, run.total_steps, run.steps_per_epoch, config["batch_size"]) as report:
        describe(run, report.say)
        names = jax.tree_util.tree_flatten_with_path(run.abstract_state.params)[0]
        for path, leaf in names:
            report.say(f"  {mesh.name_of(path)} {leaf.shape}")
        with closing(run.batches(0)) as batches:
            batch = next(batches)
        folder.files.mkdir(parents=True, exist_ok=True)
        picture = folder.root / _draw(run, batch, folder.files / "batch.png").name
        report.say(f"the first batch, as the model sees it: {picture}")
        began = time.monotonic()
        with memory_errors(run):
            placed = mesh.put_batch(batch, run.mesh)
            train_step = run.compile_train_step(placed)  # where there are several shapes, for this
            report.say(f"compiled the training step in {time.monotonic() - began:.0f} s")
            _say_memory(run, train_step, report)
            state = run.init()
            times = []
            for _ in range(TIMED_STEPS):
                began = time.monotonic()
                state, sums = train_step(state, placed, key=run.key)
                jax.block_until_ready(sums)
                times.append(time.monotonic() - began)
        step_time = float(np.median(times))
        hours = step_time * run.total_steps / 3600
        report.say(
            f"time: {step_time * 1000:.0f} ms a step, {config['batch_size'] / step_time:.0f} "
            f"images/s, {run.total_steps:,} steps: about "
            + (f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes")
            + ", waiting for data and evaluations not counted"
        )
    return picture


def _draw(run: Run, batch: Batch, path: Path) -> Path:
    """The first pictures of a batch with what each of them teaches."""
    cell, names = run.task.cell, run.train_data.class_names
    count = min(len(batch["image"]), 2 * pictures.fitting(cell))
    images = pictures.unstandardised(batch["image"][:count], *_standard(run.train_transforms))
    drawn = [
        run.task.draw_target(image, {k: v[row] for k, v in batch.items()}, names)
        for row, image in enumerate(images)
    ]
    H, W = images.shape[1:3]
    header = f"a batch of {len(batch['image'])} pictures of {H} x {W} (height x width)"
    header += f", the first {count} shown" if count < len(batch["image"]) else ""
    shown, titles = zip(*drawn, strict=True)
    return pictures.sheet(path, shown, titles, header, cell)


def _standard(transforms: tuple) -> tuple[Any, Any]:
    """Mean and deviation of the transform that standardises; 0 and 1 if none does."""
    found = next((t for t in transforms if hasattr(t, "mean") and hasattr(t, "std")), None)
    return (found.mean, found.std) if found else ((0.0,), (1.0,))


def _say_memory(run: Run, train_step: Any, report: Report) -> None:
    state = run.abstract_state
    params, optimizer = cost.bytes_of(state.params), cost.bytes_of(state.opt_state)
    text = f"memory: parameters {cost.human(params)}B, optimizer {cost.human(optimizer)}B"
    if state.ema:
        text += f", running mean {cost.human(cost.bytes_of(state.ema))}B"
    analysis = train_step.memory_analysis()
    if analysis is not None:
        text += f", activations and temporaries {cost.human(analysis.temp_size_in_bytes)}B a device"
    report.say(text)
