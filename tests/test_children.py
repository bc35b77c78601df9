"""Processes that a run starts: what they hear, and how they end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import chaos
from vit_jax import children

# Its own task is larger than a pipe holds, so the parent is still handing it over when it ends:
# `multiprocessing` does not know the child yet. As in a run, unpickling the task imports JAX first.
ENDS_WHILE_STARTING = """
import importlib.util, multiprocessing, os, sys, threading, time
from multiprocessing import resource_tracker
from tests import chaos
from vit_jax import children, interrupt, train

def start():
    with children.starting():
        child.start()

sys.modules["__main__"].__spec__ = importlib.util.find_spec("vit_jax.main")
resource_tracker.ensure_running()
tracker = set(chaos.descendants(os.getpid()))
child = multiprocessing.get_context("spawn").Process(target=train.train, args=(bytes(10**7),))
threading.Thread(target=start, daemon=True).start()
while not (started := set(chaos.descendants(os.getpid())) - tracker):
    time.sleep(0.001)
time.sleep(0.1)
print(*started, len(multiprocessing.active_children()), flush=True)
interrupt.leave(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's table of processes")
def test_a_process_that_is_being_started_ends_with_its_parent(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as file:  # a pipe would be waited for until the child is gone
        parent = [sys.executable, "-c", ENDS_WHILE_STARTING]
        assert subprocess.run(parent, cwd=chaos.ROOT, stdout=file, stderr=file).returncode == 0
    began = time.monotonic()
    child, known = log.read_text().splitlines()[0].split()
    assert known == "0"
    while chaos.alive(int(child)):
        time.sleep(0.001)
    assert time.monotonic() - began < 2  # its imports alone take longer


@pytest.mark.parametrize(("parent", "status"), [(None, 0), ("own", 0), ("999999999", 1)])
def test_a_process_of_another_parent_than_it_was_started_by_ends(parent, status):
    source = "from vit_jax import children; children.end_with_parent()"
    environment = {k: v for k, v in os.environ.items() if k != children.PARENT}
    if parent:
        environment[children.PARENT] = str(os.getpid()) if parent == "own" else parent
    done = subprocess.run([sys.executable, "-c", source], env=environment, cwd=chaos.ROOT)
    assert done.returncode == status


def test_processes_that_read_are_deaf_to_signals_from_their_first_moment():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with children.starting():
        process = subprocess.Popen(["sleep", "60"])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.kill()
    process.wait()
