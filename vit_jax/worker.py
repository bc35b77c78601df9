"""A process that makes and times work when it is told to: how `vit_jax.benchmark` compares fairly.

The competitors of a comparison take turns, each in a process of its own, where the others sleep:
what disturbs the machine disturbs all of them. Orders come as lines of JSON on the standard input,
answers go as lines of JSON to what was the standard output; anything else that is printed goes to
the standard error.

    {"do": "prepare", ...}              -> what the competitor's `prepare` says of it
    {"do": "run", "seconds": 2.0}       -> {"times": [seconds of a step, ...]}
    {"do": "rate", "dtype": "float32"}  -> {"flops": of a large matrix product, each second}

An error is an answer too: {"error": text, "kind": "memory", "wrong" or "bug"}. This file imports
nothing but Python's own, for the peer's environment need not have JAX.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

CHUNK = 0.05  # seconds of work between two looks at the clock: the device is not made to wait


class Competitor(Protocol):
    """What a process does for its orders."""

    def prepare(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Builds, compiles and warms up what the order describes; the former work is given up."""
        ...

    def run(self, steps: int) -> None:
        """That many steps, finished when it returns."""
        ...

    def rate(self, dtype: str) -> float:
        """FLOP/s of a matrix product that fills the device."""
        ...

    def wrong(self, error: Exception) -> str:
        """Kind of an error: "memory", "wrong" for what a person asked for, else "bug"."""
        ...


def serve(make: Callable[[], Competitor]) -> None:
    """Answers orders until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    competitor = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            competitor = competitor or make()
            answer = _answer(competitor, order)
        except Exception as error:
            kind = "wrong" if isinstance(error, ImportError) else "bug"
            if competitor:
                kind = competitor.wrong(error)
            if kind == "bug":
                traceback.print_exc()
            text = str(error).strip() or type(error).__name__
            answer = {"error": text.splitlines()[0][:300], "kind": kind}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(competitor: Competitor, order: Mapping[str, Any]) -> dict[str, Any]:
    if order["do"] == "rate":
        return {"flops": competitor.rate(order["dtype"])}
    if order["do"] == "prepare":
        return competitor.prepare(order)
    return {"times": timed(competitor.run, order["seconds"])}


def timed(run: Callable[[int], None], seconds: float) -> list[float]:
    """Seconds of a step, several times, for about that long in all; steps of little are chunked."""
    began = time.perf_counter()
    run(1)
    steps = max(1, round(CHUNK / max(time.perf_counter() - began, 1e-6)))
    times, began = [], time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        before = time.perf_counter()
        run(steps)
        times.append((time.perf_counter() - before) / steps)
    return times


class WorkerError(Exception):
    """What a worker answered instead; `kind` as above, "memory" too if the system killed it."""

    def __init__(self, text: str, kind: str):
        super().__init__(text)
        self.kind = kind


class Worker:
    """A competitor's process, seen from the one that gives orders.

    Args:
      command: what starts it.
      environment: of it, besides this process's own.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._command, self._environment = list(command), os.environ | dict(environment or {})
        self._process = self._start()

    def _start(self) -> subprocess.Popen:
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(self._command, env=self._environment, **pipe)

    def ask(self, **order: Any) -> dict[str, Any]:
        """One order, answered; WorkerError if it failed. A process that died is started again."""
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self.close()
            self._process = self._start()
            kind = "memory" if status == -signal.SIGKILL else "bug"
            raise WorkerError(f"its process ended with status {status}", kind)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["kind"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
