"""What a person reads of a run: a progress line, log.txt, metrics.jsonl and TensorBoard."""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from vit_jax import cost

METRICS, LOG, TENSORBOARD = "metrics.jsonl", "log.txt", "tensorboard"
FLUSH_SECONDS = 30  # between flushes of the TensorBoard file, each of which waits for the disk
LAPS = 20  # progress calls over which the speed is averaged for the time that is left
NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class Report:
    """Tells what a run does, on the terminal and in its folder; a context manager.

    On a terminal the progress line stays in place and the rest scrolls above it; in a pipe and in
    log.txt it is a plain line now and then. Nothing here stops a run: what the disk refuses is said
    once and counted in `lost`.
    """

    def __init__(
        self,
        workdir: str | Path | None,
        total_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        start_step: int = 0,
        *,
        interval: float = 10.0,
        quiet: bool = False,
    ):
        """Makes the folder where it is missing, and drops rows of steps after `start_step`.

        A run that was killed wrote those rows after its last checkpoint; the one that goes on from
        that checkpoint writes them again.

        Args:
          workdir: the run folder; None writes nothing.
          total_steps: of the whole run.
          steps_per_epoch: tells the epoch of a step.
          batch_size: examples of a step.
          start_step: the step that this process goes on from.
          interval: seconds between two plain progress lines.
          quiet: of several processes, one that is not to write and speak: it only warns.
        """
        self.workdir = None if workdir is None or quiet else Path(workdir)
        self.quiet = quiet
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.batch_size, self.start_step, self.interval = batch_size, start_step, interval
        self.lost = 0
        self._said: set[str] = set()  # which failures
        self._clock = _Clock(start_step)
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._console = Console() if terminal else None
        self._live: Live | None = None
        self._last_line = self._last_flush = -math.inf
        self._events: Any = None  # tensorboardX's
        self._opened = False
        if self.workdir is not None:
            self.attempt("open the run folder", self._open)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.lost:
            self.warn(f"{self.lost} writes failed: what they held is missing in {self.workdir}")
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()
        if self._events is not None:
            self.attempt("close the TensorBoard file", self._events.close)

    def waiting(self) -> Any:
        """A context: its time is spent waiting for data. Time before the first one is no step's."""
        return self._clock.timed("waiting")

    def paused(self) -> Any:
        """A context: its time is an evaluation's, a checkpoint's or a compilation's."""
        return self._clock.timed("paused")

    def progress(self, step: int, numbers: dict[str, float]) -> None:
        """Shows where the run is; `numbers` are those of the steps since the last call."""
        rate, waited, left = self._clock.lap(step, self.total_steps)
        line = " | ".join(
            (
                f"step {step}/{self.total_steps}",
                f"epoch {step / self.steps_per_epoch:.1f}",
                f"{math.floor(100 * step / self.total_steps)} %",
                f"ETA {_duration(left)}",
                f"{_short(rate * self.batch_size)} images/s",
                f"waiting for data {100 * waited:.0f} %",
                sentence(numbers),
                f"memory {cost.human(_memory())}B",
            )
        )
        if self.quiet:
            return
        if self._console is not None:
            self._draw(Group(Text(line), ProgressBar(self.total_steps, step)))
        now = time.monotonic()
        if now - self._last_line >= self.interval or step >= self.total_steps:
            self._last_line = now
            if self._console is None:
                self._show(line)
            self._note(line)

    def say(self, text: str) -> None:
        """A line above the progress line, and in log.txt with the time."""
        if self.quiet:
            return
        self._show(text)
        self._note(text)

    def warn(self, text: str) -> None:
        """As `say`, with "warning: " before it; yellow on a terminal."""
        self._show(f"warning: {text}", "yellow")
        self._note(f"warning: {text}")

    def write(self, step: int, split: str, numbers: dict[str, float]) -> None:
        """A row of metrics.jsonl, and the same numbers in TensorBoard as `split/name`.

        A row is {"step": 230, "epoch": 10.0, "split": "train", "loss": 0.3, ...}. JSON has no word
        for a number that is not finite; it is the string "NaN", "Infinity" or "-Infinity", which
        `read_metrics` turns back.

        Args:
          step: updates so far.
          split: "train", "validation" or "validation_ema".
          numbers: names to numbers.
        """
        if self.workdir is None:
            return
        numbers = {name: float(value) for name, value in numbers.items()}
        row = {"step": int(step), "epoch": round(step / self.steps_per_epoch, 4), "split": split}
        row |= {k: v if math.isfinite(v) else NOT_FINITE[str(v)] for k, v in numbers.items()}
        self.attempt(f"write {METRICS}", self._write_row, json.dumps(row, allow_nan=False))
        self.attempt("write TensorBoard's numbers", self._write_events, step, split, numbers)

    def flush(self) -> None:
        """Everything that was written is in the files: what a kill leaves."""
        if self._events is not None:
            self.attempt("write TensorBoard's numbers", self._events.flush)
            self._last_flush = time.monotonic()

    def attempt(self, what: str, function: Callable, *arguments: Any) -> Any:
        """What `function` returns, or None with a warning where the disk refuses it.

        For what is worth less than the run: the first failure of each kind is said, all count.
        """
        try:
            return function(*arguments)
        except OSError as error:
            self.lost += 1
            if what not in self._said:
                self._said.add(what)
                self.warn(f"CANNOT {what}: {error}. The run goes on; such failures are counted")
            return None

    def _open(self) -> None:
        """Makes the folder and keeps the rows up to `start_step`, by replacing the file at once."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        path = self.workdir / METRICS
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = [x for x in lines if (row := _parse(x)) and row["step"] <= self.start_step]
        if len(kept) < len(lines):
            new = path.with_suffix(".tmp")
            new.write_bytes(b"".join(line + b"\n" for line in kept))
            os.replace(new, path)
        self._opened = True

    def _write_row(self, line: str) -> None:
        if not self._opened:  # the disk refused it before
            self._open()
        _append(self.workdir / METRICS, line)

    def _write_events(self, step: int, split: str, numbers: dict[str, float]) -> None:
        # `SummaryWriter` writes in a thread, which dies of a full disk, after which a full queue
        # blocks the run for ever; this is the part of it that does the writing. Imported here, as
        # it takes its time, and more where Google's storage is installed: the first step has none.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        if self._events is None:
            folder = self.workdir / TENSORBOARD
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
            start = Event(
                wall_time=time.time(),
                step=self.start_step + 1,  # TensorBoard forgets what it has from here on
                session_log=SessionLog(status=SessionLog.START),
            )
            self._events.write_event(start)
        values = [Summary.Value(tag=f"{split}/{k}", simple_value=v) for k, v in numbers.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._events.write_event(event)
        if time.monotonic() - self._last_flush > FLUSH_SECONDS or split != "train":
            self._events.flush()
            self._last_flush = time.monotonic()

    def _show(self, text: str, style: str = "") -> None:
        encoding = sys.stdout.encoding or "utf-8"  # which may lack what a file's name holds
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        with suppress(OSError):  # a closed pipe, or a terminal that is gone: the run goes on
            if self._console is None:
                print(text, flush=True)
            else:
                self._console.print(Text(text, style), soft_wrap=True)

    def _draw(self, view: Any) -> None:
        with suppress(OSError):
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(view, refresh=True)

    def _note(self, text: str) -> None:
        if self.workdir is None:
            return
        try:
            _append(self.workdir / LOG, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        except OSError:
            self.lost += 1  # not said: saying it would come back here


class _Clock:
    """Where the time goes: into steps, waiting for data, and pauses."""

    def __init__(self, step: int):
        self.step, self.since, self.started = step, time.monotonic(), False
        self.spent = {"waiting": 0.0, "paused": 0.0}  # seconds since the last lap
        self.laps: deque = deque(maxlen=LAPS)  # (steps, seconds without pauses)
        self.steps = self.pauses = 0
        self.total = self.longest = 0.0  # seconds of all pauses, and of the longest

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        if kind == "waiting" and not self.started:  # what was before is start-up: compilation
            self.started, self.since = True, time.monotonic()
            self.spent = dict.fromkeys(self.spent, 0.0)
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[kind] += time.monotonic() - began

    def lap(self, step: int, total_steps: int) -> tuple[float, float, float]:
        """Steps a second and share of waiting since the last lap, and the seconds left."""
        now, steps = time.monotonic(), step - self.step
        paused = self.spent["paused"]
        seconds = max(now - self.since - paused, 1e-9)
        share = min(self.spent["waiting"] / seconds, 1.0)
        self.laps.append((steps, seconds))
        self.steps += steps
        if paused:
            self.pauses += 1
            self.total, self.longest = self.total + paused, max(self.longest, paused)
        self.step, self.since, self.spent = step, now, dict.fromkeys(self.spent, 0.0)
        # The longest pause is the first evaluation, which compiles: it says nothing of the others.
        usual = (self.total - self.longest) / max(self.pauses - 1, 1)
        done = max(sum(n for n, _ in self.laps), 1)
        per_step = sum(s for _, s in self.laps) / done + usual * self.pauses / max(self.steps, 1)
        return steps / seconds, share, (total_steps - step) * per_step


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in the order written; none where there is no file.

    Lines that are no row (the last one of a killed run) are left out.
    """
    path = Path(workdir) / METRICS
    rows = [_parse(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    words = NOT_FINITE.values()
    return [{k: float(v) if v in words else v for k, v in row.items()} for row in rows if row]


def sentence(numbers: dict[str, Any]) -> str:
    """{"loss": 0.31, "accuracy": 0.978} -> "loss 0.31, accuracy 97.80 %"; also of a row."""
    parts = []
    for name, value in numbers.items():
        if name in ("step", "epoch", "split") or name.startswith("iou_"):
            continue  # a class's own number is in metrics.jsonl
        text = f"{100 * value:.2f} %" if name.startswith("accuracy") else f"{value:.4g}"
        parts.append(f"{name.replace('_', ' ').replace('grad norm', 'gradient norm')} {text}")
    return ", ".join(parts)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"step", "split"} <= row.keys() else None


def _append(path: Path, line: str) -> None:
    """Adds a line with one write, or nothing: half a line would spoil the next one."""
    data = f"{line}\n".encode("utf-8", "backslashreplace")
    with open(path, "ab", buffering=0) as file:
        written = file.write(data)
        if written < len(data):
            file.truncate(file.tell() - written)
            raise OSError(f"only {written} of {len(data)} bytes fit on the disk")


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _memory() -> int:
    """Peak bytes of the fullest device, where the backend tells; else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
