"""Classes told by their names alone: python -m vit_jax.zero_shot --checkpoint=REF --data=..."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import command, heap, programs
from vit_jax.errors import ConfigError

USAGE = """Classifies a dataset's held-out pictures by the names of its classes alone, with a model
of pictures and texts (CLIP, SigLIP, or one trained by configs/clip.py), and says how often it is
right.

  python -m vit_jax.zero_shot --checkpoint=hf:openai/clip-vit-base-patch32 --data=cifar10 \\
      --data_dir=TFDS
  python -m vit_jax.zero_shot --checkpoint=runs/clip --data=folder --data_dir=my_pictures \\
      --templates=templates.txt --output=zero_shot.json

A template has a place for the name: "a photo of a {}." With several, one a line in a file, a class
is described by the mean of its sentences. Names come from the dataset, with spaces for "_"; a file
with one name a line, in the order of the classes, replaces them.
"""
TEMPLATE = "a photo of a {}."  # Radford et al. 2021, section 3.1.4
TEXTS = 64  # that are embedded at once
TOP = 5


@dataclass(frozen=True)
class Described:
    """A model of pictures and texts as a classifier, whose classes are texts.

    It is called as what `vit_jax.load` gives, `found(image=...)` -> logits [B, K], so that whatever
    asks a classifier can ask it.

    Attributes:
      loaded: the model.
      labels: a name for each text.
      embeddings: float32 [K, D], of length one.
      scale: what the cosines are multiplied by.
      bias: what is added then.
      recipe: the model's, with the task of what comes out.
    """

    loaded: Any
    labels: tuple[str, ...]
    embeddings: np.ndarray = field(repr=False)
    scale: float
    bias: float
    recipe: Any = field(repr=False)
    reads = frozenset({"image"})

    @property
    def source(self) -> str:
        """What was opened."""
        return self.loaded.source

    @property
    def preprocess(self) -> Any:
        """Of the model."""
        return self.loaded.preprocess

    def __call__(self, *, image: Any) -> np.ndarray:
        """[B, H, W, 3] -> logits [B, K]."""
        found = np.asarray(self.loaded(image=image)["image_embedding"])
        return self.scale * (found @ self.embeddings.T) + self.bias


def reads_texts(loaded: Any) -> bool:
    """Whether a checkpoint is of pictures and texts, in one space."""
    return loaded.recipe.task["target"] == "tasks.contrastive.Contrastive"


def described(
    loaded: Any, texts: Sequence[str], *, templates: Sequence[str] = ("{}",), top: int = TOP
) -> Described:
    """A classifier whose classes are texts.

    A class's embedding is the mean of those of its sentences, normalised again: Radford et al. 2021
    (arXiv:2103.00020), section 3.1.4.

    Args:
      loaded: of `vit_jax.load`.
      texts: one for each class.
      templates: sentences with a place `{}` for it.
      top: how many classes a prediction lists.

    Raises:
      ConfigError: if the model reads no texts, a template has no place, or a text is empty.
      CheckpointError: if the model's tokenizer is not there, or another's.
    """
    if not reads_texts(loaded):
        raise ConfigError(
            f"{loaded.source} reads no texts: wanted CLIP, SigLIP or a run of configs/clip.py"
        )
    if not texts or not all(text.strip() for text in texts):
        raise ConfigError("a text is empty: each must say something to be looked for")
    for template in templates:
        if "{}" not in template:
            raise ConfigError(
                f'the template {template!r} has no place for a name: "a photo of a {{}}."'
            )
    sentences = [template.replace("{}", text) for text in texts for template in templates]
    each = embedded(loaded, sentences).reshape(len(texts), len(templates), -1)  # [K, M, D]
    mean = each.mean(1)
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    constants = loaded(tokens=loaded.tokenize(sentences[:1]))
    task = {
        "target": "tasks.classification.Classification",
        "loss": loaded.recipe.task.get("loss", "softmax"),
        "top": min(top, len(texts)),
    }
    return Described(
        loaded=loaded,
        labels=tuple(texts),
        embeddings=mean,
        scale=float(np.exp(constants["logit_scale"])),
        bias=float(constants.get("logit_bias", 0.0)),
        recipe=replace(loaded.recipe, task=task, beside=()),
    )


def searching(loaded: Any, text: str) -> Described:
    """What tells how near pictures are to a text: the cosine of their embeddings.

    Raises:
      ConfigError, CheckpointError: as of `described`.
    """
    found = described(loaded, [text])
    task = {"target": "tasks.contrastive.Similarity"}
    return replace(found, scale=1.0, bias=0.0, recipe=replace(found.recipe, task=task))


def embedded(loaded: Any, texts: Sequence[str]) -> np.ndarray:
    """Texts -> float32 [N, D] of length one."""
    tokens, parts = loaded.tokenize(texts), []
    size = min(TEXTS, len(tokens))
    for at in range(0, len(tokens), size):
        part = tokens[at : at + size]
        # Always the same shape, so that the last part needs no compilation of its own.
        filled = np.concatenate([part, tokens[: size - len(part)]])
        parts.append(np.asarray(loaded(tokens=filled)["text_embedding"])[: len(part)])
    return np.concatenate(parts)


def cut(loaded: Any, texts: Iterable[str]) -> str:
    """A remark on texts that are longer than the model reads; "" if none is."""
    texts = list(texts)
    (length,), _ = loaded.recipe.inputs["tokens"]
    number = loaded.tokenizer.too_long(texts, length)
    return f"{number} of {len(texts)} texts are longer than {length} tokens and are cut" * (
        number > 0
    )


def evaluate(
    model: Described, dataset: Any, *, batch_size: int = 64, threads: int = 2
) -> tuple[dict[str, float], list[str]]:
    """How often a dataset's pictures are given their class, and which could not be read.

    Returns:
      {"loss", "accuracy", "accuracy_top5" (of more than five classes), "examples"}, and sentences.

    Raises:
      ConfigError: if the dataset tells no classes.
      DataError: if it holds no picture that can be read.
    """
    from vit_jax.build import build
    from vit_jax.data import pipeline

    task = build(dict(model.recipe.task) | {"top": TOP})
    if len(dataset) and "label" not in (first := dataset[0]):
        raise ConfigError(
            f"{dataset.name(0)} has {', '.join(sorted(first))} and no label: wanted a dataset of "
            "classes, such as cifar10, imagenet2012 or folder"
        )
    size = min(batch_size, len(dataset))
    batches = pipeline.eval_batches(
        dataset, model.preprocess.transforms(), batch_size=size, threads=threads
    )
    sums: dict[str, float] = {}
    left_out: list[str] = []
    for batch in batches:
        left_out += pipeline.broken(batch, dataset)
        _, new = task.score(model(image=batch["image"]), batch)
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in new.items()}
    return task.summarize(sums) | {"examples": int(sums["count"])}, left_out


def lines_of(file: Path, what: str) -> list[str]:
    """The lines of a text file that are not empty; ConfigError if it cannot be read."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"--{what}={file} is not UTF-8") from error
    except OSError as error:
        raise ConfigError(f"--{what}={file} cannot be read: {error.strerror}") from error
    if not any(lines):
        raise ConfigError(f"--{what}={file} holds nothing: wanted one a line")
    return [line for line in lines if line]


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.zero_shot",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="REF", help="hf:OWNER/NAME, a folder or a run")
    add("--data", required=True, metavar="NAME", help="a dataset of classes, such as cifar10")
    add("--data_dir", default="", metavar="FOLDER", help="where it lies")
    add("--split", default="validation", help="train or validation (default)")
    add("--templates", type=Path, metavar="FILE", help=f'one a line (default "{TEMPLATE}")')
    add("--names", type=Path, metavar="FILE", help="of the classes, one a line")
    add("--output", type=Path, metavar="FILE.json", help="also write the numbers")
    add("--batch_size", type=int, default=64, help="pictures at once (default 64)")
    add("--threads", type=int, default=2, help="that read pictures (default 2)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16")
    options = parser.parse_args(argv)

    def body() -> int:
        for name in ("batch_size", "threads"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name}={getattr(options, name)} must be at least 1")
        if options.output and not options.output.absolute().parent.is_dir():
            raise ConfigError(f"--output={options.output}: its folder does not exist")
        templates = lines_of(options.templates, "templates") if options.templates else [TEMPLATE]
        names = lines_of(options.names, "names") if options.names else None
        command.quiet()
        heap.keep()
        programs.keep()
        from vit_jax.data import pipeline
        from vit_jax.pretrained.load import load

        dataset = pipeline.open_dataset(options.data, options.split, options.data_dir)
        if names is None:
            names = [name.replace("_", " ") for name in dataset.class_names]
        if len(names) != len(dataset.class_names):
            raise ConfigError(
                f"--names={options.names} has {len(names)} names, and {options.data} has "
                f"{len(dataset.class_names)} classes"
            )
        loaded = load(options.checkpoint, dtype=options.dtype)
        model = described(loaded, names, templates=templates)
        print(model.source)
        for remark in filter(None, (*loaded.remarks, cut(loaded, names))):
            print(f"note: {remark}")
        print(f"{len(names)} classes, each by {len(templates)} sentence(s): {templates[0]!r}")
        numbers, left_out = evaluate(
            model, dataset, batch_size=options.batch_size, threads=options.threads
        )
        for text in left_out:
            print(f"left out: {text}", file=sys.stderr)
        top = f", top-5 {numbers['accuracy_top5']:.2%}" if "accuracy_top5" in numbers else ""
        print(
            f"{options.data} {options.split}, {numbers['examples']:,} pictures: top-1 "
            f"{numbers['accuracy']:.2%}{top} (by chance {1 / len(names):.2%})"
        )
        if options.output:
            told = {"checkpoint": options.checkpoint, "data": options.data, "split": options.split}
            told |= {"classes": len(names), "templates": list(templates)} | numbers
            told["left_out"] = len(left_out)
            options.output.write_text(json.dumps(told, indent=2) + "\n")
            print(f"written: {options.output}")
        return 0

    return command.guard(body)


if __name__ == "__main__":
    sys.exit(main())
