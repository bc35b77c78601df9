"""Trains or evaluates what a config describes: python -m vit_jax.main --config=configs/cvt.py."""

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

from vit_jax import bucket, children, command, faults, heap, interrupt, keys, programs, targets
from vit_jax.build import flatten
from vit_jax.errors import ConfigError, nearest

USAGE = """Trains or evaluates what a config describes.

  python -m vit_jax.main --config=configs/cvt.py                      train on the digits
  python -m vit_jax.main --config=configs/cvt.py:cifar10              another recipe of the file
  python -m vit_jax.main --config=configs/vit.py --config.epochs=3    any value overridden
  python -m vit_jax.main --config=configs/vit.py:folder --config.data.data_dir=my_pictures
  python -m vit_jax.main --config=configs/detr.py                     find digits in scenes
  python -m vit_jax.main --config=configs/masked.py                   learn without labels
  python -m vit_jax.main --config=configs/clip.py                     match pictures with sentences
  python -m vit_jax.main --config=configs/captioner.py                write a sentence
  python -m vit_jax.main --config=configs/cvt.py --mode=eval          evaluate the run's checkpoints
  python -m vit_jax.main --config=configs/cvt.py --dry_run            sizes, memory, time, one batch
  python -m vit_jax.main --config=configs/cvt.py --coordinator=HOST:PORT --processes=2 --process=0

Recipes of classifiers are digits (default), folder, finetune, probe, cifar10, imagenet and tiny; of
the others digits or scenes (default), folder and those that their files name. Started again, the
same command goes on where it stopped. A config is a Python file, and it is executed.
"""
MEETING = ("coordinator", "processes", "process")
FLAGS = ("config", "workdir", "mode", "dry_run", *MEETING)
NO_CONFIG = ("__init__", "common")


def main(argv: list[str] | None = None) -> int:
    """Runs one command line, without the program's name; returns the exit status.

    0 done, 2 wrong command line or config, 3 data, 4 checkpoint or run folder, 5 diverged, 6 out of
    memory, 130 Ctrl-C, 143 SIGTERM. An error that a person can mend is one sentence on stderr.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"--help", "-h", "--helpfull", "--helpshort"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    return command.guard(lambda: _start(argv), "stopped before anything was trained")


def parse(argv: list[str]) -> tuple[dict[str, Any], Path | str, str, bool]:
    """Command line -> the config as plain data, workdir, mode and whether it is a dry run.

    The workdir is a path, or an address in a bucket as it was given.

    Raises:
      ConfigError: one sentence for anything that is wrong with it.
    """
    argv, spec = _resolve(argv)
    plain = [a for a in argv if not a.lstrip("-").startswith("config.")]
    default = flatten(_flags(plain).config)  # what there is, before anything is overridden
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.startswith("config."):
            key = name.removeprefix("config.").replace("'", "").replace('"', "")
            if not any(k == key or k.startswith((f"{key}.", f"{key}[")) for k in default):
                raise ConfigError(f"there is no config key {key!r}.{nearest(key, default)}")
            _check_number(key, argument.partition("=")[2], default.get(key))
    values = _flags(argv)
    config = json.loads(values.config.to_json_best_effort())
    for key, value in flatten(config).items():
        wanted = default.get(key)
        if value is None and wanted is not None:
            raise ConfigError(f"config.{key}: a {type(wanted).__name__} was wanted, got None")
    keys.check(config)
    targets.check(config)
    folders = {f"data.{key}": config["data"][key] for key in ("data_dir", "tokenizer")}
    if not bucket.is_address(values.workdir):
        folders = {"--workdir": values.workdir} | folders
    for name, path in folders.items():
        if "://" in path:  # which a file system would take for folders of such names
            raise ConfigError(
                f"{name}={path} is an address, and a folder was wanted: mount the bucket, as "
                "docs/scale.md says"
            )
    if bucket.is_address(values.workdir):
        return config, bucket.checked(values.workdir), values.mode, values.dry_run
    file, _, recipe = spec.partition(":")
    workdir = (
        values.workdir or Path("runs") / f"{Path(file).stem}-{recipe or config['data']['name']}"
    )
    return config, Path(workdir), values.mode, values.dry_run


def meeting(argv: list[str]) -> dict[str, Any]:
    """What the command line says of the other processes: arguments of `processes.join`.

    Raises:
      ConfigError: unless all of it is there, and goes together, or nothing is.
    """
    values = _flags([a for a in argv if a.lstrip("-").partition("=")[0] in MEETING])
    coordinator, processes, process = (getattr(values, name) for name in MEETING)
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdecimal()):
        raise ConfigError(f"--coordinator={coordinator}: HOST:PORT was wanted, as in 10.0.0.1:1234")
    if not coordinator and (processes or process != -1):
        raise ConfigError("--processes and --process need --coordinator=HOST:PORT of process 0")
    if coordinator and not 0 <= process < processes:
        raise ConfigError(
            f"--coordinator needs --processes, how many there are (got {processes}), and --process,"
            f" which one this is, 0 to {max(processes - 1, 0)} (got {process})"
        )
    return {"coordinator": coordinator, "processes": processes, "process": process}


def _check_number(key: str, text: str, default: Any) -> None:
    """ConfigError if `text` is to replace a number and is none; other types check themselves."""
    if type(default) not in (int, float):
        return
    try:
        type(default)(text)
    except ValueError as error:
        wanted = "a whole number" if isinstance(default, int) else "a number"
        raise ConfigError(f"config.{key}={text}: {wanted} was wanted, such as {default}") from error


def _flags(argv: list[str]) -> Any:
    """The parsed flags; ConfigError for one that does not exist or has a wrong value."""
    from absl import flags
    from ml_collections import config_flags

    # Flags of their own, not absl's global ones: importing this module defines nothing.
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "path[:recipe]", flag_values=values)
    flags.DEFINE_string("workdir", "", "run folder", flag_values=values)
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "", flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("processes", 0, "how many", flag_values=values)
    flags.DEFINE_integer("process", -1, "which one", flag_values=values)
    before = sys.argv
    sys.argv = ["vit_jax.main", *argv]  # config_flags looks for overrides there
    try:
        rest = values(sys.argv)
    except Exception as error:  # a config file is a program, which may fail in any way
        raise ConfigError(_sentence(error)) from error
    finally:
        sys.argv = before
    given = any(a.partition("=")[0] in ("--config", "-config") for a in argv)
    if given and not hasattr(values.config, "to_json_best_effort"):
        raise ConfigError(
            f"get_config() must return a config, as configs.common.base() makes it, not "
            f"{values.config!r}"
        )
    if rest[1:]:
        hint = f"; to set a value write --config.{rest[1]}" if "=" in rest[1] else ""
        raise ConfigError(f"{rest[1]!r} is no flag{hint}")
    return values


def _sentence(error: Exception) -> str:
    """What is wrong with the flags or in a config file, as one line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    text = str(error.args[0] if error.args else error).strip() or repr(error)
    unknown = re.search(r"Key [\\'\"]+([^\\'\"]+)[\\'\"]+ does not exist", text)
    if unknown:  # the library goes on with all keys there are
        last = {name.rpartition(".")[2] for name in keys.names()}
        return f"there is no config key {unknown[1]!r}.{nearest(unknown[1], last)}"
    lines = text.splitlines()
    # A config file's own error comes with a traceback inside: its last line is the sentence.
    sentence = lines[-1] if "Traceback" in text or len(lines) > 3 else " ".join(lines)
    return sentence.strip().removeprefix("ValueError: ")


def _resolve(argv: list[str]) -> tuple[list[str], str]:
    """Finds the config file, also beside the package; returns argv with its path, and the spec."""
    for i, argument in enumerate(argv):
        name, equals, spec = argument.partition("=")
        if name not in ("--config", "-config"):
            continue
        if not equals:
            raise ConfigError("write --config=FILE, with the equals sign")
        file, colon, recipe = spec.partition(":")
        beside = Path(__file__).parent.parent
        path = next((p for p in (Path(file), beside / file) if p.is_file()), None)
        if path is None:
            known = [p for p in (beside / "configs").glob("*.py") if p.stem not in NO_CONFIG]
            names = [f"configs/{p.name}" for p in known]
            raise ConfigError(f"there is no config file {file!r}.{nearest(file, names)}")
        # A config may import the shared part of its folder, wherever the program was started.
        folder = str(path.absolute().parent.parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        return [*argv[:i], f"--config={path}{colon}{recipe}", *argv[i + 1 :]], spec
    flags = [a.partition("=")[0] for a in argv if a.startswith("-")]
    wrong = next((f for f in flags if f.lstrip("-") not in FLAGS), "")
    hint = f" ({wrong} is no flag)" if wrong else ""
    raise ConfigError(f"no --config=FILE given{hint}; try --config=configs/cvt.py, or --help")


def _start(argv: list[str]) -> int:
    """Calls what the command line asks for; heavy imports wait until it is known to be right."""
    command.quiet()
    heap.keep()
    programs.keep()
    (config, workdir, mode, dry), others = parse(argv), meeting(argv)
    faults.read()  # a misspelt one is as wrong as a misspelt flag
    gc.disable()  # imports leave no garbage, and to search it is a seventh of their time
    from vit_jax import processes
    from vit_jax.train import StoppedError, train

    gc.enable()
    processes.join(**others)
    try:
        if dry:
            from vit_jax.dry_run import dry_run

            dry_run(config, workdir)
        elif mode == "eval":
            from vit_jax.evaluate import evaluate

            evaluate(config, workdir)
        else:
            train(config, workdir)
    except StoppedError as error:
        if error.compiling:
            processes.part()
            interrupt.leave(error.exit_status)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":  # one that reads data begins here, seconds before it has its task
    children.end_with_parent()
