"""Small parameters in one array, for what treats each number, or each matrix, by itself."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.mesh import SMALLEST

Tree = Any

LARGEST = 2**16  # numbers of a matrix: larger ones keep a machine busy by themselves


class Bundles:
    """Small parameters that are treated alike, as one array for all of them.

    A model has hundreds of biases and scales. Their updates are the same few operations hundreds of
    times, which take longer to trace and to compile than the rest of a step, and each a start of
    its own to run. Arrays of `SMALLEST` numbers or more, which a mesh may split, stay as they are,
    but matrices of one shape below `LARGEST` lie on each other where each is treated by itself.
    """

    def __init__(self, params: Tree, *, apart: Tree, matrices: Tree, kinds: tuple[Tree, ...]):
        """Of parameters, or their shapes.

        Args:
          params: a tree of them.
          apart: the same tree of bool, True for what is not bundled.
          matrices: of bool, True for what must stay a matrix.
          kinds: trees of hashable values; only what agrees in all of them is bundled.
        """
        leaves, self._structure = jax.tree.flatten(params)
        self._shapes = [leaf.shape for leaf in leaves]
        found: dict[tuple, list[int]] = {}
        columns = [self._structure.flatten_up_to(kind) for kind in kinds]
        matrices = self._structure.flatten_up_to(matrices)
        for i, left in enumerate(self._structure.flatten_up_to(apart)):
            if leaves[i].size < (LARGEST if matrices[i] else SMALLEST) and not left:
                shape = leaves[i].shape if matrices[i] else None
                kind = (leaves[i].dtype, shape, *(column[i] for column in columns))
                found.setdefault(kind, []).append(i)
        kept = [(kind[1], places) for kind, places in found.items() if len(places) > 1]
        self._stacked = [shape is not None for shape, _ in kept]
        self._all = [places for _, places in kept]
        self._bundled = {i for places in self._all for i in places}

    def of(self, marks: Tree) -> tuple[Tree, list]:
        """A mark for each parameter -> one for each that is left alone, and for each array."""
        leaves = self._structure.flatten_up_to(marks)
        return self._alone(leaves), [leaves[places[0]] for places in self._all]

    def around(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """A transformation of parameters, of one of what `gathered` makes of them."""

        def init(params: Tree) -> Tree:
            return inner.init(self.gathered(params))

        def update(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
            updates, state = inner.update(self.gathered(updates), state, self.gathered(params))
            return self.scattered(updates), state

        return optax.GradientTransformation(init, update)

    def gathered(self, tree: Tree) -> tuple[Tree, list[jax.Array]]:
        """Parameters, or their updates -> those left alone; vectors [N], matrices [K, ...]."""
        leaves = self._structure.flatten_up_to(tree)
        arrays = []
        for places, stacked in zip(self._all, self._stacked, strict=True):
            parts = [leaves[i] if stacked else leaves[i].ravel() for i in places]
            arrays.append(jnp.stack(parts) if stacked else jnp.concatenate(parts))
        return self._alone(leaves), arrays

    def scattered(self, gathered: tuple[Tree, list[jax.Array]]) -> Tree:
        """What `gathered` made, as it was."""
        alone, arrays = gathered
        found = iter(jax.tree.leaves(alone))
        leaves = [None if i in self._bundled else next(found) for i in range(len(self._shapes))]
        for places, array, stacked in zip(self._all, arrays, self._stacked, strict=True):
            sizes = [1 if stacked else math.prod(self._shapes[i]) for i in places]
            parts = jnp.split(array, np.cumsum(sizes)[:-1].tolist())
            for i, part in zip(places, parts, strict=True):
                leaves[i] = part.reshape(self._shapes[i])
        return jax.tree.unflatten(self._structure, leaves)

    def _alone(self, leaves: list) -> Tree:
        """Without what is bundled: None is no leaf of a tree."""
        left = [None if i in self._bundled else leaf for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(self._structure, left)
