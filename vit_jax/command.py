"""What every command has in common: errors as one sentence with an exit status, and quiet."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from vit_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    OutOfMemoryError,
)

STOPS = (ConfigError, DataError, CheckpointError, DivergedError, OutOfMemoryError)


def guard(body: Callable[[], int], stopped: str = "stopped") -> int:
    """Runs a command; what a person can mend becomes one sentence on stderr.

    Args:
      body: the command; returns its exit status.
      stopped: what is said after Ctrl-C.

    Returns:
      The exit status: that of `body`, of the error, 130 after Ctrl-C, 141 where the reader of the
      output went away.
    """
    try:
        return body()
    except STOPS as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:  # while a run is up, it has a handler of its own
        print(stopped, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would complain once more, when it flushes what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def quiet() -> None:
    """Keeps libraries' chatter off the terminal: what a command says is what a person reads."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Orbax logs a page of traceback for a full disk, which `checkpoint.py` says in a sentence, and
    # gcsfs each request of a bucket whose kind it could not find out.
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # Parts of a save that Orbax gives up, after one of them has failed, complain here and there.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _unless_stray


def _unless_stray(unraisable: Any) -> None:
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)
