"""Devices -> mesh, and how state and batch lie on it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.contracts import HOST_KEYS, Batch
from vit_jax.errors import ConfigError, OutOfMemoryError


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices of all hosts on one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    # Auto axes: under the default explicit ones `x @ y.T` raises.
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """ConfigError unless every device gets the same whole number of examples at a time."""
    unit = mesh.size * accumulate
    if batch_size < 1 or batch_size % unit:
        lower, upper = batch_size // unit * unit, -(-batch_size // unit) * unit
        near = f"{lower} or {upper}" if lower > 0 and upper != lower else str(max(upper, unit))
        parts = f"{mesh.size} device{'s' * (mesh.size > 1)}"
        parts += f" x {accumulate} parts of gradient accumulation" if accumulate > 1 else ""
        raise ConfigError(
            f"batch_size={batch_size} does not divide over {parts}; nearest that does: {near}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """Every device holds its rows of a batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def device_part(batch: Batch) -> Batch:
    """A batch without what only the host reads."""
    return {key: value for key, value in batch.items() if key not in HOST_KEYS}


def put_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Rows of this host -> global arrays over the mesh."""
    sharding = split_rows(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for key, value in device_part(batch).items()
    }


def describe(mesh: Mesh) -> str:
    """One line such as `2 x cpu (data=2), 1 process`."""
    axes: Mapping[str, int] = mesh.shape
    shape = ", ".join(f"{name}={size}" for name, size in axes.items())
    device = mesh.devices.flat[0]
    hosts = jax.process_count()
    return f"{mesh.size} x {device.device_kind} ({shape}), {hosts} process{'es' * (hosts > 1)}"


@contextmanager
def memory_errors(batch_size: int) -> Iterator[None]:
    """The device's out-of-memory error -> one sentence with a batch size to try."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise OutOfMemoryError(
            f"batch_size={batch_size} does not fit the device's memory ({first}); try "
            f"batch_size={max(batch_size // 2, 1)}, or in training accumulate=2 or remat"
        ) from error
