"""A checkpoint that was found and understood; its arrays are still in their file."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit_jax import step
from vit_jax.build import TARGET, build
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.pretrained import names
from vit_jax.pretrained.arrays import Arrays
from vit_jax.pretrained.preprocess import Preprocessing
from vit_jax.pretrained.recipe import Recipe

SIZE = 224  # pixels, where nothing says otherwise


@dataclass(frozen=True)
class Opened:
    """What a reference turned out to be.

    Attributes:
      ref: what was asked for.
      format: the kind of file, for a person.
      recipe: how to build the model, and the names of its arrays.
      arrays: by their names there.
      preprocessing: of this checkpoint, or its publisher's usual one.
      labels: a name for each class; empty if the file has none.
      remarks: what was assumed, for a person.
      words: the folder with its tokenizer.json; None if it has none.
    """

    ref: str
    format: str
    recipe: Recipe
    arrays: Arrays
    preprocessing: Preprocessing
    labels: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    words: Path | None = None

    def module(self, *, dtype: Any = None, **fields: Any) -> nn.Module:
        """The model, with other fields of the backbone where they are given.

        Raises:
          ConfigError: if the backbone has no such field, or refuses the value.
        """
        of_dtype = {} if dtype is None else {"dtype": jnp.dtype(dtype)}
        backbone = self.recipe.backbone | fields | of_dtype
        classes = self.recipe.num_classes
        if classes == 0:
            return build(backbone)
        of_head = {} if classes is None else {"num_classes": classes}
        whole = _with(self.recipe.classifier, of_dtype)
        return build(whole | of_head | {"backbone": backbone})

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of one picture, with what the model reads besides."""
        size = self.preprocessing.size or (SIZE, SIZE)
        inputs = {"image": ((*size, 3), jnp.float32)} | self.recipe.inputs
        return {k: jax.ShapeDtypeStruct((1, *shape), d) for k, (shape, d) in inputs.items()}

    def abstract(self, module: nn.Module) -> dict[str, Any]:
        """Shapes of the module's variables, in no time."""
        init = partial(step.init_variables, model=module)
        try:
            variables = dict(jax.eval_shape(init, jax.random.key(0), self.batch))
        except ValueError as error:  # what a module says of a size that it cannot work with
            raise ConfigError(str(error)) from error
        return variables

    def match(self, module: nn.Module) -> names.Match:
        """Which array of the file goes where; nothing is read."""
        shapes = names.shapes_of(self.abstract(module))
        return self.recipe.table.bind(shapes, self.arrays.shapes)

    def read(self, module: nn.Module, *, dtype: Any = None) -> dict[str, Any]:
        """The module's variables, by path, on the default device, read one after the other.

        Statistics of normalisations stay float32.

        Raises:
          CheckpointError: with all names that do not fit, of both sides.
        """
        shapes = names.shapes_of(self.abstract(module))
        match = self.recipe.table.bind(shapes, self.arrays.shapes)
        match.check(self.ref)
        found = {}
        for path, array in names.arrays(match, shapes, self.arrays):
            kept = path.startswith("batch_stats/") or dtype is None
            # Cast by NumPy, at once: casts on the device would queue with their sources in memory.
            cast = np.array(array, jnp.float32 if kept else jnp.dtype(dtype), order="C")
            found[path] = jnp.asarray(cast)
        return found


def _with(spec: Any, fields: dict[str, Any]) -> Any:
    """A spec with more fields, and all specs in it likewise."""
    if not isinstance(spec, Mapping):
        return spec
    return {k: _with(v, fields) for k, v in spec.items()} | (fields if TARGET in spec else {})


def backbone_fields(module: nn.Module) -> dict[str, Any]:
    """A spec of a module with all its fields, whatever partial made it; modules in it likewise."""
    kind = type(module)
    target = f"{kind.__module__.removeprefix('vit_jax.')}.{kind.__qualname__}"
    fields = {
        name: getattr(module, name)
        for name in kind.__dataclass_fields__
        if name not in ("parent", "name")
    }
    inner = {k: backbone_fields(v) for k, v in fields.items() if isinstance(v, nn.Module)}
    return {"target": target} | fields | inner


def refuse(ref: str, reason: str) -> CheckpointError:
    """The error for a checkpoint that cannot be used."""
    return CheckpointError(f"{ref}: {reason}")
