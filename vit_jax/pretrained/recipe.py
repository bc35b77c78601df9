"""What it takes to rebuild a published model here."""

from dataclasses import dataclass, field
from typing import Any

from vit_jax.pretrained.names import Ours, Table


@dataclass(frozen=True)
class Recipe:
    """How a published model is built here, and what its arrays are called there.

    Attributes:
      origin: who named the arrays: "transformers", "timm", "Microsoft", "Google", ...
      backbone: a spec for `vit_jax.build.build`: a class with its fields.
      table: the names; `Ours` in a run folder.
      num_classes: K of the head, 0 where there is none and the backbone stands alone; None of a
        whole model that tells no classes, such as one of pictures and texts.
      classifier: the module around the backbone, and further fields of it.
      preprocessing: specs of `vit_jax.data.transforms`, what that publisher's models expect where
        the file does not say.
      task: what the outputs are for: a spec of `vit_jax.tasks`.
      inputs: what the model reads besides `image`, as the batch has it: the shape of one row and
        the dtype, {"tokens": ((77,), "int32")}.
      beside: specs of transforms that add, to a prepared picture, what the model is asked with by
        `predict`: which patches are hidden.
      inference: as what a segmenter was evaluated: a spec such as `vit_jax.tasks.inference`'s.
      remarks: what was assumed, for a person.
    """

    origin: str
    backbone: dict[str, Any]
    table: Table | Ours
    num_classes: int | None
    classifier: dict[str, Any] = field(
        default_factory=lambda: {"target": "models.classifier.Classifier"}
    )
    preprocessing: tuple[dict[str, Any], ...] = ()
    task: dict[str, Any] = field(
        default_factory=lambda: {"target": "tasks.classification.Classification"}
    )
    inputs: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    beside: tuple[dict[str, Any], ...] = ()
    inference: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
