"""A few pictures at a time, so that what a CPU makes of them stays in its cache."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax

from vit_jax.contracts import Array

Result = TypeVar("Result")

# Bytes of the largest map in a portion. ResNet-50's at 224x224 are two pictures then; one picture
# at a time loses and four gain half as much: experiments/benchmarks.
LARGEST = 8 * 2**20


def in_portions(apply: Callable[[Array], Result], x: Array, largest: int) -> Result:
    """`apply(x)`, which treats rows alike and apart, on a CPU by portions of equal size.

    A CPU's caches hold the maps of a few pictures; those of a batch go to memory and back between
    any two layers. Every other backend, a batch whose rows lie on several devices of the mesh
    around, and one whose size is not known or has no fitting divisor take it whole. The choice
    falls when the program is lowered for its platform.

    Args:
      apply: from [b, ...] for any b to arrays of b rows.
      x: [B, ...].
      largest: bytes of the largest array that `apply` makes of one row.

    Returns:
      What `apply` returns for all rows.
    """
    rows = x.shape[0]
    if not isinstance(rows, int) or jax.sharding.get_abstract_mesh().size > 1:
        return apply(x)
    size = portion(rows, LARGEST // largest)
    if size == rows:
        return apply(x)
    return jax.lax.platform_dependent(x, cpu=partial(looped, apply, size=size), default=apply)


def portion(rows: int, most: int) -> int:
    """The largest divisor of `rows` up to `most`; `rows` where that is 1 or not half of `most`."""
    size = max((n for n in range(2, min(rows, most) + 1) if rows % n == 0), default=1)
    return size if size > max(1, most // 2) else rows


def looped(apply: Callable[[Array], Result], x: Array, size: int) -> Result:
    """`apply(x)` by portions of `size` rows, which divides them; see `in_portions`."""
    portions = x.reshape(-1, size, *x.shape[1:])
    results = jax.lax.map(apply, portions)
    return jax.tree.map(lambda y: y.reshape(x.shape[0], *y.shape[2:]), results)
