"""Faults made on purpose, so that what a run survives is tested without chance.

The environment variable `VIT_JAX_FAULT` lists them, with commas between: `nan@12,enospc@save2`.

    nan@12          the pictures of step 12 are not finite; `nan@12+` from step 12 on, for ever
    hang@20         the main thread sleeps for ever before step 20
    oom@3           the device's out-of-memory error at step 3
    kill@15         SIGKILL to this process before step 15; what was saved may still be in flight
    term@15         SIGTERM to this process before step 15, which is then made and saved
    enospc@save2    files of more than a few thousand bytes cannot be written from the second save
                    of this process until the next one, as on a full disk; `+` as above
    kill@save2      SIGKILL once the second save of this process was handed to the writing threads
    term@save2      SIGTERM at that moment
    hang@save2      the main thread sleeps for ever at that moment
    hang@eval1      the main thread sleeps for ever in the first evaluation of this process
    kill@eval1      SIGKILL in the first evaluation of this process; `term@eval1` SIGTERM

Steps are counted as they are printed, from 1, through all processes of a run. Saves and evaluations
are counted from 1 in each process, so that a run that was killed and started again with the same
variable is killed again, a little later each time. Where the variable is not set, nothing is
called in a step.
"""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_jax.errors import ConfigError, nearest

VARIABLE = "VIT_JAX_FAULT"
FITS = 4096  # bytes of a file that a full disk still takes
PLACES = {  # where each kind of fault may be
    "nan": ("step",),
    "oom": ("step",),
    "enospc": ("save",),
    "hang": ("step", "save", "eval"),
    "kill": ("step", "save", "eval"),
    "term": ("step", "save", "eval"),
}


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, the place and its number there, and whether it lasts."""

    kind: str
    place: str
    number: int
    lasts: bool

    def due(self, place: str, number: int) -> bool:
        """Whether it strikes at this number of this place."""
        here = place == self.place
        return here and (number >= self.number if self.lasts else number == self.number)


class Faults:
    """The faults of one process; false where there are none."""

    def __init__(self, faults: tuple[Fault, ...] = ()):
        self._faults = faults
        self._seen: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._faults)

    def step(self, number: int, batch: dict[str, Any]) -> dict[str, Any]:
        """The host's batch of a step, with its pictures spoilt if that is due."""
        kinds = self._due("step", number)
        _strike(kinds)
        if "oom" in kinds:
            raise _out_of_memory()
        if "nan" in kinds:
            batch = batch | {"image": np.full_like(batch["image"], np.nan)}
        return batch

    def before_save(self) -> None:
        """Called before a checkpoint is handed over: from here on the disk may be full."""
        self._seen["save"] += 1
        if any(fault.kind == "enospc" for fault in self._faults):
            import resource

            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            full = "enospc" in self._due("save", self._seen["save"])
            resource.setrlimit(resource.RLIMIT_FSIZE, (FITS if full else most, most))

    def after_save(self) -> None:
        """Called while the checkpoint is being written."""
        _strike(self._due("save", self._seen["save"]))

    def evaluation(self) -> None:
        """Called once in each evaluation."""
        self._seen["eval"] += 1
        _strike(self._due("eval", self._seen["eval"]))

    def _due(self, place: str, number: int) -> set[str]:
        return {fault.kind for fault in self._faults if fault.due(place, number)}


NONE = Faults()


def read(environment: Mapping[str, str] = os.environ) -> Faults:
    """The faults that the environment asks for.

    Raises:
      ConfigError: naming one that is not understood, and what there is.
    """
    text = environment.get(VARIABLE, "")
    return Faults(tuple(_fault(part.strip()) for part in text.split(",") if part.strip()))


def _fault(text: str) -> Fault:
    found = re.fullmatch(r"(\w+)@([a-z]*)(\d+)(\+?)", text)
    if not found:
        raise ConfigError(f"{VARIABLE}: {text!r} is no fault; write such as nan@12 or kill@save2")
    kind, place, number, lasts = found.groups()
    if kind not in PLACES:
        raise ConfigError(f"{VARIABLE}: there is no fault {kind!r}.{nearest(kind, PLACES)}")
    place = place or "step"
    if place not in PLACES[kind]:
        places = [name.removeprefix("step") + "N" for name in PLACES[kind]]
        raise ConfigError(f"{VARIABLE}: {text!r}: {kind} is at {' or '.join(places)}")
    if int(number) < 1:
        raise ConfigError(f"{VARIABLE}: {text!r}: numbers start at 1")
    return Fault(kind, place, int(number), bool(lasts))


def _strike(kinds: set[str]) -> None:
    """Does to this process what does not depend on the place."""
    if "kill" in kinds:
        os.kill(os.getpid(), signal.SIGKILL)
    if "term" in kinds:
        os.kill(os.getpid(), signal.SIGTERM)
    while "hang" in kinds:
        time.sleep(1)


def _out_of_memory() -> Exception:
    """What XLA raises where an allocation does not fit."""
    import jax

    return jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 123456789012 bytes."
    )
