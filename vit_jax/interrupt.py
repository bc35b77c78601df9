"""Long calls that a signal may cut short: Python alone would answer it only after them."""

import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any, NoReturn

SECONDS = 0.02  # between two looks at the list of signals


class CutError(Exception):
    """A signal came before the call was done; it goes on in its thread, and nobody waits for it."""


def unless(stopped: list[int], function: Callable, *arguments: Any) -> Any:
    """What `function` returns or raises, which runs in a thread of its own.

    For compilation: minutes in which XLA lets other threads run, and no signal handler is called
    in the thread that compiles.

    Args:
      stopped: to which the handler of a signal adds something.
      function: must leave alone what its caller would save.
      *arguments: of the function.

    Raises:
      CutError: as soon as there is something in `stopped`.
    """
    done = threading.Event()
    result: list[Any] = []
    error: list[BaseException] = []

    def body() -> None:
        try:
            result.append(function(*arguments))
        except BaseException as raised:
            error.append(raised)
        finally:
            done.set()

    threading.Thread(target=body, name="compiling", daemon=True).start()
    while not done.wait(SECONDS):
        if stopped:
            raise CutError
    if error:
        raise error[0]
    return result[0]


class Reader:
    """An iterator that a thread of its own reads, so that a signal ends the waiting for it.

    For batches that other processes make, which take seconds to start: they end with the thread
    that started them, so it lives as long as they do.
    """

    def __init__(self, items: Iterator, stopped: list[int]):
        """Reads an item whenever it is asked for one, and none in advance."""
        self._items, self._stopped, self._cut = items, stopped, False
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()
        self._found: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="reading", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> Any:
        """The next item; CutError if a signal came first."""
        self._wanted.put(True)
        while True:
            with suppress(queue.Empty):
                item, error = self._found.get(timeout=SECONDS)
                break
            if self._stopped:
                self._cut = True
                raise CutError
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Closes the iterator, unless it is still busy with what nobody waits for."""
        self._wanted.put(False)
        if not self._cut:
            self._thread.join()

    def _read(self) -> None:
        with closing(self._items) as items:
            while self._wanted.get():
                try:
                    self._found.put((next(items), None))
                except BaseException as error:
                    self._found.put((None, error))
                    return


class FirstCalls:
    """A jitted function whose first call for each shape of a batch, which compiles, may be cut."""

    def __init__(self, function: Callable, stopped: list[int]):
        self._function, self._stopped = function, stopped
        self._compiled: set[tuple] = set()

    def __call__(self, variables: Any, batch: dict[str, Any]) -> Any:
        """What the function returns; CutError if a signal came while it was compiled."""
        shapes = shapes_of(batch)
        if shapes in self._compiled:
            return self._function(variables, batch)
        returned = unless(self._stopped, self._function, variables, batch)
        self._compiled.add(shapes)
        return returned


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
