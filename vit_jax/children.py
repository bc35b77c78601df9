"""Processes that this one starts by `multiprocessing`: deaf to signals, and gone when it is."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

SIGNALS = signal.SIGINT, signal.SIGTERM
PARENT = "VIT_JAX_PARENT"  # variable of the environment: whose child a process is to be


@contextmanager
def starting() -> Iterator[None]:
    """Processes started in here know their parent, and never get Ctrl-C or SIGTERM.

    A terminal sends these to all. One that dies of it before it calls `ignore_signals` leaves the
    parent waiting for ever. The parent itself still gets them, in another of its threads.
    """
    # Where it starts the tracker, Python listens to both signals afterwards.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS))
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)  # another thread may have been as far
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Leaves Ctrl-C and SIGTERM to the parent, from now on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Has this process killed as soon as the one that started it is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # It may be gone before that. Process 1 tells nothing: in a container it may be the parent.
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os._exit(1)
