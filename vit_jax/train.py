"""The loop: the one place that sees clock, disk and devices together."""

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import bucket, checkpoint, cost, faults, heap, mesh, processes, step
from vit_jax.broken import BrokenPictures
from vit_jax.contracts import Batch, Sums
from vit_jax.errors import CheckpointError, DivergedError
from vit_jax.evaluate import (
    EvalStep,
    broken_pictures,
    draw,
    evaluate_split,
    memory_errors,
    reader,
    rows_of,
)
from vit_jax.interrupt import Call, CutError, FirstCalls, Interrupt, shapes_of
from vit_jax.lock import only_run
from vit_jax.report import Report, read_metrics, sentence
from vit_jax.run import Run, check_owner, claim, set_up
from vit_jax.watchdog import Watchdog

SECONDS_A_PICTURE = 20  # between drawings of the curves, which take half a second
IN_FLIGHT = 2  # steps that run ahead of the numbers a person sees
NAMED = 8  # examples of a batch whose update was skipped
PREDICTIONS = "predictions.png"
HEALTH = ("grad_norm", "finite")  # what `train_step` adds to the task's sums


class StoppedError(Exception):
    """A signal asked the run to stop; what it had is saved.

    Attributes:
      exit_status: what a shell calls a process that died of that signal.
      compiling: whether a thread is left that the process must not await: it compiles, or waits
        for other processes to read pictures.
    """

    def __init__(self, number: int, *, compiling: bool = False):
        super().__init__(signal.Signals(number).name)
        self.exit_status, self.compiling = 128 + number, compiling


def train(config: dict[str, Any], workdir: str | Path) -> dict[str, float]:
    """Trains what `config` describes in `workdir`, going on where an earlier run stopped.

    Args:
      config: as `main.parse` gives it.
      workdir: the run folder, or `gs://BUCKET/RUN`.

    Returns:
      The last evaluation's numbers.

    Raises:
      ConfigError, DataError: before anything is written, if the config or the data is wrong.
      DataError: later, if too many pictures are broken.
      CheckpointError: if the folder belongs to another run, another process is training in it, or
        the last checkpoint was not written.
      DivergedError: when too many updates in a row were not finite; no checkpoint is.
      OutOfMemoryError: if the step does not fit.
      StoppedError: after Ctrl-C or SIGTERM, with the current step saved.
    """
    planned = faults.read()
    with bucket.run_folder(workdir) as folder:
        run = set_up(config, workdir=folder.files)
        processes.first_does(_claim, folder, run)
        with ExitStack() as held, Watchdog(config["hang_seconds"]) as watchdog:
            processes.first_does(_enter, folder, held)
            check_owner(folder.files, config)  # two may have claimed it in the same moment
            return _train(run, folder, planned, watchdog)


def _claim(folder: bucket.Folder, run: Run) -> None:
    claim(folder.files, run.config, run.train_data.class_names, run.tokenizer)
    folder.claim()


def _enter(folder: bucket.Folder, held: ExitStack) -> None:
    held.enter_context(only_run(folder.files))
    folder.claim()  # who is in it; a bucket that cannot be written says so now


def _train(
    run: Run, folder: bucket.Folder, planned: faults.Faults, watchdog: Watchdog
) -> dict[str, float]:
    """As `train`, in a folder that belongs to this process."""
    config = run.config
    warnings: list[str] = []
    checkpoints = checkpoint.Checkpoints(
        folder.root, **config["checkpoint"], warn=warnings.append, faults=planned
    )
    restored = checkpoints.restore(run.abstract_state)
    # A fresh state is made while the step compiles: neither alone keeps two cores busy.
    state, start = restored or (Call(run.init), 0)
    durations = run.total_steps, run.steps_per_epoch, config["batch_size"], start
    quiet = not processes.first()
    with Report(folder.files, *durations, quiet=quiet) as report, signals() as stopped:
        checkpoints.warn = report.warn
        for text in warnings:
            report.warn(text)
        try:
            loop = _Loop(run, folder, report, checkpoints, stopped, watchdog, planned, start)
            numbers = loop.go(state, start)
        finally:
            written = checkpoints.close()
        if not written:
            raise CheckpointError(f"the run ended, but {checkpoints.failure}")
        return numbers


class _TrainStep:
    """The training step, compiled once for each shape that batches come in."""

    def __init__(self, run: Run, report: Report, watchdog: Watchdog, interrupt: Interrupt):
        self._run, self._report, self._watchdog = run, report, watchdog
        self._interrupt = interrupt
        self._compiled: dict[tuple, Callable] = {}
        self._compile(run.abstract_batch)

    def __call__(
        self, state: step.TrainState, batch: Batch, *, key: jax.Array
    ) -> tuple[step.TrainState, Sums]:
        shapes = shapes_of(batch)
        if shapes not in self._compiled:
            with self._report.paused():
                self._compile(batch)
        return self._compiled[shapes](state, batch, key=key)

    def _compile(self, batch: Batch) -> None:
        began = time.monotonic()
        self._watchdog.patient()
        size = "x".join(map(str, batch["image"].shape[1:3])) if self._compiled else ""
        self._report.say(f"compiling the training step {f'for {size} pixels ' * bool(size)}...")
        compiled = self._interrupt.unless(self._run.compile_train_step, batch)
        heap.bound(cost.taken(compiled))
        self._compiled[shapes_of(batch)] = compiled
        self._watchdog.alive()
        self._report.say(f"compiled in {time.monotonic() - began:.0f} s")


class _Loop:
    """One run from `start` to its end; what is here lives as long as the process."""

    def __init__(
        self,
        run: Run,
        folder: bucket.Folder,
        report: Report,
        checkpoints: checkpoint.Checkpoints,
        stopped: list[int],
        watchdog: Watchdog,
        planned: faults.Faults,
        start: int,
    ):
        self.run, self.folder, self.report, self.faults = run, folder, report, planned
        self.workdir, self.watchdog = folder.files, watchdog
        self.checkpoints, self.stopped = checkpoints, stopped
        self.interrupt = Interrupt(stopped, None if processes.alone() else processes.Meeting)
        self.evaluate = FirstCalls(EvalStep(run), self.interrupt)
        self.compiling = False  # whether a signal has cut a long call short
        self.rate = jax.jit(run.schedule)  # one program: its parts would each wait for a number
        per_epoch = max(int(run.steps_per_epoch), 1)
        self.eval_every = run.config["eval_every"] or per_epoch
        self.checkpoint_every = run.config["checkpoint_every"] or self.eval_every
        self.log_every = run.config["log_every"] or max(min(per_epoch // 4, 50), 1)
        self.broken = BrokenPictures(
            self.workdir,
            report,
            start=start,
            examples=len(run.train_data),
            most=run.config["data"]["max_broken"],
        )
        self.skipped = 0  # updates in a row
        self.told_to_stop = False  # by any of several processes
        self.drawn = -np.inf  # when the curves were

    def go(self, state: step.TrainState | Call, start: int) -> dict[str, float]:
        """From a state to the end of the run; the last evaluation's numbers.

        At step 0 the state may be still to come.
        """
        run, report, total = self.run, self.report, self.run.total_steps
        ranked = "validation_ema" if run.config["ema"] > 0 else "validation"
        rows = [r for r in read_metrics(self.workdir) if r["split"] == ranked]
        rows = processes.from_first(rows)  # another host may see the file as it was
        evaluated = any(r["step"] == start for r in rows)
        if start >= total and evaluated:
            report.say(
                f"finished already: {total} steps; {sentence(rows[-1])}; see {self.folder.root}"
            )
            drawn = (self.workdir / PREDICTIONS).exists()
            if not processes.from_first(drawn):  # it was killed on the last yards
                self._pictures(state)
            return rows[-1]
        describe(run, report.say)
        if start:
            report.say(f"going on from step {start} of {total}")
        best = max((self._rank(r) for r in rows), default=-np.inf)
        numbers: dict[str, float] = {}
        if start and (start % self.eval_every == 0 or start == total) and not evaluated:
            numbers, rank = self._evaluate(state, start)  # the run was stopped before this row
            if self._asked():
                raise self._stop(start, state)
            if rank is not None:
                self.checkpoints.rank(start, rank)
                best = max(best, rank)
        if start < total:
            with report.paused(), memory_errors(run):
                try:
                    train_step = _TrainStep(run, report, self.watchdog, self.interrupt)
                    if isinstance(state, Call):
                        state = self.interrupt.unless(state.outcome)
                except CutError:
                    self.compiling = True
                    raise self._stop(start, state) from None
            with closing(reader(run, run.batches(start), self.interrupt)) as batches:
                state, numbers = self._steps(train_step, batches, state, start, best)
        self._pictures(state)
        report.say(f"finished: {sentence(numbers)}; see {self.folder.root}")
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
        row = _Row(self.checkpoints.notes.get("row"))
        for now in range(start + 1, total + 1):
            try:
                with report.waiting():
                    batch = next(batches)
                self.broken.check(now, batch, self._what_is_broken)
                with memory_errors(run):
                    if self.faults:
                        batch = self.faults.step(now, batch)
                    if not processes.alone():
                        asked = np.full(len(batch["valid"]), bool(self.stopped))
                        batch = batch | {"stop": asked}
                    state, new = train_step(state, mesh.put_batch(batch, run.mesh), key=key)
            except CutError:  # while it waited for a batch, or compiled for one of another shape
                self.compiling = True
                self._drain(pending, row)
                raise self._stop(now - 1, state, row) from None
            pending.append((now, new, batch["index"]))
            with memory_errors(run):
                while len(pending) > (IN_FLIGHT if now < total else 0):
                    row.add(self._fetch(*pending.popleft()))
            if now % self.log_every == 0 or now == total:
                self._drain(pending, row)
                self._log(now, row)
                row = _Row()
            last, rank = now == total, None
            if (now % self.eval_every == 0 or last) and not self._asked():
                numbers, rank = self._evaluate(state, now)
            stop = self._asked()  # a signal may also have cut the evaluation short
            improved = rank is not None and rank > best
            if stop or last or improved or now % self.checkpoint_every == 0:
                self._drain(pending, row)
                self._save(now, state, row, rank)
            best = best if rank is None else max(best, rank)
            if stop and not (last and rank is not None):
                raise self._stop(now, state, row)
        return state, numbers

    def _drain(self, pending: deque, row: "_Row") -> None:
        """Waits for the steps that run ahead."""
        while pending:
            row.add(self._fetch(*pending.popleft()))

    def _save(self, now: int, state: step.TrainState, row: "_Row", rank: float | None) -> None:
        with self.report.paused():
            self.watchdog.patient("save")
            if not step.all_finite(state):
                raise DivergedError(
                    f"step {now}: parameters, statistics or optimizer are not finite, although "
                    "loss and gradient were; they are not saved. A smaller learning_rate helps"
                )
            # A run that goes on from here writes nothing of before it again: its rows have to be
            # where they stay before this checkpoint is one.
            self.report.flush()
            self._push()
            self.checkpoints.save(now, state, rank=rank, notes={"row": row.notes()})
            self.watchdog.alive()

    def _push(self) -> None:
        """What was written reaches a bucket; a folder of the file system has it already."""
        try:
            self.folder.push()
        except OSError as error:  # a checkpoint without its rows is worth more than none
            self.report.warn(f"files could not be copied to {self.folder.root} yet: {error}")

    def _stop(self, now: int, state: step.TrainState, row: "_Row | None" = None) -> Exception:
        """Saves what there is; the error that ends the run."""
        if now:
            self._save(now, state, row or _Row(self.checkpoints.notes.get("row")), None)
        if not self.checkpoints.wait():
            return CheckpointError(f"stopped at step {now}, but {self.checkpoints.failure}")
        saved = "which is saved" if now else "of which there is nothing to save"
        self.report.say(f"stopped at step {now}, {saved}; the same command goes on from here")
        number = self.stopped[0] if self.stopped else signal.SIGTERM
        # Processes that read end with this one: sooner than if they were asked to.
        compiling = self.compiling or self.run.config["data"]["workers"] > 0
        return StoppedError(number, compiling=compiling)

    def _asked(self) -> bool:
        """Whether a signal came: of several processes to any, as all know it at the same step."""
        return self.told_to_stop or (processes.alone() and bool(self.stopped))

    def _fetch(self, now: int, sums: dict, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A finished step's sums on the host; says it if that update was not made.

        Raises:
          DivergedError: if it is one too many in a row.
        """
        sums = jax.device_get(sums)
        self.told_to_stop |= bool(sums.pop("stop", False))
        self.watchdog.alive()
        if sums["finite"]:
            self.skipped = 0
            return sums
        self.skipped += 1
        shown = [self.run.train_data.name(int(i)) for i in indices[:NAMED]]
        more = f" and {len(indices) - NAMED} more" * (len(indices) > NAMED)
        text = (
            f"step {now}: loss {sums['loss'] / max(sums['count'], 1):.4g}, gradient norm "
            f"{sums['grad_norm']:.4g}, not finite: that update was not made"
        )
        examples = f"the batch: {', '.join(shown)}{more}"
        if self.skipped < self.run.config["max_skipped"]:
            self.report.warn(f"{text}, {self.skipped} in a row; {examples}")
            return sums
        good = self.checkpoints.steps()
        raise DivergedError(
            f"{text}, and none of the last {self.skipped} was; {examples}. The last checkpoint is "
            f"{f'of step {good[-1]}' if good else 'none yet'}, all of it finite. A smaller "
            "learning_rate, a longer warm-up or optimizer.clip helps"
        )

    def _log(self, now: int, row: "_Row") -> None:
        """A row of the steps since the last one."""
        numbers = {}
        if row.made:
            numbers = self.run.task.summarize(row.sums)
            numbers["grad_norm"] = row.grad_norm / row.made
        numbers["learning_rate"] = float(jax.device_get(self.rate(jax.device_put(now - 1))))
        if row.skipped:
            numbers["skipped_updates"] = float(row.skipped)
        if self.broken.known:
            numbers["broken_pictures"] = float(len(self.broken.known))
        self.report.progress(now, numbers)
        self.report.write(now, "train", numbers)

    def _what_is_broken(self, batch: Batch) -> list[str]:
        return broken_pictures(self.run, batch, self.run.train_data)

    def _evaluate(self, state: step.TrainState, now: int) -> tuple[dict[str, float], float | None]:
        """Numbers of the whole validation split, and the rank of this state; a row for each."""
        with self.report.paused():
            if self.faults:
                self.faults.evaluation()
            self.watchdog.patient("evaluation")
            try:
                with memory_errors(self.run):
                    results = evaluate_split(
                        self.run,
                        self.evaluate,
                        rows_of(state),
                        self.report,
                        self.interrupt,
                        self.watchdog.alive,
                    )
            except CutError:
                self.compiling, results = True, None
            if results is None:
                self.told_to_stop = True
                return {}, None
            for split, numbers in results.items():
                self.report.write(now, split, numbers)
                self.report.say(f"step {now} {split}: {sentence(numbers)}")
            if now >= self.run.total_steps or time.monotonic() - self.drawn > SECONDS_A_PICTURE:
                headline = self.run.task.headline
                if processes.first():
                    from vit_jax import pictures  # Matplotlib, which the first step need not await

                    self.report.attempt("draw curves.png", pictures.curves, self.workdir, headline)
                self.drawn = time.monotonic()
            self._push()
            self.watchdog.alive()
        heap.bound()
        numbers = list(results.values())[-1]
        return numbers, self._rank(numbers)

    def _rank(self, numbers: dict[str, float]) -> float:
        headline = self.run.task.headline
        return -numbers[headline] if headline.endswith("loss") else numbers[headline]

    def _pictures(self, state: step.TrainState) -> None:
        variables = list(rows_of(state).values())[-1]
        try:
            drawn = draw(self.run, self.evaluate, variables)
        except CutError:  # these pictures have a shape of their own; the same command draws them
            self.compiling = True
            raise self._stop(self.run.total_steps, state) from None
        file, cell = self.workdir / PREDICTIONS, self.run.task.cell
        if processes.first():
            from vit_jax import pictures

            self.report.attempt("draw predictions.png", pictures.predictions, file, drawn, cell)


class _Row:
    """Sums of the steps since the last row; what a skipped update has summed stays out.

    They are kept with each checkpoint, so that a run that goes on within a row writes it whole.
    """

    def __init__(self, notes: dict[str, Any] | None = None):
        """From what `notes` returned, or empty."""
        notes = notes or {}
        self.made, self.skipped = notes.get("made", 0), notes.get("skipped", 0)
        self.grad_norm = notes.get("grad_norm", 0.0)
        self.sums = {k: np.asarray(v, np.float64) for k, v in notes.get("sums", {}).items()}

    def add(self, step: dict[str, np.ndarray]) -> None:
        """One step's sums and health."""
        if not step["finite"]:
            self.skipped += 1
            return
        self.made += 1
        self.grad_norm += float(step["grad_norm"])
        for name, value in step.items():
            if name not in HEALTH:
                self.sums[name] = self.sums.get(name, 0) + np.asarray(value, np.float64)

    def notes(self) -> dict[str, Any]:
        """Plain data of JSON; none for an empty row."""
        if not self.made + self.skipped:
            return {}
        sums = {name: value.tolist() for name, value in self.sums.items()}
        counts = {"made": self.made, "skipped": self.skipped, "grad_norm": self.grad_norm}
        return counts | {"sums": sums}


def describe(run: Run, say: Callable[[str], None]) -> None:
    """Says what is about to run: devices, model, data, durations."""
    params = run.abstract_state.params
    say(f"devices: {mesh.describe(run.mesh)}")
    say(
        f"model: {run.config['model']['target']}, {cost.parameters(params):,} parameters, "
        f"{cost.human(run.flops)}FLOPs per image ({cost.RULE})"
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


@contextmanager
def signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM add their number to the list; a second one acts at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread may install handlers
        return

    def handle(number: int, _frame: Any) -> None:
        came.append(number)
        for each in before:  # not Python's own, which would wait for what is being written
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for each, old in before.items():
            signal.signal(each, old)
