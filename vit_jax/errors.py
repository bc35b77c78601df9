"""What a person can get wrong, each with the exit status of the program it ends.

`vit_jax.main` prints such an error as one sentence. Any other exception is ours to mend and keeps
its traceback.

    0    done
    1    our mistake, with a traceback; or the watchdog: nothing was finished for `hang_seconds`,
         with the stack of every thread. Started again, the command goes on from its checkpoint
    2    ConfigError: the command line or the config; nothing was touched
    3    DataError: missing, empty or too much of it broken
    4    CheckpointError: another config's or model's folder, another run is in it, no checkpoint
         that can be read, or the last one could not be written
    5    DivergedError: too many updates in a row were not finite; all checkpoints are
    6    OutOfMemoryError: the device's memory, never the disk
    130  Ctrl-C, and 143 SIGTERM: the current step is saved, the same command goes on
    137  SIGKILL, of whoever killed it: the same command goes on from the last checkpoint
    141  the reader of the output went away
"""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """The command line or the config asks for something that cannot be."""

    exit_status = 2


class DataError(ValueError):
    """The data is missing, empty, broken or does not fit the model."""

    exit_status = 3


class CheckpointError(ValueError):
    """The run folder holds another run, or no checkpoint that can be read."""

    exit_status = 4


class DivergedError(ArithmeticError):
    """The loss or the gradient is no longer finite."""

    exit_status = 5


class OutOfMemoryError(MemoryError):
    """The step does not fit the device's memory."""

    exit_status = 6


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ` Did you mean 'cvt_13'?`, with all valid names where none is close.

    Starts with a space, so that it can be appended to a sentence; empty if `valid` is.
    """
    valid = sorted(set(valid))
    close = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.6)
    if close:
        return f" Did you mean {' or '.join(repr(c) for c in close)}?"
    if not valid:
        return ""
    shown = ", ".join(valid[:20]) + (", ..." if len(valid) > 20 else "")
    return f" Valid: {shown}."
