"""Sine positions of images of different sizes that share one padded batch."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vit_jax.contracts import Array


def sine_positions(mask: Array, channels: int, temperature: float = 10_000.0) -> jax.Array:
    """Where a pixel lies in its own image: Carion et al. 2020, "DETR" (arXiv:2005.12872), section
    A.4.

    Rows and columns are counted over real pixels only, from 1, and divided by the image's own
    height and width, so that the numbers of an image do not depend on how far it is padded. The
    first half of the channels is of the row, the second of the column; in each, sine and cosine
    alternate, at frequencies from 1 towards 1 / `temperature`.

    Args:
      mask: bool [B, h, w], True on real pixels, which lie at the top left.
      channels: D.
      temperature: what the lowest frequency goes towards the inverse of.

    Returns:
      float32 [B, h, w, D].

    Raises:
      ValueError: if 4 does not divide `channels`.
    """
    if channels % 4:
        raise ValueError(f"sine positions need a width that 4 divides, not {channels}")
    number = channels // 4
    frequencies = temperature ** -(np.arange(number, dtype=np.float32) / number)
    waves = []
    for axis in (1, 2):
        place = jnp.cumsum(mask.astype(jnp.float32), axis)  # [B, h, w]
        last = jax.lax.slice_in_dim(place, place.shape[axis] - 1, None, axis=axis)
        turn = 2 * np.pi * place / (last + 1e-6)
        angle = turn[..., None] * jnp.asarray(frequencies)[None, None, None]  # [B, h, w, D/4]
        pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1)
        waves.append(rearrange(pairs, "b h w c two -> b h w (c two)"))  # [B, h, w, D/2]
    return jnp.concatenate(waves, -1)
