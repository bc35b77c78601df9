"""One run in a folder at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vit_jax.errors import CheckpointError

LOCK = "lock"  # a file in the run folder, which stays there


@contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir` as long as the context, or this process, lives.

    The system releases the lock with the process, however that ends. Evaluating and predicting ask
    for none. A folder in a bucket, of which each run has local files of its own, and a file system
    without locks are not guarded.

    Raises:
      CheckpointError: if another run is in the folder, with its process where that is known.
    """
    if not os.path.isdir(workdir):
        yield
        return
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = workdir / LOCK
    try:
        # Not inherited by programs that this one starts: they may outlive it.
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 200, 0).decode("utf-8", "replace").strip()
            raise CheckpointError(
                f"{workdir} is in use by another run{f' ({holder})' if holder else ''}; wait for "
                "its end, or choose another --workdir"
            ) from error
        except OSError:  # this file system knows no locks
            yield
            return
        _sign(file, f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            yield
        finally:
            _sign(file, "")
    finally:
        os.close(file)


def _sign(file: int, text: str) -> None:
    """Says who holds the lock; a full disk takes only the name away, not the lock."""
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode(), 0)
    except OSError:
        pass
