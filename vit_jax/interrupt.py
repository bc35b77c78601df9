"""Long calls that a signal may cut short: Python alone would answer it only after them."""

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any, NoReturn, Protocol

SECONDS = 0.02  # between two looks at the list of signals
DONE, CUT = "done", "cut"  # the two words of a meeting


class CutError(Exception):
    """A signal came before the call was done; it goes on in its thread, and nobody waits for it."""


class Meeting(Protocol):
    """Where several processes come once each; `processes.Meeting` is one."""

    seconds: float  # between two looks

    def arrive(self) -> None:
        """Tells that it is there."""

    def full(self) -> bool:
        """Whether all are."""

    def say(self, word: str) -> None:
        """Of all that is said by anybody, the first word counts."""

    def word(self) -> str | None:
        """That word; None as long as nobody said one."""


class Interrupt:
    """Signals, and the long calls that they cut short.

    One of several processes must not leave the others alone in a collective. So such a call is made
    by all of them, and is done in all or cut in all, wherever the signal came.

    Attributes:
      came: to which the handler of a signal adds its number.
      cut: holds something once the waiting of this process is to end.
    """

    def __init__(self, came: list[int], meet: Callable[[], Meeting] | None = None):
        """`meet` gives the next place to meet; None if there is no other process."""
        self.came, self._meet = came, meet
        self.cut: list[int] = [] if meet else came

    def unless(self, function: Callable, *arguments: Any) -> Any:
        """What `function` returns or raises, which runs in a thread of its own.

        For compilation: minutes in which XLA lets other threads run, and no signal handler is
        called in the thread that compiles.

        Args:
          function: must leave alone what its caller would save, and wait for no other process.
          *arguments: of the function.

        Raises:
          CutError: as soon as a signal came, here or where another process makes the same call.
        """
        call = Call(function, *arguments)
        if self._meet:
            self._together(call, self._meet())
        while not call.done.wait(SECONDS):
            if self.came:
                raise CutError
        return call.outcome()

    def first(self, function: Callable, *arguments: Any) -> Any:
        """As `unless` if there are other processes, else simply what `function` returns."""
        return self.unless(function, *arguments) if self._meet else function(*arguments)

    def _together(self, call: "Call", meeting: Meeting) -> None:
        """Returns when the call is done in all processes; CutError in all, if that comes first."""
        arrived = False
        while (word := meeting.word()) is None:
            if self.came:
                meeting.say(CUT)
                continue
            if call.done.is_set() and not arrived:
                if call.error:
                    return  # the others end with this process
                meeting.arrive()
                arrived = True
            if arrived and meeting.full():
                meeting.say(DONE)
            elif arrived:
                time.sleep(meeting.seconds)
            else:
                call.done.wait(meeting.seconds)
        if word == CUT:
            self.cut.append(signal.SIGTERM)
            raise CutError


class Call:
    """A call in a thread of its own, from now on."""

    def __init__(self, function: Callable, *arguments: Any):
        self.done, self.error = threading.Event(), None
        self._function, self._arguments, self._result = function, arguments, None
        threading.Thread(target=self._run, name="compiling", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._function(*self._arguments)
        except BaseException as raised:
            self.error = raised
        finally:
            self.done.set()

    def outcome(self) -> Any:
        """What it returns or raises, once it does."""
        self.done.wait()
        if self.error:
            raise self.error
        return self._result


class Reader:
    """An iterator that a thread of its own reads, so that a signal ends the waiting for it.

    For batches that other processes make, which take seconds to start: they end with the thread
    that started them, so it lives as long as they do. Of several processes that train, all wait for
    the first item together; what comes later, a wish to stop travels with.
    """

    def __init__(self, items: Iterator, interrupt: Interrupt):
        """Reads an item whenever it is asked for one, and none in advance."""
        self._items, self._interrupt = items, interrupt
        self._ask = interrupt.first
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()
        self._found: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="reading", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> Any:
        """The next item; CutError if a signal came first."""
        ask, self._ask = self._ask, _plainly
        return ask(self._next)

    def _next(self) -> Any:
        self._wanted.put(True)
        while True:
            with suppress(queue.Empty):
                item, error = self._found.get(timeout=SECONDS)
                break
            if self._interrupt.cut:
                raise CutError
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Closes the iterator; does not wait for that where it may be busy for nobody."""
        self._wanted.put(False)
        if not self._interrupt.cut:
            self._thread.join()

    def _read(self) -> None:
        with closing(self._items) as items:
            while self._wanted.get():
                try:
                    self._found.put((next(items), None))
                except BaseException as error:
                    self._found.put((None, error))
                    return


def _plainly(function: Callable) -> Any:
    return function()


class FirstCalls:
    """A function of a batch that compiles for each shape of one, which a signal may cut short."""

    def __init__(self, function: Callable, interrupt: Interrupt):
        """`function.compile`, of the same arguments, makes a later call compile nothing."""
        self._function, self._interrupt = function, interrupt
        self._compiled: set[tuple] = set()

    def __call__(self, variables: Any, batch: dict[str, Any]) -> Any:
        """What the function returns; CutError if a signal came while it was compiled."""
        shapes = shapes_of(batch)
        if shapes not in self._compiled:
            self._interrupt.unless(self._function.compile, variables, batch)
            self._compiled.add(shapes)
        return self._function(variables, batch)


def shapes_of(batch: dict[str, Any]) -> tuple:
    """What a program is compiled for anew: the shape of each entry of a batch."""
    return tuple(sorted((name, tuple(array.shape)) for name, array in batch.items()))


def leave(status: int) -> NoReturn:
    """Ends the process at once, although a thread of `unless` may still be at work."""
    for child in multiprocessing.active_children():  # which may not yet know that they are to end
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
