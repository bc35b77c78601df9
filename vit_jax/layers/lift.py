"""Arrays of fewer axes beside those of more."""

import jax

from vit_jax.contracts import Array


def lift(x: Array, like: Array) -> jax.Array:
    """Leading axes of length 1, until the ranks agree: [D] -> [1, ..., D]."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)
