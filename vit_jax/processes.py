"""Several processes that train one model: how they meet, and what they agree on.

All of it is JAX's own runtime and collectives. With one process every function here is free.
"""

import glob
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name; Orbax takes it too
from jax.experimental import multihost_utils

from vit_jax.errors import ConfigError

# Seconds. JAX's own (300, 100, 300) leave a dead process's fellows on the machines for minutes.
START = 300  # until all processes are there
HEARTBEAT = 30  # without a sign of life
SHUTDOWN = 30  # for the others to end as well

_places = itertools.count()


def join(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Meets the other processes; comes before anything else that touches a device.

    On a TPU pod, and under SLURM, Open MPI or an indexed job of Kubernetes, JAX finds the others by
    itself; where there are none, nothing is done.

    Args:
      coordinator: address and port of process 0, such as `10.0.0.1:1234`, where nothing of that
        kind starts the processes.
      processes: how many there are, with `coordinator`.
      process: which one this is, from 0, with `coordinator`.
    """
    own = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    if not coordinator and not launched(os.environ):
        return
    # Its handler would swallow SIGTERM; the loop has its own way to stop everywhere at one step.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **(own if coordinator else {}),
        cluster_detection_method="deactivate" if coordinator else None,
        initialization_timeout=START,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )


def launched(environment: Mapping[str, str]) -> bool:
    """Whether something that JAX knows has started several processes, or runs on a TPU."""

    def tasks(*names: str) -> int:
        return int(next((environment[n] for n in names if n in environment), 1))

    # A shell inside of an allocation knows the allocation's tasks, but is no step with a place.
    slurm = "SLURM_LOCALID" in environment and tasks("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1
    kubernetes = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    tpu = bool(chips) and importlib.util.find_spec("libtpu") is not None
    return slurm or tasks("OMPI_COMM_WORLD_SIZE") > 1 or kubernetes or tpu


def number() -> int:
    """Of this process, from 0."""
    return jax.process_index()


def count() -> int:
    """How many there are."""
    return jax.process_count()


def first() -> bool:
    """Whether this is the process that writes what only one may write."""
    return number() == 0


def alone() -> bool:
    """Whether there is no other process."""
    return count() == 1


def agree(fine: bool) -> bool:
    """Whether all processes say so."""
    if alone():
        return fine
    return bool(multihost_utils.process_allgather(np.array(fine)).all())


def part() -> None:
    """Tells the others that this process ends as it should; waits until they do as well."""
    if not alone():
        jax.distributed.shutdown()


class Meeting:
    """A place where each process comes once, for all that need not wait in a collective.

    Each process must open its meetings in the same order. It is kept by the first process, in the
    key-value store of JAX's runtime.

    Attributes:
      seconds: between two looks, so that a pod's processes do not keep the first one busy.
    """

    def __init__(self):
        self._store = distributed.global_state.client
        self._place = f"vit_jax/meeting/{next(_places)}"
        self.seconds = max(0.05, count() / 100)

    def arrive(self) -> None:
        """Tells that it is there."""
        self._store.key_value_set(f"{self._place}/here/{number()}", "here")

    def full(self) -> bool:
        """Whether all are."""
        return len(self._store.key_value_dir_get(f"{self._place}/here")) == count()

    def say(self, word: str) -> None:
        """Of all that is said by anybody, the first word counts."""
        try:
            self._store.key_value_set(f"{self._place}/word", word)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def word(self) -> str | None:
        """That word; None as long as nobody said one."""
        found = dict(self._store.key_value_dir_get(self._place))
        return found.get(f"{self._place}/word")


def from_first(plain: Any) -> Any:
    """What process 0 has, of JSON's types, in every process: for what each reads off a disk."""
    if alone():
        return plain
    text = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(length, np.uint8)
    if first():
        padded[:] = text
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


def first_does(function: Callable, *arguments: Any) -> Any:
    """What `function` returns in process 0; the others wait for it, get None, and fail with it.

    Raises:
      ConfigError: in the others, if it raised in process 0.
    """
    if alone():
        return function(*arguments)
    result, error = None, None
    if first():
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
    if not agree(error is None):
        raise error or ConfigError("process 0 has stopped; it says why")
    return result
