"""Ends a process that no longer gets anywhere, with the stack of every thread."""

import faulthandler
import sys
import time
from types import TracebackType

PATIENCE = 4  # times as long for what compiles


class Watchdog:
    """A timer that a run winds up whenever something is finished; a context manager.

    Where it runs down, the stacks of all threads go to stderr and the process ends with status 1.
    The timer is a thread of C: it also ends a main thread that waits for ever inside of XLA, for
    another host or a device, which no heartbeat of `jax.distributed` notices.

    There is one timer in a process, Python's `faulthandler.dump_traceback_later`.
    """

    def __init__(self, seconds: float):
        """`seconds` until it ends the process; 0 is never. One without a stderr is never ended."""
        self.seconds = seconds if sys.__stderr__ is not None else 0
        self._wound = 0.0  # when
        self._known: set[str] = set()  # what has compiled

    def __enter__(self) -> "Watchdog":
        self.patient()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Something was finished: the time starts anew. Winding costs 0.2 ms, so once a second."""
        if self.seconds and time.monotonic() - self._wound >= min(1.0, self.seconds / 4):
            self._wind(self.seconds)
            self._wound = time.monotonic()

    def patient(self, what: str = "") -> None:
        """Something begins that may compile: until the next `alive`, the time is longer.

        What has a name compiles only the first time.
        """
        if self.seconds and what not in self._known:
            self._known |= {what} - {""}
            self._wind(PATIENCE * self.seconds)
            self._wound = -self.seconds  # so that the next `alive` counts

    def _wind(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
