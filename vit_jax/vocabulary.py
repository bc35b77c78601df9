"""The tokenizer of a run: opened or trained, kept in its folder, held against the model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.contracts import Dataset
from vit_jax.data import text
from vit_jax.data.text import FILE, Tokenizer, captions_of, looked_at, train_tokenizer
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.pretrained import hf
from vit_jax.standin import StandIn

TOKENIZE = "data.text.Tokenize"
FIELD = "vocabulary"  # of a model: V
MARKS, ASKED = ("start", "end", "padding"), -1  # of a model: the numbers that it asks for


def open_tokenizer(source: str) -> Tokenizer:
    """A tokenizer from `hf:OWNER/NAME`, a `tokenizer.json`, or a folder that has one.

    Raises:
      ConfigError: if there is none, or it cannot be read.
      CheckpointError: if it cannot be downloaded.
    """
    if source.startswith("hf:"):
        folder = hf.download(source.removeprefix("hf:"), hf.WORDS)
        if not (folder / FILE).is_file():
            raise ConfigError(f"{source} has no {FILE}, which is what a tokenizer is read from")
        return text.open_tokenizer(folder)
    return text.open_tokenizer(source)


def reads_text(config: Mapping[str, Any]) -> bool:
    """Whether a step of the config makes tokens."""
    steps = [*config["train"]["transforms"], *config["eval"]["transforms"]]
    return any(step["target"] == TOKENIZE for step in steps)


def settle(
    config: Mapping[str, Any], data: Dataset, workdir: Path | None = None
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer that a config describes, and what to tell of it.

    The model's V is filled in, and where its `start`, `end` or `padding` is -1 that number.

    Args:
      config: whose `data.tokenizer` says where it comes from; "" trains one on the captions.
      data: what the run learns from.
      workdir: the run folder: a run that goes on has its tokenizer there.

    Returns:
      None where nothing is tokenized.

    Raises:
      ConfigError: if it cannot be opened, the data has no captions, or the model has another V.
      DataError: if a caption is no Unicode.
      CheckpointError: if the run folder has another one.
    """
    if not reads_text(config):
        return None, []
    settings, remarks = config["data"], []
    tokenizer = kept(workdir)
    # A run that goes on has told what there is to tell, and need not read its captions once more.
    captions = captions_of(data) if tokenizer is None else ()
    if tokenizer is not None:
        _refuse_other(tokenizer, settings["tokenizer"], workdir)
    elif settings["tokenizer"]:
        tokenizer = open_tokenizer(settings["tokenizer"])
    else:
        tokenizer = train_tokenizer(captions, settings["vocabulary"])
        remarks.append(
            f"a vocabulary of {tokenizer.size:,} entries, learned from {len(captions):,} captions"
        )
    size, length = tokenizer.size, settings["length"]
    if isinstance(data, StandIn):
        size, remarks = settings["vocabulary"] if not settings["tokenizer"] else size, []
    else:
        cut = tokenizer.too_long(captions, length)
        if cut:
            some = " looked at" if looked_at(data) < len(data) else ""
            remarks.append(
                f"{cut:,} of {len(captions):,} captions{some} are longer than {length} tokens and "
                "are cut"
            )
    _fit(config["model"], size, {mark: getattr(tokenizer, mark) for mark in MARKS}, "model")
    return tokenizer, remarks


def kept(workdir: Path | None) -> Tokenizer | None:
    """The tokenizer of a run folder; None where there is no run, or it has none."""
    if workdir is None or not (workdir / "config.json").is_file():
        return None
    file = workdir / FILE
    return text.open_tokenizer(file) if file.is_file() else None


def _refuse_other(tokenizer: Tokenizer, source: str, workdir: Path) -> None:
    """CheckpointError if a source that is still at hand has become another."""
    if not source or source.startswith("hf:") or not Path(source).expanduser().exists():
        return
    other = text.open_tokenizer(source)
    if other != tokenizer:
        raise CheckpointError(
            f"{workdir} was trained with another tokenizer ({tokenizer.size:,} entries) than "
            f"data.tokenizer={source} now holds ({other.size:,}): choose another --workdir, or put "
            f"back {workdir / FILE}"
        )


def _fit(spec: Any, size: int, marks: Mapping[str, int | None], place: str) -> None:
    """Fills in V wherever a spec of the model leaves it at 0; ConfigError if it says another."""
    if isinstance(spec, Mapping):
        for key, value in spec.items():
            if key == FIELD and value == 0:
                spec[key] = size
            elif key in marks and value == ASKED:
                if marks[key] is None:
                    raise ConfigError(
                        f"config.{place}.{key} asks for the tokenizer's, which has no {key} of a "
                        "text: choose a tokenizer that has"
                    )
                spec[key] = marks[key]
            elif key == FIELD and value != size:
                raise ConfigError(
                    f"the tokenizer has {size:,} entries and config.{place}.{FIELD} is {value:,}: "
                    "give --config.data.tokenizer that the model was trained with, or leave the "
                    "model's at 0 to take the tokenizer's"
                )
            else:
                _fit(value, size, marks, f"{place}.{key}")


def given(part: Any, tokenizer: Tokenizer | None) -> Any:
    """A transform or a task, with the tokenizer if it has a field for one."""
    if tokenizer is None or not dataclasses.is_dataclass(part) or not hasattr(part, "tokenizer"):
        return part
    return dataclasses.replace(part, tokenizer=tokenizer)
