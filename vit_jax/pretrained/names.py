"""Tables of names: where each of our arrays lies in a published file, read in both directions.

A table is data. A row says that one of our modules, or of our arrays, is called so and so there;
several of ours may lie in one of theirs. The same rows load a checkpoint and write one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vit_jax.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
# What PyTorch's modules call Flax's arrays. Its counter of batches is no parameter.
TORCH = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
UNUSED = {r"(.*\.)?num_batches_tracked": "PyTorch's counter of batches"}
SHOWN = 12  # names of one kind in an error


@dataclass(frozen=True)
class Leaf:
    """An array by itself, which is no module's weight or bias; its numbers are not transposed.

    Or a module of which more is to be said than its name: a dense layer that is a convolution of
    1x1 there has `trailing` 2.

    Attributes:
      name: there, or several spellings, of which the first is written.
      leading: axes of length 1 that it has in front there; -2 is two fewer than here.
      trailing: axes of length 1 that it, or the module's kernel, has at the end there.
    """

    name: str | tuple[str, ...]
    leading: int = 0
    trailing: int = 0


Row = str | tuple[str, ...] | Leaf


@dataclass(frozen=True)
class Table:
    """The names of one architecture in one published form.

    Our names are paths below the backbone, `{i}` and `{j}` stand for numbers, and theirs may count
    otherwise: `{i-1}`. A path to a module names all its arrays, a path to an array just that one
    and comes first. A tuple of our paths lies in one of theirs, part after part along the first
    axis. Several spellings on their side are all read; the first is written.

    Attributes:
      backbone: our paths below the backbone -> theirs.
      head: our paths outside it -> theirs.
      prefix: what their names of the backbone start with in a model with a head; read with or
        without it.
      unused: patterns of their names that hold nothing of ours -> why.
      layout: "torch", dense kernels are (out, in) and convolutions (out, in, h, w); or "flax",
        kernels as ours, save that heads may be split off.
    """

    backbone: Mapping[str | tuple[str, ...], Row]
    head: Mapping[str | tuple[str, ...], Row] = field(default_factory=dict)
    prefix: str = ""
    unused: Mapping[str, str] = field(default_factory=dict)
    layout: str = "torch"

    def bind(self, ours: Shapes, theirs: Mapping[str, Any] | None = None) -> "Match":
        """Finds the place of each array.

        Args:
          ours: shapes by path, collection first: {"params/backbone/norm/scale": (64,), ...}.
          theirs: their shapes by name; None where a file is to be written.
        """
        has_head = any(path.split("/")[1] == "backbone" for path in ours)
        groups: dict[tuple, list[tuple[int, str]]] = {}
        nowhere = []
        for path in ours:
            inside = path.split("/", 1)[1]
            rows, prefix = self.backbone, self.prefix
            if has_head:
                below = inside.removeprefix("backbone/")
                rows, prefix = (rows, prefix) if below != inside else (self.head, "")
                inside = below
            found = _find(inside, rows, self.layout)
            if found is None:
                nowhere.append(path)
                continue
            row, place, whole, names = found
            if prefix:
                names = tuple(n for name in names for n in (prefix + name, name))
                if not has_head:  # alone, a backbone is written without the prefix
                    names = tuple(sorted(names, key=lambda n: n.startswith(prefix)))
            groups.setdefault((names, row, whole), []).append((place, path))
        bindings, missing, taken = [], list(nowhere), set()
        for (names, row, whole), members in groups.items():
            paths = tuple(path for _, path in sorted(members))
            name = next((n for n in names if n in theirs), None) if theirs is not None else names[0]
            if name is None:
                missing += paths
                continue
            taken.add(name)
            bindings.append(Binding(name, paths, row, whole, self.layout))
        unused, unmapped = {}, []
        for name in theirs or ():
            if name in taken:
                continue
            reasons = {**UNUSED, **self.unused}.items()
            reason = next((why for pattern, why in reasons if _known(pattern, name)), None)
            if reason is None:
                unmapped.append(name)
            else:
                unused[name] = reason
        wrong = []
        for binding in bindings:
            if theirs is not None and not binding.fits(ours, theirs[binding.name]):
                shapes = ", ".join(f"{p} {tuple(ours[p])}" for p in binding.paths)
                wrong.append(f"{binding.name} {tuple(theirs[binding.name])} for {shapes}")
        return Match(tuple(bindings), unused, tuple(unmapped), tuple(missing), tuple(wrong))


@dataclass(frozen=True)
class Binding:
    """One of their arrays and those of ours that lie in it, in order.

    Attributes:
      name: theirs.
      paths: ours.
      row: what the table says.
      whole: whether the row names the array itself, not its module.
      layout: of the table.
    """

    name: str
    paths: tuple[str, ...]
    row: tuple
    whole: bool
    layout: str

    def fits(self, ours: Shapes, theirs: tuple[int, ...]) -> bool:
        """Whether their shape holds ours."""
        if self._plain:
            return np.prod(theirs) == sum(np.prod(ours[p]) for p in self.paths)
        wanted = [self._turned_shape(p, ours[p]) for p in self.paths]
        rows = sum(shape[0] for shape in wanted)
        squeezed = tuple(theirs[: len(wanted[0])]), tuple(theirs[len(wanted[0]) :])
        return squeezed[0] == (rows, *wanted[0][1:]) and all(n == 1 for n in squeezed[1])

    def read(self, array: np.ndarray, ours: Shapes) -> list[np.ndarray]:
        """Theirs -> ours, in the order of `paths`."""
        if self._plain:
            sizes = [int(np.prod(ours[p])) for p in self.paths]
            parts = np.split(array.reshape(-1), np.cumsum(sizes)[:-1])
            return [part.reshape(ours[p]) for part, p in zip(parts, self.paths, strict=True)]
        turned = [self._turned_shape(p, ours[p]) for p in self.paths]
        parts = np.split(array, np.cumsum([shape[0] for shape in turned])[:-1])
        shaped = zip(parts, turned, self.paths, strict=True)
        return [_turn_back(p.reshape(shape), path) for p, shape, path in shaped]

    def write(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Ours, in the order of `paths`, -> theirs."""
        joined, leading, trailing = self.row
        if not self._plain:
            turned = [_turn(a, p) for a, p in zip(arrays, self.paths, strict=True)]
            array = turned[0] if len(turned) == 1 else np.concatenate(turned)
            kernel = self.paths[0].endswith("/kernel")
            return array.reshape(array.shape + (1,) * trailing) if kernel else array
        array = arrays[0]
        if joined:
            array = np.concatenate([a.reshape(-1, a.shape[-1]) for a in arrays])
        shape = array.shape[max(-leading, 0) :]
        return array.reshape((1,) * leading + shape + (1,) * trailing)

    @property
    def _plain(self) -> bool:
        """Whether the numbers lie there in our order."""
        return self.whole or self.layout == "flax"

    def _turned_shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape[axis] for axis in _axes(path, len(shape)))


@dataclass(frozen=True)
class Match:
    """What a table says of a file and a model.

    Attributes:
      bindings: what lies where.
      unused: names of theirs that are known to hold nothing of ours -> why.
      unmapped: names of theirs that no row speaks of.
      missing: our paths that nothing fills.
      wrong: sentences on shapes that do not fit.
    """

    bindings: tuple[Binding, ...]
    unused: dict[str, str]
    unmapped: tuple[str, ...]
    missing: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether each array of both sides has its place."""
        return not (self.unmapped or self.missing or self.wrong)

    def check(self, source: str) -> None:
        """CheckpointError with all that does not fit, on both sides, if anything does not."""
        if self.complete:
            return
        parts = [
            f"{len(names)} {what}: {_listed(names)}"
            for what, names in (
                ("arrays of the file have no place in the model", self.unmapped),
                ("parameters of the model are not in the file", self.missing),
                ("shapes differ", self.wrong),
            )
            if names
        ]
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(parts)}")


def _listed(names: tuple[str, ...]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _find(inside: str, rows: Mapping, layout: str) -> tuple | None:
    """(the row's shape rule, place in a tuple of paths, whether whole, names there) of one path."""
    module, _, leaf = inside.rpartition("/")
    for path, whole in ((inside, True), (module, False)):
        for key, row in rows.items():
            keys = key if isinstance(key, tuple) else (key,)
            for place, pattern in enumerate(keys):
                numbers = _numbers(pattern, path)
                if numbers is None:
                    continue
                spelled = row if isinstance(row, Leaf) else Leaf(row)
                names = (spelled.name,) if isinstance(spelled.name, str) else spelled.name
                names = tuple(_filled(name, numbers) for name in names)
                if not whole:
                    names = tuple(_member(name, leaf, layout) for name in names)
                rule = (isinstance(key, tuple), spelled.leading, spelled.trailing)
                return rule, place, whole, names
    return None


def _member(module: str, leaf: str, layout: str) -> str:
    return f"{module}/{leaf}" if layout == "flax" else f"{module}.{TORCH.get(leaf, leaf)}"


def _numbers(pattern: str, path: str) -> dict[str, int] | None:
    """What `{i}`, `{j}` of the pattern are in the path; None if it is another path."""
    parts = re.split(r"\{(\w+)\}", pattern)
    regex = "".join(
        re.escape(part) if i % 2 == 0 else rf"(?P<{part}>\d+)" for i, part in enumerate(parts)
    )
    found = re.fullmatch(regex, path)
    return {k: int(v) for k, v in found.groupdict().items()} if found else None


def _filled(name: str, numbers: Mapping[str, int]) -> str:
    def number(match: re.Match) -> str:
        return str(numbers[match[1]] + int(match[2] or 0))

    return re.sub(r"\{(\w+)([+-]\d+)?\}", number, name)


def _known(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def _axes(path: str, rank: int) -> tuple[int, ...]:
    """The order of our axes in PyTorch: dense (out, in), convolutions (out, in, h, w)."""
    if path.rpartition("/")[2] == "kernel":
        return {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}[rank]
    return tuple(range(rank))


def _turn(array: np.ndarray, path: str) -> np.ndarray:
    return array.transpose(_axes(path, array.ndim))


def _turn_back(array: np.ndarray, path: str) -> np.ndarray:
    return array.transpose(np.argsort(_axes(path, array.ndim)))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"params": {"a": {"b": x}}} -> {"params/a/b": x}."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    items = ((f"{prefix}/{key}" if prefix else key, value) for key, value in tree.items())
    return {k: v for name, value in items for k, v in flat(value, name).items()}


def nested(paths: Mapping[str, Any]) -> dict[str, Any]:
    """{"params/a/b": x} -> {"params": {"a": {"b": x}}}."""
    tree: dict[str, Any] = {}
    for path, value in paths.items():
        *folders, leaf = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return tree


def shapes_of(variables: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path of a tree of arrays, or of their `jax.ShapeDtypeStruct`s."""
    return {path: tuple(leaf.shape) for path, leaf in flat(variables).items()}


def read(
    table: Table, variables: Any, source: Mapping[str, Any], *, name: str = "the checkpoint"
) -> dict[str, Any]:
    """The variables of a model from a published file's arrays, one after the other.

    Args:
      table: the names.
      variables: the model's, or their shapes, as `jax.eval_shape` gives them.
      source: arrays by their names there; each is asked for once.
      name: of the file, for the error.

    Returns:
      A tree like `variables`, of numpy arrays in the dtypes of the file.

    Raises:
      CheckpointError: with all names that do not fit, of both sides.
    """
    shapes = shapes_of(variables)
    match = table.bind(shapes, _shapes_in(source))
    match.check(name)
    return nested(dict(arrays(match, shapes, source)))


def arrays(
    match: Match, shapes: Shapes, source: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """(our path, our array), with one of theirs in memory at a time."""

    def order(binding: Binding) -> tuple[int, str]:
        # Large arrays first: the holes that theirs leave in memory are filled by smaller ones. And
        # equal arrays of all layers together: a file may hold them in one stack.
        return -int(np.prod(shapes[binding.paths[0]])), re.sub(r"\d+", "", binding.name)

    for binding in sorted(match.bindings, key=order):
        array = np.asarray(source[binding.name])
        yield from zip(binding.paths, binding.read(array, shapes), strict=True)


def _shapes_in(source: Mapping[str, Any]) -> Shapes:
    shapes = getattr(source, "shapes", None)
    return shapes if shapes is not None else {k: tuple(v.shape) for k, v in source.items()}


def write(table: Table, variables: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, their array) of all of a model's variables.

    Raises:
      CheckpointError: if the table has no place for one.
    """
    ours = flat(variables)
    match = table.bind({path: tuple(array.shape) for path, array in ours.items()})
    match.check("the published form")
    for binding in match.bindings:
        yield binding.name, binding.write([np.asarray(ours[p]) for p in binding.paths])


@dataclass(frozen=True)
class Ours:
    """The names of our own run folders: paths, as they are."""

    def bind(self, ours: Shapes, theirs: Shapes | None = None) -> Match:
        """As `Table.bind`."""
        theirs = ours if theirs is None else theirs
        plain = (False, 0, 0)
        bindings = [Binding(p, (p,), plain, True, "flax") for p in ours if p in theirs]
        wrong = [
            f"{p} {tuple(theirs[p])} for {tuple(ours[p])}"
            for p in ours
            if p in theirs and tuple(theirs[p]) != tuple(ours[p])
        ]
        return Match(
            tuple(bindings),
            {},
            tuple(p for p in theirs if p not in ours),
            tuple(p for p in ours if p not in theirs),
            tuple(wrong),
        )
