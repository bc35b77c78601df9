"""Processes that this one starts by `multiprocessing`: deaf to signals, and gone when it is."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

SIGNALS = signal.SIGINT, signal.SIGTERM


@contextmanager
def deaf() -> Iterator[None]:
    """Processes started in here never get Ctrl-C or SIGTERM, which a terminal sends to all.

    One that dies of it before it calls `ignore_signals` leaves the parent waiting for ever. The
    parent itself still gets them, in another of its threads.
    """
    # Where it starts the tracker, Python listens to both signals afterwards.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Leaves Ctrl-C and SIGTERM to the parent, from now on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Has this process killed as soon as the one that started it is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if os.getppid() == 1 or (parent is not None and not parent.is_alive()):  # gone before that
        os._exit(1)
