"""One run in a folder at a time: against other processes, dead ones, and what is no folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax.errors import CheckpointError
from vit_jax.lock import LOCK, only_run

ROOT = Path(__file__).parent.parent
HOLD = (
    "import sys, time; from pathlib import Path; from vit_jax.lock import only_run\n"
    "with only_run(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`."""
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_refused_and_told_who_is_first(holder, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught, only_run(tmp_path):
        pass
    assert f"{tmp_path} is in use by another run (process {holder.pid} on" in str(caught.value)
    assert caught.value.exit_status == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_death_releases_it(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with only_run(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ""


def test_a_program_started_by_the_first_does_not_hold_it_longer(tmp_path):
    with only_run(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.1)
        with only_run(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_what_is_no_local_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with only_run(Path("gs://bucket/run")), only_run(Path("gs://bucket/run")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run(tmp_path):
        pass
    with pytest.raises(KeyError), only_run(tmp_path):
        raise KeyError("of the run itself")
