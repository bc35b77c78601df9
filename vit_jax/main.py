"""Trains or evaluates what a config describes: python -m vit_jax.main --config=configs/cvt.py."""

import json
import sys
from pathlib import Path
from typing import Any

from vit_jax import command
from vit_jax.build import flatten
from vit_jax.errors import ConfigError, nearest

USAGE = """Trains or evaluates what a config describes.

  python -m vit_jax.main --config=configs/cvt.py                      train on the digits
  python -m vit_jax.main --config=configs/cvt.py:cifar10              another recipe of the file
  python -m vit_jax.main --config=configs/vit.py --config.epochs=3    any value overridden
  python -m vit_jax.main --config=configs/vit.py:folder --config.data.data_dir=my_pictures
  python -m vit_jax.main --config=configs/detr.py                     find digits in scenes
  python -m vit_jax.main --config=configs/cvt.py --mode=eval          evaluate the run's checkpoints
  python -m vit_jax.main --config=configs/cvt.py --dry_run            sizes, memory, time, one batch

Recipes of classifiers are digits (default), folder, finetune, probe, cifar10, imagenet and tiny; of
detr, setr and upernet scenes (default), folder and those that their files name. Started again, the
same command goes on where it stopped. A config is a Python file, and it is executed.
"""
FLAGS = ("config", "workdir", "mode", "dry_run")
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
    return command.guard(lambda: _run(*parse(argv)), "stopped before anything was trained")


def parse(argv: list[str]) -> tuple[dict[str, Any], Path, str, bool]:
    """Command line -> the config as plain data, workdir, mode and whether it is a dry run.

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
    file, _, recipe = spec.partition(":")
    workdir = (
        values.workdir or Path("runs") / f"{Path(file).stem}-{recipe or config['data']['name']}"
    )
    return config, Path(workdir), values.mode, values.dry_run


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
    before = sys.argv
    sys.argv = ["vit_jax.main", *argv]  # config_flags looks for overrides there
    try:
        rest = values(sys.argv)
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        # A config file's own error comes with a traceback inside: its last line is the sentence.
        lines = str(error.args[0] if error.args else error).strip().splitlines() or [repr(error)]
        sentence = lines[-1] if "Traceback" in lines[0] or len(lines) > 3 else " ".join(lines)
        raise ConfigError(sentence.removeprefix("ValueError: ")) from error
    finally:
        sys.argv = before
    if rest[1:]:
        hint = f"; to set a value write --config.{rest[1]}" if "=" in rest[1] else ""
        raise ConfigError(f"{rest[1]!r} is no flag{hint}")
    return values


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


def _run(config: dict[str, Any], workdir: Path, mode: str, dry: bool) -> int:
    """Calls what the command line asks for; heavy imports wait until it is known to be right."""
    command.quiet()
    from vit_jax.train import StoppedError, train

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
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
