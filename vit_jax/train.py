"""The loop: the one place that sees clock, disk and devices together."""

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import checkpoint, cost, mesh, pictures, step
from vit_jax.contracts import Batch, Sums
from vit_jax.errors import CheckpointError, DivergedError
from vit_jax.evaluate import (
    broken_pictures,
    compile_eval_step,
    draw,
    evaluate_split,
    rows_of,
)
from vit_jax.report import Report, read_metrics, sentence
from vit_jax.run import Run, claim, set_up

SECONDS_A_PICTURE = 20  # between drawings of the curves, which take half a second
IN_FLIGHT = 2  # steps that run ahead of the numbers a person sees
HEALTH = ("grad_norm", "finite")  # what `train_step` adds to the task's sums


class StoppedError(Exception):
    """A signal asked the run to stop; what it had is saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


def train(config: dict[str, Any], workdir: str | Path) -> dict[str, float]:
    """Trains what `config` describes in `workdir`, going on where an earlier run stopped.

    Returns:
      The last evaluation's numbers.

    Raises:
      ConfigError, DataError: before anything is written, if the config or the data is wrong.
      CheckpointError: if the folder belongs to another run, or the last checkpoint was not written.
      DivergedError: when loss or gradient is not finite; the last good checkpoint stays.
      OutOfMemoryError: if the step does not fit.
      StoppedError: after Ctrl-C or SIGTERM, with the current step saved.
    """
    run, workdir = set_up(config), Path(workdir)
    claim(workdir, config, run.train_data.class_names)
    warnings: list[str] = []
    checkpoints = checkpoint.Checkpoints(workdir, **config["checkpoint"], warn=warnings.append)
    restored = checkpoints.restore(run.abstract_state)
    state, start = restored or (run.init(), 0)
    with (
        Report(
            workdir, run.total_steps, run.steps_per_epoch, config["batch_size"], start
        ) as report,
        signals() as stopped,
    ):
        checkpoints.warn = report.warn
        for text in warnings:
            report.warn(text)
        try:
            loop = _Loop(run, workdir, report, checkpoints, stopped)
            numbers = loop.go(state, start)
        finally:
            written = checkpoints.close()
        if not written:
            raise CheckpointError(f"the run ended, but {checkpoints.failure}")
        return numbers


class _TrainStep:
    """The training step, compiled once for each shape that batches come in."""

    def __init__(self, run: Run, report: Report):
        self._run, self._report = run, report
        self._compiled: dict[tuple, Callable] = {}
        self._compile(run.abstract_batch)

    def __call__(
        self, state: step.TrainState, batch: Batch, *, key: jax.Array
    ) -> tuple[step.TrainState, Sums]:
        shapes = _shapes(batch)
        if shapes not in self._compiled:
            with self._report.paused():
                self._compile(batch)
        return self._compiled[shapes](state, batch, key=key)

    def _compile(self, batch: Batch) -> None:
        began = time.monotonic()
        size = "x".join(map(str, batch["image"].shape[1:3])) if self._compiled else ""
        self._report.say(f"compiling the training step {f'for {size} pixels ' * bool(size)}...")
        self._compiled[_shapes(batch)] = self._run.compile_train_step(batch)
        self._report.say(f"compiled in {time.monotonic() - began:.0f} s")


def _shapes(batch: Batch) -> tuple:
    return tuple(sorted((name, tuple(array.shape)) for name, array in batch.items()))


class _Loop:
    """One run from `start` to its end; what is here lives as long as the process."""

    def __init__(self, run: Run, workdir: Path, report: Report, checkpoints, stopped: list[int]):
        self.run, self.workdir, self.report = run, workdir, report
        self.checkpoints, self.stopped = checkpoints, stopped
        self.evaluate = compile_eval_step(run)
        per_epoch = max(int(run.steps_per_epoch), 1)
        self.eval_every = run.config["eval_every"] or per_epoch
        self.checkpoint_every = run.config["checkpoint_every"] or self.eval_every
        self.log_every = run.config["log_every"] or max(min(per_epoch // 4, 50), 1)
        self.broken: set[int] = set()
        self.drawn = -np.inf  # when the curves were

    def go(self, state: step.TrainState, start: int) -> dict[str, float]:
        """From a state to the end of the run; the last evaluation's numbers."""
        run, report, total = self.run, self.report, self.run.total_steps
        rows = [r for r in read_metrics(self.workdir) if r["split"].startswith("validation")]
        evaluated = any(r["step"] == start for r in rows)
        if start >= total and evaluated:
            report.say(f"finished already: {total} steps; {sentence(rows[-1])}; see {self.workdir}")
            return rows[-1]
        describe(run, report.say)
        if start:
            report.say(f"going on from step {start} of {total}")
        best = max((self._rank(r) for r in rows), default=-np.inf)
        numbers: dict[str, float] = {}
        if start and (start % self.eval_every == 0 or start == total) and not evaluated:
            numbers, rank = self._evaluate(state, start)  # the run was stopped before this row
            best = best if rank is None else max(best, rank)
        if start < total:
            with report.paused(), mesh.memory_errors(run.config["batch_size"]):
                train_step = _TrainStep(run, report)
            with closing(run.batches(start)) as batches:
                state, numbers = self._steps(train_step, batches, state, start, best)
        self._pictures(state)
        report.say(f"finished: {sentence(numbers)}; see {self.workdir}")
        return numbers

    def _steps(
        self,
        train_step: Callable,
        batches: Iterator[Batch],
        state: step.TrainState,
        start: int,
        best: float,
    ) -> tuple[step.TrainState, dict[str, float]]:
        """Trains from `start` to the last step, with its evaluations and checkpoints."""
        run, report, total = self.run, self.report, self.run.total_steps
        numbers: dict[str, float] = {}
        key = run.key
        pending: deque = deque()
        sums: list[dict] = []
        for now in range(start + 1, total + 1):
            with report.waiting():
                batch = next(batches)
            self._check_pictures(batch)
            with mesh.memory_errors(run.config["batch_size"]):
                state, new = train_step(state, mesh.put_batch(batch, run.mesh), key=key)
                pending.append((now, new))
                while len(pending) > (IN_FLIGHT if now < total else 0):
                    sums.append(self._fetch(*pending.popleft()))
            if now % self.log_every == 0 or now == total:
                while pending:
                    sums.append(self._fetch(*pending.popleft()))
                self._log(now, sums)
                sums = []
            last, rank = now == total, None
            if (now % self.eval_every == 0 or last) and not self.stopped:
                numbers, rank = self._evaluate(state, now)
            stop = bool(self.stopped)  # a signal may also have cut the evaluation short
            improved = rank is not None and rank > best
            if stop or last or improved or now % self.checkpoint_every == 0:
                with report.paused():
                    self.checkpoints.save(now, state, rank=rank)
            best = best if rank is None else max(best, rank)
            if stop and not (last and rank is not None):
                self.checkpoints.wait()
                report.say(
                    f"stopped at step {now}, which is saved; the same command goes on from here"
                )
                raise StoppedError(self.stopped[0])
        return state, numbers

    def _fetch(self, now: int, sums: dict) -> dict[str, np.ndarray]:
        """A finished step's sums on the host; DivergedError if its loss was not finite."""
        sums = jax.device_get(sums)
        if not sums["finite"]:
            good = self.checkpoints.steps()
            raise DivergedError(
                f"step {now}: loss {sums['loss'] / max(sums['count'], 1):.4g}, gradient norm "
                f"{sums['grad_norm']:.4g}, not finite. That update was not made; the last good "
                f"checkpoint is {f'step {good[-1]}' if good else 'none yet'}. A smaller "
                "learning_rate, a longer warm-up or optimizer.clip helps"
            )
        return sums

    def _log(self, now: int, rows: list[dict]) -> None:
        health = {k: float(np.mean([r[k] for r in rows])) for k in HEALTH}
        sums = {k: np.sum([r[k] for r in rows], axis=0) for k in rows[0] if k not in HEALTH}
        numbers = self.run.task.summarize(sums)
        numbers["grad_norm"] = health["grad_norm"]
        numbers["learning_rate"] = float(self.run.schedule(now - 1))
        if self.broken:
            numbers["broken_pictures"] = float(len(self.broken))
        self.report.progress(now, numbers)
        self.report.write(now, "train", numbers)

    def _check_pictures(self, batch: Batch) -> None:
        """Names each broken picture once; stops the run if the config says so."""
        bad = (batch["index"] >= 0) & ~batch["valid"]
        if not bad.any() or set(batch["index"][bad].tolist()) <= self.broken:
            return
        self.broken |= set(batch["index"][bad].tolist())
        for text in broken_pictures(self.run, batch, self.run.train_data):
            self.report.warn(f"skipped a broken picture, {len(self.broken)} so far: {text}")

    def _evaluate(self, state: step.TrainState, now: int) -> tuple[dict[str, float], float | None]:
        """Numbers of the whole validation split, and the rank of this state; a row for each."""
        with self.report.paused():
            results = evaluate_split(
                self.run, self.evaluate, rows_of(state), self.report, self.stopped
            )
            if results is None:
                return {}, None
            for split, numbers in results.items():
                self.report.write(now, split, numbers)
                self.report.say(f"step {now} {split}: {sentence(numbers)}")
            if now >= self.run.total_steps or time.monotonic() - self.drawn > SECONDS_A_PICTURE:
                headline = self.run.task.headline
                self.report.attempt("draw curves.png", pictures.curves, self.workdir, headline)
                self.drawn = time.monotonic()
        numbers = list(results.values())[-1]
        return numbers, self._rank(numbers)

    def _rank(self, numbers: dict[str, float]) -> float:
        headline = self.run.task.headline
        return -numbers[headline] if headline.endswith("loss") else numbers[headline]

    def _pictures(self, state: step.TrainState) -> None:
        variables = list(rows_of(state).values())[-1]
        drawn = draw(self.run, self.evaluate, variables)
        file, cell = self.workdir / "predictions.png", self.run.task.cell
        self.report.attempt("draw predictions.png", pictures.predictions, file, drawn, cell)


def describe(run: Run, say: Callable[[str], None]) -> None:
    """Says what is about to run: devices, model, data, durations."""
    params = run.abstract_state.params
    say(f"devices: {mesh.describe(run.mesh)}")
    say(
        f"model: {run.config['model']['target']}, {cost.parameters(params):,} parameters, "
        f"{cost.human(flops_per_image(run))}FLOPs per image ({cost.RULE})"
    )
    say(
        f"data: {run.config['data']['name']}, {len(run.train_data):,} pictures to learn from, "
        f"{len(run.eval_data):,} held out, {len(run.eval_data.class_names)} classes"
    )
    for remark in run.remarks:
        say(f"data: {remark}")
    shapes = ", ".join(
        f"{name} {list(value.shape)} {value.dtype}" for name, value in run.abstract_batch.items()
    )
    say(f"batch: {shapes}")
    say(
        f"steps: {run.total_steps:,} of {run.config['batch_size']} pictures, "
        f"{run.steps_per_epoch:.1f} an epoch, {run.warmup_steps:,} of them warm-up"
    )


def flops_per_image(run: Run) -> int:
    """FLOPs of one forward pass of one picture, by the rule of `vit_jax.cost`."""
    state = run.abstract_state
    one = {
        k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype) for k, v in run.abstract_batch.items()
    }
    variables = {"params": state.params, **state.model_state}
    return cost.flops(partial(step.forward, model=run.model), variables, one)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM add their number to the list; a second one acts at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread may install handlers
        return

    def handle(number: int, _frame: Any) -> None:
        came.append(number)
        for each, old in before.items():
            signal.signal(each, old)

    before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for each, old in before.items():
            signal.signal(each, old)
