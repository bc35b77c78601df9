"""What a compiled program does on one chip, read off its HLO text: products, memory, messages."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_START = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
# They name what is there already, or wait for it.
_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
        *("while", "conditional", "call", "partition-id", "replica-id", "optimization-barrier"),
    }
)
_NO_TRAFFIC = ("AllocateBuffer", "ConcatBitcast", "Sharding")


@dataclass
class Message:
    """All collectives of one kind in one step.

    Attributes:
      count: how many are run.
      bytes: what each chip sends, in the fewest bytes that any algorithm needs.
    """

    count: int = 0
    bytes: float = 0.0


@dataclass
class Work:
    """What one chip does in one run of a program; loops are counted as often as they turn.

    Attributes:
      flops: 2 x multiply-adds of its products and convolutions.
      memory_bytes: read from and written to its memory, slices counted as slices; what stays in
        the compiler's fast memory is left out.
      messages: by kind of collective.
      unknown_loops: loops whose number of turns the text does not say; counted once.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    messages: dict[str, Message] = field(default_factory=dict)
    unknown_loops: int = 0

    def add(self, other: "Work", times: int = 1) -> None:
        """Adds `times` runs of another part."""
        self.flops += other.flops * times
        self.memory_bytes += other.memory_bytes * times
        self.unknown_loops += other.unknown_loops
        for kind, message in other.messages.items():
            self.send(kind, message.count * times, message.bytes * times)

    def send(self, kind: str, count: int, size: float) -> None:
        """Adds messages of one kind."""
        mine = self.messages.setdefault(kind, Message())
        mine.count, mine.bytes = mine.count + count, mine.bytes + size


@dataclass(frozen=True)
class _Op:
    name: str
    code: str
    type: str
    operands: tuple[str, ...]
    rest: str  # attributes
    literal: str  # what stands between the brackets
    root: bool


@dataclass
class _Computation:
    ops: list[_Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_name: dict[str, _Op] = {}

    def types(self, op: _Op) -> list[str]:
        """The types of what an operation reads."""
        return [self.by_name[name].type for name in op.operands if name in self.by_name]

    @property
    def root(self) -> _Op:
        return next((op for op in self.ops if op.root), self.ops[-1])


def read(text: str) -> Work:
    """What one chip does, from `jax.stages.Compiled.as_text()` of a program for many.

    A collective over n chips costs each of them, for b bytes that go in: all-reduce 2 b (n-1)/n,
    all-gather b (n-1), reduce-scatter and all-to-all b (n-1)/n, a permutation b, which is what a
    ring needs and no algorithm beats: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce
    algorithms for clusters of workstations", section 3.
    """
    header = text.partition("\n")[0]
    found = re.search(r"num_partitions=(\d+)", header)
    reader = _Reader(*_parse(text), chips=int(found[1]) if found else 1)
    return reader.work(reader.entry)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Computations by name, and the name of the first to run."""
    found: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and "->" in line:
            current = found[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif current is not None and (start := _START.match(line)):
            op = _operation(line[start.end() :], start[2], bool(start[1]))
            if op is not None:
                current.ops.append(op)
                current.by_name[op.name] = op
    return found, entry


def _operation(text: str, name: str, root: bool) -> _Op | None:
    """`f32[2]{0} add(%a, %b), metadata=...` in its parts."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    code = re.match(r"\s*([\w\-]+)\(", text[end:])
    if code is None:
        return None
    opening = end + code.end() - 1
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    names = tuple(_NAME.findall(inside))
    return _Op(name, code[1], text[:end], names, text[closing + 1 :], inside, root)


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens there closes."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _arrays(type_: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(dtype, shape, layout) of each array of a type."""
    for dtype, shape, layout in _ARRAY.findall(type_):
        yield dtype, tuple(int(n.lstrip("<=")) for n in shape.split(",") if n), layout


def size_of(type_: str, *, main_memory: bool = False) -> float:
    """Bytes of all arrays of a type such as `(bf16[2,3]{1,0}, f32[])`.

    Args:
      type_: as HLO writes it; the padding of a tiled layout is not counted.
      main_memory: leaves out what lies in another memory, such as a TPU's on-chip one, `S(1)`.
    """
    return sum(
        math.prod(shape) * _width(dtype)
        for dtype, shape, layout in _arrays(type_)
        if not (main_memory and re.search(r"S\([1-9]", layout))
    )


def _width(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 0


def group_size(attributes: str, chips: int) -> int:
    """How many chips take part in one collective, from its attributes."""
    groups = re.search(r"replica_groups=(.*)", attributes)
    if groups is None:
        return chips
    text = groups[1]
    if text.startswith("mesh["):  # mesh['x'=4,'y'=2], ... {'x'}: those along the named axes
        axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", text.split("]")[0])}
        used = re.search(r"\{('[^}]*)\}", text)
        if used is None:
            return chips
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", used[1])
        return math.prod(int(part) if part else axes[name] for name, part in parts)
    if listed := re.match(r"\[(\d+),(\d+)\]<=", text):  # [groups, chips of each]
        return int(listed[2])
    first = re.match(r"\{\{([\d,]*)\}", text)
    return first[1].count(",") + 1 if first and first[1] else chips


def sent(kind: str, size: float, chips: int) -> float:
    """Bytes that each chip sends for a collective that is given `size` bytes; see `read`."""
    if chips == 1 and kind != "collective-permute":
        return 0.0
    return size * {
        "all-reduce": 2 * (chips - 1) / chips,
        "all-gather": chips - 1,
        "reduce-scatter": (chips - 1) / chips,
        "all-to-all": (chips - 1) / chips,
        "collective-permute": 1,
    }.get(kind, 1)


class _Reader:
    def __init__(self, computations: Mapping[str, _Computation], entry: str, *, chips: int):
        self.computations, self.entry, self.chips = computations, entry, chips
        self._known: dict[str, Work] = {}

    def work(self, name: str) -> Work:
        """All that a computation does, with what it calls."""
        if name not in self._known:
            computation, total = self.computations[name], Work()
            # A TPU spreads one collective over several fusions, each of which repeats it.
            channels: set[str] = set()
            for op in computation.ops:
                total.add(*self._one(op, computation, channels))
            self._known[name] = total
        return self._known[name]

    def _one(self, op: _Op, inside: _Computation, channels: set[str]) -> tuple[Work, int]:
        work = Work()
        if op.code == "while":
            turns = self._turns(op, inside)
            work.add(self.work(_called(op, "body")))
            work.unknown_loops += turns is None
            return work, 1 if turns is None else turns
        if op.code == "conditional":
            branches = [self.work(n) for n in _branches(op)]
            dearest = max(branches, key=lambda w: (w.flops, w.memory_bytes), default=Work())
            return dearest, 1
        called = _called(op, "calls") or (_called(op, "to_apply") if op.code == "call" else "")
        if op.code in ("call", "async-start"):
            work.add(self.work(called))
            return work, 1
        carried: list[str] = []
        if op.code == "fusion" and called in self.computations:
            carried = self._fused(called, work, channels, scatter="all-reduce-scatter" in called)
        self._products_and_messages(op, inside, work, channels)
        work.memory_bytes += self._traffic(op, inside, called, carried)
        return work, 1

    def _fused(self, name: str, work: Work, channels: set[str], scatter: bool) -> list[str]:
        """Products and messages within a fusion; returns the types that its messages touch."""
        inside, carried = self.computations[name], []
        for op in inside.ops:
            if _kind(op):
                carried += [_plain(t) for t in (op.type, *inside.types(op))]
            self._products_and_messages(op, inside, work, channels, scatter)
            if op.code == "fusion":
                below = _called(op, "calls")
                carried += self._fused(below, work, channels, "all-reduce-scatter" in below)
        return carried

    def _products_and_messages(
        self, op: _Op, inside: _Computation, work: Work, channels: set[str], scatter: bool = False
    ) -> None:
        if op.code in ("dot", "convolution"):
            work.flops += _flops(op, inside)
        kind = _kind(op)
        channel = re.search(r"channel_id=\d+", op.rest)
        if kind and not (channel and channel[0] in channels):
            channels |= {channel[0]} if channel else set()
            kind = "reduce-scatter" if scatter and kind == "all-reduce" else kind
            size = sum(size_of(t) for t in inside.types(op))
            work.send(kind, 1, sent(kind, size, group_size(op.rest, self.chips)))

    def _turns(self, op: _Op, inside: _Computation) -> int | None:
        """How often a loop turns: as the compiler says, or the constant it counts up to from 0."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest)
        if known:
            return int(known[1])
        condition = self.computations[_called(op, "condition")]
        test = condition.root
        if test.code != "compare" or "direction=LT" not in test.rest:
            return None
        limit = condition.by_name.get(test.operands[-1])
        if limit is None or limit.code != "constant" or not limit.literal.isdigit():
            return None
        return int(limit.literal)

    def _traffic(self, op: _Op, inside: _Computation, called: str, carried: list[str]) -> float:
        """Bytes between chip and memory of one operation; `carried` only travel through it."""
        if op.code in _FREE or op.code.endswith("-done"):
            return 0.0
        if any(f'custom_call_target="{name}"' in op.rest for name in _NO_TRAFFIC):
            return 0.0
        if op.code.endswith("-start") and op.type.startswith("("):
            return size_of(op.type, main_memory=True)  # it names what goes in and what comes out
        types = inside.types(op)
        if op.code == "dynamic-slice":
            types = []
        elif op.code == "dynamic-update-slice":
            return 2 * size_of(types[1], main_memory=True)
        if op.code != "fusion" or called not in self.computations:
            return size_of(op.type, main_memory=True) + sum(
                size_of(t, main_memory=True) for t in types
            )
        return self._fusion_traffic(op, types, self.computations[called], carried)

    def _fusion_traffic(
        self, op: _Op, types: list[str], body: _Computation, carried: list[str]
    ) -> float:
        total, parameters = 0.0, {}
        for inner in body.ops:
            if inner.code == "parameter":
                parameters[int(inner.literal)] = inner
        for i, type_ in enumerate(types):
            if i in parameters and _plain(type_) not in carried:
                whole = size_of(type_, main_memory=True)
                total += min(whole, self._read_of(parameters[i].name, body, whole))
        results = [op.type]
        made = [body.root]
        if body.root.code == "tuple":
            made = [body.by_name[n] for n in body.root.operands if n in body.by_name]
            results = [m.type for m in made]
        outer = [f"{d}[{','.join(map(str, s))}]{lay}" for d, s, lay in _arrays(op.type)]
        for i, maker in enumerate(made):
            result = outer[i] if len(outer) == len(made) else results[i]
            if _plain(result) in carried:
                continue
            whole = size_of(result, main_memory=True)
            source = _behind(maker, body)
            if source.code == "dynamic-update-slice" and whole:
                update = body.by_name[source.operands[1]]
                whole = min(whole, size_of(update.type))
            total += whole
        return total

    def _read_of(self, name: str, body: _Computation, whole: float) -> float:
        """Bytes of a parameter that a fusion reads, where it only takes slices of it."""
        total = 0.0
        for user in body.ops:
            if name not in user.operands:
                continue
            if user.code in ("dynamic-slice", "slice") or (
                user.code == "gather" and user.operands[0] == name
            ):
                total += size_of(user.type)
            elif user.code == "bitcast":
                total += self._read_of(user.name, body, whole)
            elif user.code == "dynamic-update-slice" and user.operands[0] == name:
                continue  # written in place
            elif user.code == "fusion" and _called(user, "calls") in self.computations:
                below = self.computations[_called(user, "calls")]
                place = str(user.operands.index(name))
                inner = [p for p in below.ops if p.code == "parameter" and p.literal == place]
                total += self._read_of(inner[0].name, below, whole) if inner else whole
            else:
                return whole
        return min(total, whole)


def _behind(op: _Op, body: _Computation) -> _Op:
    while op.code in ("bitcast", "copy") and op.operands and op.operands[0] in body.by_name:
        op = body.by_name[op.operands[0]]
    return op


def _kind(op: _Op) -> str:
    code = op.code.removesuffix("-start")
    return code if code in KINDS else ""


def _plain(type_: str) -> str:
    """A type without layouts."""
    return " ".join(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape, _ in _arrays(type_))


def _called(op: _Op, attribute: str) -> str:
    found = re.search(rf"\b{attribute}=%([\w.\-]+)", op.rest)
    return found[1] if found else ""


def _branches(op: _Op) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
    if several:
        return _NAME.findall(several[1])
    return [n for n in (_called(op, "true_computation"), _called(op, "false_computation")) if n]


def _flops(op: _Op, inside: _Computation) -> float:
    """2 x multiply-adds of a `dot` or a `convolution`; products with padding are left out."""
    result = next(_arrays(op.type))[1]
    left, right = (next(_arrays(t))[1] for t in inside.types(op)[:2])
    if op.code == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
        contracted = [int(a) for a in axes[1].split(",") if a] if axes else []
        return 2.0 * math.prod(result) * math.prod(left[a] for a in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    of_left, of_right, of_result = labels.groups()
    spatial = [c for c in of_result if c.isdigit()]
    window = _window(op.rest, len(spatial))
    pairs = math.prod(
        _pairs(
            left[of_left.index(c)],
            right[of_right.index(c)],
            result[of_result.index(c)],
            {name: values[int(c)] for name, values in window.items()},
        )
        for c in spatial
    )
    # batch x output features x input features of a group x pairs of positions.
    features = result[of_result.index("b")] * result[of_result.index("f")]
    return 2.0 * features * right[of_right.index("i")] * pairs


def _window(attributes: str, axes: int) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in found[1].split()) if found else {}
    numbers = {
        name: [int(n) for n in given[name].split("x")] if name in given else [1] * axes
        for name in ("stride", "lhs_dilate", "rhs_dilate")
    }
    pads = given["pad"].split("x") if "pad" in given else ["0_0"] * axes
    return numbers | {"pad": [int(pad.split("_")[0]) for pad in pads]}


def _pairs(size: int, taps: int, result: int, window: Mapping[str, int]) -> int:
    """How many (output, tap) of one axis meet an input, and neither padding nor a hole."""
    stride, holes, apart = window["stride"], window["lhs_dilate"], window["rhs_dilate"]
    count = 0
    for tap in range(taps):
        for out in range(result):
            place = out * stride + tap * apart - window["pad"]
            count += 0 <= place <= (size - 1) * holes and place % holes == 0
    return count
