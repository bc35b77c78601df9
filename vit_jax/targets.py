"""What a config wants built, checked by reading the package's source, without importing it.

`build` finds the same mistakes; but it imports the model's libraries first, which takes seconds,
and a pod's devices may be waiting. What the source does not show at a glance is left to `build`.
"""

import ast
import difflib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vit_jax.errors import ConfigError, nearest

ROOT = Path(__file__).parent
PLAIN = {"int": int, "float": (int, float), "str": str, "bool": bool}
WORDS = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "True or False"}
FROM_CHECKPOINT = "init."  # targets that `config.init` fills in


def check(config: Mapping[str, Any]) -> None:
    """ConfigError for the first target, argument or dataset of a config that does not exist.

    Args:
      config: as `keys.check` has found it right.
    """
    for name in ("model", "task"):
        _check(config[name], name)
    for part in ("train", "eval"):
        for i, step in enumerate(config[part]["transforms"]):
            _check(step, f"{part}.transforms[{i}]")
    _check(config["train"]["mix"], "train.mix")
    _check(config["eval"].get("inference", {}), "eval.inference")
    _check_dataset(config["data"])


def _check(spec: Any, place: str) -> None:
    if isinstance(spec, (list, tuple)):
        for i, entry in enumerate(spec):
            _check(entry, f"{place}[{i}]")
    if not isinstance(spec, Mapping):
        return
    for name, value in spec.items():
        _check(value, f"{place}.{name}")
    if "target" not in spec:
        return
    target = spec["target"]
    if not isinstance(target, str):
        raise ConfigError(f"config.{place}.target: a string was wanted, got {target!r}")
    if ":" in target or target.startswith(FROM_CHECKPOINT):
        return
    accepted = arguments(target)
    for name, value in spec.items():
        if accepted is None or name == "target":
            continue
        if name not in accepted:
            raise ConfigError(f"{target} has no argument {name!r}.{nearest(name, accepted)}")
        wanted = accepted[name]
        wrong = isinstance(value, bool) is not (wanted == "bool")
        if wanted in PLAIN and (wrong or not isinstance(value, PLAIN[wanted])):
            raise ConfigError(f"config.{place}.{name}: {WORDS[wanted]} was wanted, got {value!r}")


def arguments(target: str) -> dict[str, str] | None:
    """{name: its annotation} of what a target below `vit_jax` takes; None if it is not plain.

    Raises:
      ConfigError: if there is no such target, with the nearest name.
    """
    *folders, name = target.split(".")
    folder = ROOT
    for i, part in enumerate(folders):
        inside = _modules(folder)
        if part not in inside:
            raise ConfigError(
                f"target {target!r}: there is no module "
                f"{'.'.join(('vit_jax', *folders[: i + 1]))!r}.{nearest(part, inside)}"
            )
        folder = folder / part
    module = _module(folder)
    if not name or not folders or name not in module:
        valid = [n for n in module if not n.startswith("_")]
        raise ConfigError(
            f"target {target!r}: {'.'.join(('vit_jax', *folders))} has no {name!r}."
            f"{nearest(name, valid)}"
        )
    return _accepted(folder, name)


def _modules(folder: Path) -> list[str]:
    return [
        path.stem
        for path in folder.glob("*")
        if path.stem != "__init__" and (path.suffix == ".py" or (path / "__init__.py").exists())
    ]


@cache
def _module(path: Path) -> dict[str, ast.stmt]:
    """What a module defines at its top level, by name; imports too."""
    file = path.with_suffix(".py")
    found: dict[str, ast.stmt] = {}
    if not file.exists():
        file = path / "__init__.py"
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0]: node for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            found |= dict.fromkeys(names, node)
    return found


def _accepted(path: Path, name: str) -> dict[str, str] | None:
    node = _module(path).get(name)
    if isinstance(node, ast.FunctionDef):
        return _parameters(node)
    if isinstance(node, ast.ClassDef):
        return _fields(path, node)
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vit_jax."):
        there = ROOT.joinpath(*node.module.split(".")[1:])
        own = next(a.name for a in node.names if (a.asname or a.name) == name)
        return _accepted(there, own) if there.with_suffix(".py").exists() else None
    value = getattr(node, "value", None)
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "partial":
        base = value.args[0]
        return _accepted(path, base.id) if isinstance(base, ast.Name) else None
    return None


def _parameters(node: ast.FunctionDef) -> dict[str, str] | None:
    if node.args.kwarg:
        return None
    every = [*node.args.args, *node.args.kwonlyargs]
    return {a.arg: _annotation(a.annotation) for a in every if a.arg != "self"}


def _fields(path: Path, node: ast.ClassDef) -> dict[str, str] | None:
    """The fields of a dataclass or a module, with those of the classes it stands on."""
    own = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
    if own is not None:
        return _parameters(own)
    fields: dict[str, str] = {}
    for base in node.bases:
        if ast.unparse(base) == "nn.Module":
            continue
        below = _accepted(path, base.id) if isinstance(base, ast.Name) else None
        if below is None:
            return None
        fields |= below
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
            fields[line.target.id] = _annotation(line.annotation)
    return fields


def _annotation(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node)


def _check_dataset(data: Mapping[str, Any]) -> None:
    """ConfigError for a misspelt dataset of ours, and for an option that ours does not have."""
    folder = ROOT / "data"
    own = {
        name: opener
        for name in _modules(folder)
        if isinstance(opener := _module(folder / name).get("open"), ast.FunctionDef)
        and name not in ("tfds", "pipeline")
    }
    name = data["name"]
    if name not in own:
        _check_name(name, data["data_dir"], own)
        return
    accepted = _parameters(own[name])
    if accepted is None:
        return
    accepted = accepted.keys() - {"split", "data_dir"}
    for option in data["options"]:
        if option not in accepted:
            hint = nearest(option, accepted) or " It has none."
            raise ConfigError(f"data.options: {name} has no option {option!r}.{hint}")


def _check_name(name: str, data_dir: str, own: Mapping[str, Any]) -> None:
    """ConfigError where TFDS has nothing prepared, and one of ours is nearly called so."""
    folder = Path(data_dir or "~/tensorflow_datasets").expanduser()
    there = folder / re.split("[/:]", name)[0]
    if not there.exists() and difflib.get_close_matches(name, own, n=1, cutoff=0.75):
        raise ConfigError(
            f"data.name={name!r} is no dataset of vit_jax.data and not in {folder}."
            f"{nearest(name, own)}"
        )
