"""From plain data to objects: {"target": "models.cvt.cvt_13", "drop_path": 0.1} -> a module."""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from vit_jax.errors import ConfigError, nearest

TARGET = "target"


def build(spec: Any, **extra: Any) -> Any:
    """The object that `spec` names, with the specs inside it built first.

    Args:
      spec: a mapping with `target`, the path below `vit_jax` of a class, a function or a named size
        (or a full path for code of one's own: "my_package.my_module:MyModel"), and its keyword
        arguments; lists become tuples; anything else is returned as it is.
      **extra: more arguments for the outermost target.

    Raises:
      ConfigError: if the target or an argument does not exist, with the nearest name, or if the
        target refuses a value.
    """
    if isinstance(spec, (list, tuple)):
        return tuple(build(item) for item in spec)
    if not isinstance(spec, Mapping):
        return spec
    arguments = {k: build(v) for k, v in spec.items() if k != TARGET}
    if TARGET not in spec:
        return arguments
    target = find(spec[TARGET])
    arguments.update(extra)
    accepted = _accepted(target)
    for name in arguments:
        if accepted is not None and name not in accepted:
            raise ConfigError(f"{spec[TARGET]} has no argument {name!r}.{nearest(name, accepted)}")
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{spec[TARGET]}: {error}") from error


def find(path: str) -> Callable[..., Any]:
    """`models.cvt.cvt_13` (below vit_jax) or `package.module:name` -> what the path names.

    Raises:
      ConfigError: naming the part of the path that does not exist, and the nearest one that does.
    """
    if ":" in path:
        module_path, _, name = path.partition(":")
    else:
        module_path, _, name = f"vit_jax.{path}".rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not module_path.startswith(error.name):
            raise  # the module exists, and something it needs does not
        parent, _, missing = error.name.rpartition(".")
        hint = nearest(missing, submodules(parent)) if parent else ""
        raise ConfigError(f"target {path!r}: there is no module {error.name!r}.{hint}") from error
    if not hasattr(module, name):
        valid = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(f"target {path!r}: {module_path} has no {name!r}.{nearest(name, valid)}")
    return getattr(module, name)


def submodules(package: str) -> list[str]:
    """The names of the modules of a package, which is imported; empty if it is no package."""
    path = getattr(importlib.import_module(package), "__path__", [])
    return sorted(info.name for info in pkgutil.iter_modules(path))


def named_sizes() -> dict[str, partial]:
    """Every named size of every architecture: {"cvt_13": partial(CvT, ...), ...}.

    A named size is a public `functools.partial` of a module of `vit_jax.models`.
    """
    sizes = {}
    for name in submodules("vit_jax.models"):
        module = importlib.import_module(f"vit_jax.models.{name}")
        sizes |= {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, partial) and not key.startswith("_")
        }
    return sizes


def _accepted(target: Callable[..., Any]) -> set[str] | None:
    """Names of the keyword arguments of `target`; None if it takes any."""
    parameters = inspect.signature(target).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    # Flax adds `parent` and `name` to every module: they are wiring, not settings.
    hidden = {"parent", "name"} if hasattr(getattr(target, "func", target), "apply") else set()
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name for p in parameters if p.kind in kinds} - hidden


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b[0]": 1}; also of a ConfigDict."""
    if hasattr(tree, "to_json_best_effort"):
        tree = json.loads(tree.to_json_best_effort())
    if isinstance(tree, dict) and tree:
        items = [(f"{prefix}.{k}" if prefix else k, v) for k, v in tree.items()]
    elif isinstance(tree, list) and tree:
        items = [(f"{prefix}[{i}]", v) for i, v in enumerate(tree)]
    else:
        return {prefix: tree}
    return {k: v for name, item in items for k, v in flatten(item, name).items()}
