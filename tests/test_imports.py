"""The import law: who may know whom, read from the source, and what importing may do."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The shell, from the outside in: each may import those after it, and all of the core. A command
# that nobody imports joins at the front.
SHELL = (
    *(
        "benchmark",
        "workload",
        "vit_jax",
        "export",
        "predict",
        "search",
        "zero_shot",
        "stream",
        "describe",
    ),
    "plan",
    *("tokenizer", "main", "dry_run", "train", "evaluate", "run", "vocabulary", "pretrained"),
    "command",
)
CORE = frozenset(
    {
        *(
            "step",
            "build",
            "mesh",
            "optim",
            "bundles",
            "checkpoint",
            "report",
            "cost",
            "pictures",
            "faults",
        ),
        *("interrupt", "keys", "targets", "watchdog", "lock", "broken", "processes", "standin"),
        *("programs", "heap", "worker", "bucket", "children"),
        "data.pipeline",
    }
)
LAW = {  # what each part may import of the package, besides itself and `errors`
    "errors": set(),
    "contracts": set(),
    "boxes": {"contracts"},
    "layers": {"contracts"},
    "models": {"layers", "contracts"},
    "tasks": {"boxes", "contracts"},
    "data": {"contracts"},
    **{part: CORE | {"contracts"} for part in CORE},
    "data.pipeline": {"data", "contracts", "children"},
    **{p: {*SHELL[i + 1 :], *CORE, "contracts"} for i, p in enumerate(SHELL)},
    "plan": {*SHELL[SHELL.index("plan") + 1 :], *CORE, "contracts", "chips", "hlo"},
    **{
        p: {*SHELL[5:], *CORE, "contracts", "data", "found"}
        for p in ("predict", "search", "stream")
    },
    "tokenizer": {"main", "vocabulary", "command", *CORE, "contracts", "data"},
    "vocabulary": {"pretrained", *CORE, "contracts", "data"},
    "found": {"tasks", "boxes", "contracts", "data"},
    "pretrained": {*CORE, "contracts", "layers", "data", "pretrained.arrays"},
    "pretrained.arrays": set(),  # the one that may ask for PyTorch, to read its pickles
    "command": set(),
    "peer": set(),  # the other side of a benchmark, in a Python of its own
    "chips": set(),
    "hlo": set(),
}
STDLIB = sys.stdlib_module_names
ONLY = {  # the other packages that a part may import; the rest may import what it likes
    "errors": set(),
    "contracts": {"jax", "flax", "numpy"},
    "boxes": {"jax", "numpy"},
    "layers": {"jax", "flax", "numpy", "einops"},
    "models": {"jax", "flax", "numpy", "einops"},
}
NEVER = {  # packages that a part must do without
    **dict.fromkeys(LAW, frozenset({"tensorflow", "torch", "clu", "configs"})),
    "pretrained.arrays": {"tensorflow", "jax", "flax", "clu", "configs"},
    "peer": {"tensorflow", "jax", "flax", "clu", "configs"},  # PyTorch is what it is for
    "tasks": {"tensorflow", "torch", "clu", "configs", "flax"},
    "data": {"tensorflow", "torch", "clu", "configs", "flax", "jax", "optax", "orbax"},
}


def modules_of(package):
    """Names and paths of a package's modules."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES, CONFIGS = modules_of("vit_jax"), modules_of("configs")


def part_of(module):
    """vit_jax.layers.attention -> layers; vit_jax.train -> train; vit_jax -> vit_jax."""
    below = module.removeprefix("vit_jax.")
    return below if below in LAW else below.split(".")[0]


def imports(source):
    """Full names of the modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            path = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{path}.{alias.name}"
                inside = path == "vit_jax" or full in MODULES or full in CONFIGS
                yield full if inside else path


def offences(module, source):
    """What a module must not import, each with the reason."""
    part = part_of(module)
    for name in imports(source):
        package = name.split(".")[0]
        if not package:
            yield f"{name}: imports are absolute"
        elif package == "vit_jax":
            if part_of(name) not in LAW[part] | {part, "errors"}:
                yield f"{name}: {part} may import {sorted(LAW[part])}"
        elif package in NEVER[part]:
            yield f"{name}: {part} does without {package}"
        elif part in ONLY and package not in STDLIB | ONLY[part]:
            yield f"{name}: {part} may import {sorted(ONLY[part])}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_place_allows(module):
    assert part_of(module) in LAW, f"{module} has no place in the import law: give it one"
    assert list(offences(module, MODULES[module].read_text())) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vit_jax.layers.attention", "from vit_jax.models import cvt"),
        ("vit_jax.layers.attention", "import optax"),
        ("vit_jax.models.cvt", "from vit_jax.data.pipeline import Pipeline"),
        ("vit_jax.models.cvt", "from vit_jax import optim"),
        ("vit_jax.models.cvt", "from vit_jax.tasks.classification import Classification"),
        ("vit_jax.tasks.classification", "from vit_jax.layers.attention import attend"),
        ("vit_jax.tasks.classification", "from flax import linen"),
        ("vit_jax.data.digits", "def f():\n    import jax.numpy"),
        ("vit_jax.data.digits", "import tensorflow as tf"),
        ("vit_jax.data.digits", "from . import pipeline"),
        ("vit_jax.data.pipeline", "from vit_jax import train"),
        ("vit_jax.step", "from vit_jax.run import Run"),
        ("vit_jax.run", "from vit_jax.train import train"),
        ("vit_jax.train", "from vit_jax.data.digits import Digits"),
        ("vit_jax.train", "import vit_jax.models.cvt"),
        ("vit_jax.train", "from configs import common"),
        ("vit_jax.errors", "import numpy"),
    ],
)
def test_the_law_sees_an_import_that_breaks_it(module, line):
    assert len(list(offences(module, line))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vit_jax.models.hybrid", "from vit_jax.models.vit import ViT"),
        ("vit_jax.data.pipeline", "import jax\nfrom vit_jax.data import transforms"),
        (
            "vit_jax.train",
            "import jax, numpy\nfrom vit_jax import step\nfrom vit_jax.data import pipeline",
        ),
        ("vit_jax.layers.attention", "import math\nfrom vit_jax.errors import nearest"),
    ],
)
def test_the_law_allows_what_the_design_allows(module, line):
    assert list(offences(module, line)) == []


def test_no_two_modules_import_each_other():
    graph = {m: {n for n in imports(p.read_text()) if n in MODULES} for m, p in MODULES.items()}
    while leaves := {m for m, names in graph.items() if not names & graph.keys() - {m}}:
        graph = {m: names for m, names in graph.items() if m not in leaves}
    assert not graph, f"a cycle runs through {sorted(graph)}"


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_imports_ml_collections_and_the_common_part_only(config):
    names = set(imports(CONFIGS[config].read_text()))
    assert {n for n in names if n.split(".")[0] not in STDLIB} <= {
        "ml_collections",
        "configs.common",
    }


def test_the_loop_names_no_model_task_or_dataset():
    families = {
        p.stem for k in ("models", "tasks", "data") for p in (ROOT / "vit_jax" / k).glob("*.py")
    }
    families -= {"__init__", "pipeline", "transforms"}
    strings = {
        node.value
        for node in ast.walk(ast.parse(MODULES["vit_jax.train"].read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = {string for string in strings if families & set(string.split("."))}
    assert not named, f"train.py names {sorted(named)}"


PROGRAM = """
import importlib, json, sys
opened = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])
sys.addaudithook(hook)
for name in sys.argv[3:]:
    importlib.import_module(name)
import absl.flags, jax
found = {
    "flags": [m for m in absl.flags.FLAGS.flags_by_module_dict() if m.startswith("vit_jax")],
    "files": [p for p in opened if p.startswith(tuple(sys.argv[1:3])) and ".py" not in p],
    "packages": [p for p in ("tensorflow", "torch", "clu") if p in sys.modules],
}
try:
    jax.devices()
except RuntimeError as error:
    found["device"] = str(error)
print(json.dumps(found))
"""


def test_importing_everything_touches_no_device_flag_or_file(tmp_path):
    folders = [str(ROOT / name) + os.sep for name in ("vit_jax", "configs")]
    arguments = [*folders, *MODULES, *CONFIGS]
    # Where there is no platform, the first look at a device raises.
    environment = {"JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "no_such_platform" in found.pop("device")  # it was still to be looked at
    assert found == {"flags": [], "files": [], "packages": []}
    assert list(tmp_path.iterdir()) == []
