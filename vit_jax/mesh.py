"""Devices -> mesh, and how state and batch lie on it."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.contracts import HOST_KEYS, ROW_AXES, Batch
from vit_jax.errors import ConfigError, OutOfMemoryError, nearest

AXES = ("data", "fsdp", "tensor")  # outermost first: the last one's devices are neighbours
SMALLEST = 2**12  # an array of fewer numbers lies whole on every device: it is not worth a message
# The wide blocks, after Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), section 3: the first
# product of a pair is split by what it makes (heads, hidden units), the second by what it reads.
TENSOR = (
    (r"(^|/)(query|key|value|fc1|gate|up)/(kernel|bias)$", -1),
    (r"(^|/)(out|fc2|down)/kernel$", -2),
)
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(
    axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """All devices of all hosts on the axes `data`, `fsdp` and `tensor`.

    Args:
      axes: sizes; an axis that is not named is 1, one of -1 takes what is left. None is all
        devices on `data`.
      devices: None is all there are.

    Raises:
      ConfigError: if there is no such axis, or the sizes do not multiply to the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes({"data": -1} if axes is None else axes, len(devices))
    # Auto axes: under the default explicit ones `x @ y.T` raises.
    kinds = (AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(sizes, AXES, kinds, devices=devices)
    if _host_parts(mesh) is None:
        # Each host reads one run of a batch's rows; the order that suits the links best may not
        # leave it one.
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        mesh = Mesh(np.array(devices).reshape(sizes), AXES, axis_types=kinds)
        if _host_parts(mesh) is None:
            raise ConfigError(
                f"mesh {_told(sizes)}: an axis of tensor={sizes[-1]} must hold whole hosts, or "
                "divide the devices of one"
            )
    return mesh


def _sizes(axes: Mapping[str, int], count: int) -> tuple[int, ...]:
    for name, size in axes.items():
        if name not in AXES:
            raise ConfigError(f"mesh has no axis {name!r}.{nearest(name, AXES)}")
        if size != -1 and size < 1:
            raise ConfigError(f"mesh.{name}={size} must be at least 1, or -1 for what is left")
    sizes = {name: axes.get(name, 1) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh: only one axis may be -1, not {' and '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    elif free or fixed != count:
        told = " x ".join(f"{k}={v}" for k, v in sizes.items() if v != 1) or "data=1"
        fits = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ConfigError(
            f"mesh {told} does not fit {count} device{'s' * (count > 1)}: each axis must divide "
            f"them ({fits}) and all together make {count}; -1 for one axis takes what is left"
        )
    return tuple(sizes[name] for name in AXES)


def _host_parts(mesh: Mesh) -> dict[int, tuple[int, int]] | None:
    """{process: (its part of a batch's rows, how many parts)}; None unless they are whole runs."""
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = {}
    for process, own in held.items():
        size = len(own)
        if max(own) - min(own) + 1 != size or min(own) % size or len(rows) % size:
            return None
        parts[process] = min(own) // size, len(rows) // size
    return parts


def host_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this process's devices hold, and how many parts there are."""
    return _host_parts(mesh)[jax.process_index()]


def batch_unit(mesh: Mesh, accumulate: int = 1) -> int:
    """What a batch size must be a multiple of."""
    return math.prod(mesh.shape[name] for name in ROW_AXES) * accumulate


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """ConfigError unless every device gets the same whole number of examples at a time."""
    unit = batch_unit(mesh, accumulate)
    devices = unit // accumulate
    if batch_size < 1 or batch_size % unit:
        lower, upper = batch_size // unit * unit, -(-batch_size // unit) * unit
        near = f"{lower} or {upper}" if lower > 0 and upper != lower else str(max(upper, unit))
        parts = f"{devices} device{'s' * (devices > 1)}"
        parts += f" (x {mesh.shape['tensor']} that share rows)" * (mesh.shape["tensor"] > 1)
        parts += f" x {accumulate} parts of gradient accumulation" if accumulate > 1 else ""
        raise ConfigError(
            f"batch_size={batch_size} does not divide over {parts}; nearest that does: {near}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """Every device holds its rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def lay_out(tree: Any, params: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """Shapes -> the same with shardings: of parameters, and of what belongs to them.

    The first of the rules whose pattern is found in a parameter's name decides. Otherwise the axis
    `tensor` splits the pairs of products of `TENSOR`, and `fsdp` the longest axis left that it
    divides: Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), stage 3. An array that nothing
    divides, or of fewer than `SMALLEST` numbers, lies whole on every device. An optimizer's
    numbers, and a running mean's, go by the name of their parameter.

    Args:
      tree: of shapes, such as a whole state.
      params: those of the parameters, for their names: `backbone/block_0/mlp/fc1/kernel`.
      mesh: of `make_mesh`.
      rules: (pattern, axes of the mesh from the array's first axis on), such as
        ("head/kernel", ("fsdp", "tensor")); None or "" leaves an axis whole.

    Raises:
      ConfigError: if a rule matches nothing, names no axis, or does not divide.
    """
    known = {name_of(path): leaf.shape for path, leaf in _leaves(params)}
    chosen = {name: _chosen(name, shape, mesh, rules) for name, shape in known.items()}
    for pattern, _ in rules:
        if not any(_found(pattern, name) for name in known):
            raise ConfigError(f"sharding: the pattern {pattern!r} matches no parameter")

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        parts = name_of(path).split("/")
        name = next((n for i in range(len(parts)) if (n := "/".join(parts[i:])) in known), "")
        # What an optimizer keeps of an array may be smaller, such as sums along one of its axes.
        same = known.get(name) == leaf.shape
        spec = chosen[name] if same else _by_size(leaf.shape, [None] * len(leaf.shape), mesh)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, tree)


def name_of(path: Iterable[Any]) -> str:
    """A path in a tree as `head/kernel`, whatever its parts are."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _found(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"sharding: {pattern!r} is no regular expression: {error}") from error


def _chosen(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> list[str | None]:
    """The axis of the mesh for each axis of a parameter."""
    rule = next((axes for pattern, axes in rules if _found(pattern, name)), None)
    if rule is not None:
        return _ruled(name, shape, [axis or None for axis in rule], mesh)
    spec: list[str | None] = [None] * len(shape)
    tensor = mesh.shape["tensor"]
    if tensor > 1 and math.prod(shape) >= SMALLEST:
        for pattern, axis in TENSOR:
            if re.search(pattern, name) and shape[axis] % tensor == 0:
                spec[axis] = "tensor"
    return _by_size(shape, spec, mesh)


def _by_size(shape: tuple[int, ...], spec: list[str | None], mesh: Mesh) -> list[str | None]:
    fsdp = mesh.shape["fsdp"]
    free = [i for i, size in enumerate(shape) if spec[i] is None and size % fsdp == 0]
    if fsdp > 1 and free and math.prod(shape) >= SMALLEST:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return spec


def _ruled(
    name: str, shape: tuple[int, ...], spec: list[str | None], mesh: Mesh
) -> list[str | None]:
    if len(spec) != len(shape):
        raise ConfigError(f"sharding: {name} has {len(shape)} axes, and its rule {len(spec)}")
    for i, axis in enumerate(spec):
        if axis is not None and axis not in AXES:
            raise ConfigError(f"sharding: mesh has no axis {axis!r}.{nearest(axis, AXES)}")
        if axis and shape[i] % mesh.shape[axis]:
            raise ConfigError(
                f"sharding: {axis}={mesh.shape[axis]} does not divide the {shape[i]} of {name} "
                f"{list(shape)}"
            )
    return spec


def device_part(batch: Batch) -> Batch:
    """A batch without what only the host reads."""
    return {key: value for key, value in batch.items() if key not in HOST_KEYS}


def put_batch(batch: Batch, mesh: Mesh, *, whole: bool = False) -> dict[str, jax.Array]:
    """Rows of this host, or the `whole` batch that every host has, -> global arrays."""
    return _placed(device_part(batch), mesh, whole=whole)


def _placed(batch: Batch, mesh: Mesh, *, whole: bool = False) -> dict[str, jax.Array]:
    sharding = split_rows(mesh)

    def put(value: np.ndarray) -> jax.Array:
        shape = value.shape if whole else None
        return jax.make_array_from_process_local_data(sharding, value, shape)

    return {key: put(np.asarray(value)) for key, value in batch.items()}


def gather(rows: Batch, mesh: Mesh) -> Batch:
    """Rows of this host -> those of all hosts, on each of them; numbers of at most 32 bits."""
    if jax.process_count() == 1:
        return rows
    return jax.device_get(_copy_to_all(mesh)(_placed(rows, mesh)))


@lru_cache(maxsize=2)
def _copy_to_all(mesh: Mesh) -> Callable:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def platform(mesh: Mesh) -> str:
    """Of the devices, as JAX names it: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def describe(mesh: Mesh) -> str:
    """One line such as `8 x cpu (data=4, fsdp=2), 1 process`."""
    sizes = {name: size for name, size in mesh.shape.items() if size > 1 or name == "data"}
    device, hosts = mesh.devices.flat[0], jax.process_count()
    shape = _told(sizes)
    return f"{mesh.size} x {device.device_kind} ({shape}), {hosts} process{'es' * (hosts > 1)}"


def _told(sizes: Mapping[str, int] | Sequence[int]) -> str:
    sizes = sizes if isinstance(sizes, Mapping) else dict(zip(AXES, sizes))
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


@contextmanager
def memory_errors(batch_size: int, unit: int = 1) -> Iterator[None]:
    """The device's out-of-memory error -> one sentence with a batch size to try.

    A full disk, which Orbax calls RESOURCE_EXHAUSTED too, comes as another type and passes.

    Args:
      batch_size: of what runs inside.
      unit: what a batch size must be a multiple of.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        smaller, wanted = _smaller(batch_size, unit, text), _wanted(text)
        told = f"{wanted} were wanted" if wanted else text.splitlines()[0]
        there = f"batch_size={smaller}" if smaller else "a smaller image_size or model"
        raise OutOfMemoryError(
            f"batch_size={batch_size} does not fit the device's memory: {told}; try {there}, or in "
            "training a larger accumulate, or remat"
        ) from error


def _wanted(text: str) -> str:
    """Bytes that an out-of-memory error names: of CPU and GPU what was asked for last, of TPU all.

    >>> _wanted("Out of memory allocating 123456789012 bytes.")
    '123,456,789,012 bytes (115 GiB)'
    """
    found = re.search(r"allocat\w* ([\d,]+) bytes", text)
    if found:
        count = int(found[1].replace(",", ""))
        return f"{count:,} bytes ({count / 2**30:.3g} GiB)"
    found = re.search(r"allocat\w* ([\d.]+ ?[KMGT]i?B)|Used ([\d.]+[KMGT]) of", text)
    return (found[1] or f"{found[2]}B in all") if found else ""


def _smaller(batch_size: int, unit: int, text: str) -> int:
    """The largest multiple of `unit` that is likely to fit; 0 if there is no smaller one."""
    share = 0.5
    found = re.search(r"Used ([\d.]+)G of ([\d.]+)G", text)
    if found:  # parameters do not shrink with the batch, so a little less than in proportion
        share = 0.9 * float(found[2]) / float(found[1])
    return min(int(batch_size * share), batch_size - 1) // unit * unit
