"""Every key of a config that the package reads, with its type and range, as one table.

`configs/common.py` says what the keys mean and their defaults. A config file may leave its locked
base, or write into it what its lock does not notice (`True` for a number, `None`); so the finished
config is held against this table before anything is imported that touches a device. What stands
under `model`, `task`, the transforms and `data.options` is free: `vit_jax.targets` checks it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vit_jax.errors import ConfigError, nearest

KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}


@dataclass(frozen=True)
class Key:
    """What one key may hold.

    Attributes:
      kind: of the value; a whole number is a float too, but True is neither.
      least: the smallest number.
      most: the largest.
      above: what a number must be above.
      choices: the strings there are; () is any.
      none: whether None is allowed.
    """

    kind: type
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    choices: tuple[str, ...] = ()
    none: bool = False

    def check(self, name: str, value: Any) -> None:
        """ConfigError unless `value` fits."""
        if value is None and self.none:
            return
        kinds = (int, float) if self.kind is float else self.kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise ConfigError(f"config.{name}: {KINDS[self.kind]} was wanted, got {value!r}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{name}={value!r} does not exist.{nearest(value, self.choices)}")
        if self.kind in (int, float) and not (
            self.least <= value <= self.most and value > self.above and math.isfinite(value)
        ):
            raise ConfigError(f"config.{name}={value} must be {self._range()}")

    def _range(self) -> str:
        parts = [f"at least {self.least}"] * math.isfinite(self.least)
        parts += [f"above {self.above}"] * math.isfinite(self.above)
        parts += [f"at most {self.most}"] * math.isfinite(self.most)
        return " and ".join(parts) or "finite"


@dataclass(frozen=True)
class Tuple:
    """A key that holds any number of entries, each as `of`: a `Key` or a row of them."""

    of: Any
    example: str

    def check(self, name: str, value: Any) -> None:
        """ConfigError unless `value` fits."""
        if not isinstance(value, (list, tuple)):
            raise ConfigError(
                f"config.{name}: a tuple was wanted, such as {self.example}, got {value!r}"
            )
        for i, entry in enumerate(value):
            self._check(f"{name}[{i}]", entry, self.of)

    def _check(self, name: str, entry: Any, wanted: Any) -> None:
        if not isinstance(wanted, tuple):
            wanted.check(name, entry)
            return
        if not isinstance(entry, (list, tuple)) or len(entry) != len(wanted):
            raise ConfigError(
                f"config.{name}: {len(wanted)} entries were wanted, as in {self.example}, got "
                f"{entry!r}"
            )
        for i, (part, key) in enumerate(zip(entry, wanted)):
            self._check(f"{name}[{i}]", part, key)


@dataclass(frozen=True)
class Free:
    """A block whose keys belong to what it names.

    Attributes:
      target: whether it must name something to build.
      empty: whether it may hold nothing.
      many: whether it is a tuple of such blocks.
      optional: whether only some configs have it.
    """

    target: bool = True
    empty: bool = False
    many: bool = False
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        """ConfigError unless `value` is such a block."""
        if self.many:
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"config.{name}: a tuple of steps was wanted, got {value!r}")
            for i, entry in enumerate(value):
                Free().check(f"{name}[{i}]", entry)
            return
        if not isinstance(value, Mapping):
            raise ConfigError(f"config.{name}: a block of keys was wanted, got {value!r}")
        if self.target and not (self.empty and not value) and "target" not in value:
            raise ConfigError(
                f"config.{name} names no target, such as {{'target': 'models.vit.vit_s16'}}"
            )


NATURAL, COUNT = Key(int, least=1), Key(int, least=0)
SHARE, POSITIVE = Key(float, least=0, most=1), Key(float, least=0)
TEXT, NUMBER = Key(str), Key(float)

KEYS: dict[str, Any] = {
    "seed": Key(int, least=0, most=2**32 - 1),
    "batch_size": NATURAL,
    "steps": COUNT,
    "examples": COUNT,
    "epochs": POSITIVE,
    "eval_every": COUNT,
    "checkpoint_every": COUNT,
    "log_every": COUNT,
    "max_skipped": NATURAL,
    "hang_seconds": POSITIVE,
    "learning_rate": Key(float, above=0),
    "accumulate": NATURAL,
    "ema": SHARE,
    "image_size": NATURAL,
    "init": TEXT,
    "init_skip": TEXT,
    "dtype": Key(str, choices=("float32", "bfloat16", "float16")),
    "mesh": {axis: Key(int, least=-1) for axis in ("data", "fsdp", "tensor")},
    "sharding": Tuple((TEXT, Tuple(Key(str, none=True), '("fsdp",)')), '(("head", ("fsdp",)),)'),
    "schedule": {
        "name": Key(str, choices=("cosine", "linear", "polynomial", "steps", "constant")),
        "warmup_steps": COUNT,
        "warmup_examples": COUNT,
        "warmup_epochs": POSITIVE,
        "warmup_from": POSITIVE,
        "final": POSITIVE,
        "power": Key(float, above=0),
        "drops": Tuple(SHARE, "(0.6, 0.8)"),
        "drop_to": Key(float, above=0, most=1),
    },
    "optimizer": {
        "name": Key(str, choices=("adamw", "sgd", "lamb", "adafactor", "muon")),
        "weight_decay": POSITIVE,
        "clip": POSITIVE,
        "b1": SHARE,
        "b2": SHARE,
        "epsilon": Key(float, above=0),
        "momentum": SHARE,
        "nesterov": Key(bool),
        "no_decay": Key(str, none=True),
        "decay_1d": Key(bool),
        "muon_convolutions": Key(bool),
        "freeze": TEXT,
        "layer_decay": Key(float, above=0, most=1),
        "lr_scale": Tuple((TEXT, POSITIVE), '(("head", 10.0),)'),
        "clamp": Tuple((TEXT, NUMBER, NUMBER), '(("logit_scale", 0.0, 4.6052),)'),
    },
    "checkpoint": {"keep_last": COUNT, "keep_best": COUNT},
    "data": {
        "name": TEXT,
        "data_dir": TEXT,
        "options": Free(target=False),
        "tokenizer": TEXT,
        "vocabulary": NATURAL,
        "length": NATURAL,
        "max_pixels": NATURAL,
        "max_broken": SHARE,
        "on_broken": Key(str, choices=("skip", "stop")),
        "threads": COUNT,
        "workers": COUNT,
    },
    "train": {"transforms": Free(many=True), "mix": Free(empty=True)},
    "eval": {"transforms": Free(many=True), "inference": Free(empty=True, optional=True)},
    "task": Free(),
    "model": Free(),
}


def names(table: Mapping[str, Any] = KEYS, prefix: str = "") -> Iterable[str]:
    """The full names of a table's keys: "seed", ..., "optimizer.name"."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from names(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def check(config: Any) -> None:
    """ConfigError for the first thing in `config` that the table does not allow.

    Args:
      config: plain data, as `main.parse` makes it of a config file.
    """
    _check(config, KEYS, ())


def _check(block: Any, table: Mapping[str, Any], place: Sequence[str]) -> None:
    here = ".".join(place)
    if not isinstance(block, Mapping):
        where = f"config.{here}: a block of keys" if place else "get_config() must return a config:"
        raise ConfigError(f"{where} {'was ' * bool(place)}wanted, got {block!r}")
    for key in block:
        if key not in table:
            full = ".".join((*place, key))
            raise ConfigError(f"there is no config key {full!r}.{nearest(full, names())}")
    for key, wanted in table.items():
        full = ".".join((*place, key))
        if key not in block:
            if not getattr(wanted, "optional", False):
                raise ConfigError(
                    f"config.{full} is missing; a config starts from configs.common.base(), which "
                    "has every key"
                )
        elif isinstance(wanted, Mapping):
            _check(block[key], wanted, (*place, key))
        else:
            wanted.check(full, block[key])
