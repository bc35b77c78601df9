"""Run folders in a bucket of Cloud Storage (`gs://BUCKET/RUN`): one place that knows of them.

Orbax writes checkpoints to the bucket by itself. All else that a run folder holds (config, rows,
log, TensorBoard, pictures) is small, and is written in many places that append and rename, which
an object store does not know. They see a local folder of this process: filled from the bucket at
the start, and copied there by `push`, each file whole.

There is no lock. Of two runs that claim one fresh folder in the same moment the second is refused;
two that go on in one folder at once are not kept apart, and spoil what the other has written.
"""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_jax.errors import CheckpointError, ConfigError

SCHEME, READER = "gs://", "gcsfs"
CONFIG = "config.json"  # what makes a folder a run's
# What libraries say of a store that does not answer, or not to us; never of what it holds.
SILENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "Forbidden")
SILENT += ("http_response_code='401'", "http_response_code='403'", "retry attempts failed")
ASKERS = ("gcsfs", "aiohttp", "google", "requests")


@dataclass(frozen=True)
class Folder:
    """A run folder of the file system.

    Attributes:
      root: where `checkpoints` lies; what a person calls the folder.
      files: a local folder with all else.
    """

    root: os.PathLike
    files: Path

    def claim(self) -> None:
        """Brings the files of a folder that was just claimed to where it lies."""

    def push(self) -> None:
        """Brings what was written since to where the folder lies; OSError if that is refused."""


class Mirror(Folder):
    """The local files of a run folder in a bucket."""

    def __init__(self, address: str, parent: Path):
        """Gets the small files of a run from the bucket.

        Of a folder that is no run's only the names are taken: it may hold anything.

        Args:
          address: as `checked` returns it.
          parent: an empty local folder.

        Raises:
          ConfigError: if there is no such bucket, or it cannot be read.
        """
        # A picture's title names the folder that it lies in.
        super().__init__(_root(address), parent / address.rpartition("/")[2])
        self.files.mkdir()
        self._address, self._store = address, _store(address)
        try:
            self._get()
        except OSError as error:
            raise ConfigError(f"workdir {address} cannot be read: {error}") from error
        self._ours = (self.files / CONFIG).exists()
        self._stamps = {name: _stamp(file) for name, file in self._written().items()}

    def _get(self) -> None:
        try:
            entries = _asked(self._store.ls, self._address, detail=True)
        except FileNotFoundError:  # which a bucket that is not there says as well
            bucket = self._address.partition("://")[2].partition("/")[0]
            if not _asked(self._store.exists, f"{SCHEME}{bucket}"):
                raise ConfigError(f"{self._address}: there is no bucket {bucket!r}") from None
            entries = []
        found = {entry["name"].rstrip("/"): entry["type"] for entry in entries}
        run = any(name.endswith(f"/{CONFIG}") for name in found)
        for name, kind in found.items():
            local = self.files / name.rpartition("/")[2]
            if name.endswith(self._address.partition("://")[2]):  # a mark for the folder itself
                continue
            if kind == "directory":
                local.mkdir()
            else:
                local.write_bytes(_asked(self._store.cat_file, name) if run else b"")

    def claim(self) -> None:
        """As `push`, with a sentence for a person.

        Raises:
          ConfigError: if the bucket cannot be written.
          CheckpointError: if another run has claimed the folder since it was looked at.
        """
        try:
            self.push()
        except OSError as error:
            raise ConfigError(f"workdir {self._address} cannot be written: {error}") from error

    def push(self) -> None:
        """Copies each file that was written since the last time, whole.

        Raises:
          OSError: if the bucket refuses one.
          CheckpointError: if another run has claimed the folder since it was looked at.
        """
        files = self._written()
        # The config comes last: a claim that is cut short is none.
        for name in sorted(files, key=lambda name: (name == CONFIG, name)):
            stamp = _stamp(files[name])
            if stamp != self._stamps.get(name):
                self._put(name, files[name].read_bytes())
                self._stamps[name] = stamp
        self._ours |= CONFIG in files

    def finish(self, failed: BaseException | None) -> str:
        """The last `push`; what could not be copied and where it is, "" if all is well.

        Args:
          failed: what ends the run; a folder that it claimed in vain is then left alone.
        """
        if failed and not self._ours and (self.files / CONFIG).exists():
            return ""
        try:
            self.push()
        except (OSError, CheckpointError) as error:
            return (
                f"the last files could not be copied to {self._address}: {error}. They are in "
                f"{self.files}"
            )
        return ""

    def _put(self, name: str, data: bytes) -> None:
        target = f"{self._address}/{name}"
        # Nobody else's file is written over, as long as the folder is not known to be this run's.
        fresh = not self._ours and name not in self._stamps
        try:
            _asked(self._store.pipe_file, target, data, mode="create" if fresh else "overwrite")
        except FileExistsError:
            # The store may have heard a request whose answer was lost, and that was made again.
            if _asked(self._store.cat_file, target) != data:
                raise CheckpointError(
                    f"{self._address} was claimed by another run in this moment, which wrote "
                    f"{name}; choose another --workdir"
                ) from None

    def _written(self) -> dict[str, Path]:
        """The local files by their names below the folder."""
        files = [path for path in self.files.rglob("*") if path.is_file()]
        return {path.relative_to(self.files).as_posix(): path for path in files}


@contextmanager
def run_folder(workdir: str | os.PathLike) -> Iterator[Folder]:
    """The run folder that a command names; at the end, what was written is in the bucket.

    A folder of the file system costs nothing. What is raised inside names the bucket.

    Args:
      workdir: a path, or `gs://BUCKET/RUN`.

    Raises:
      ConfigError: as of `checked` and `Mirror`.
      CheckpointError: if the last files could not be copied; they stay where they are.
    """
    if not is_address(workdir):
        yield Folder(Path(workdir), Path(workdir))
        return
    address, parent = checked(str(workdir)), Path(tempfile.mkdtemp(prefix="vit_jax_run_"))
    failed, lost = None, ""
    try:
        folder = Mirror(address, parent)
        try:
            yield folder
        except BaseException as error:
            failed = error
            error.args = tuple(_named(a, folder.files, address) for a in error.args)
            raise
        finally:
            lost = folder.finish(failed)
    finally:
        if not lost:
            shutil.rmtree(parent, ignore_errors=True)
        elif failed:  # which says more than this
            print(f"warning: {lost}", file=sys.stderr)
        else:
            raise CheckpointError(lost)


def fetched(address: str) -> Folder:
    """A run folder of a bucket to read from, as long as this process lives.

    Raises:
      ConfigError: as of `checked` and `Mirror`.
    """
    address, parent = checked(address), Path(tempfile.mkdtemp(prefix="vit_jax_run_"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    return Mirror(address, parent)


def is_address(workdir: str | os.PathLike) -> bool:
    """Whether it names a folder in a bucket."""
    return str(workdir).startswith(SCHEME)


def checked(address: str) -> str:
    """The address without slashes at its end; asks nobody.

    Raises:
      ConfigError: if it names no folder in the bucket, or what reads buckets is not installed.
    """
    address = address.rstrip("/")
    bucket, _, folder = address.partition("://")[2].partition("/")
    if not bucket or not folder or "//" in folder:
        raise ConfigError(f"{address}: {SCHEME}BUCKET/RUN was wanted, a folder in a bucket")
    if importlib.util.find_spec(READER) is None:
        raise ConfigError(f"{address} needs {READER}, which is missing: pip install -e '.[gcs]'")
    return address


def unreached(error: Exception) -> bool:
    """Whether an error tells of a store that does not answer, and nothing of what it holds."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    asked = type(error).__module__.partition(".")[0] in ASKERS
    return asked or any(word in str(error) for word in SILENT)


def _root(address: str) -> Any:
    from etils import epath

    return epath.Path(address)


def _store(address: str) -> Any:
    import fsspec

    # A listing that is kept would miss what TensorStore and other processes write; Orbax's paths
    # ask the same file system.
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return fsspec.filesystem(address.partition("://")[0])


def _asked(function: Callable, *arguments: Any, **options: Any) -> Any:
    """What the store answers; OSError whatever its libraries raise."""
    try:
        return function(*arguments, **options)
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:  # of HTTP, of the network, of credentials
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(" ".join(lines)[:300]) from error


def _named(argument: Any, files: Path, address: str) -> Any:
    """What is said to a person names the bucket."""
    return argument.replace(str(files), address) if isinstance(argument, str) else argument


def _stamp(file: Path) -> tuple[int, int, int]:
    """Differs once a file is written again."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
