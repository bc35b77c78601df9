"""Images cut into patches: the tokens of a vision transformer."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array


def grid_size(height: int, width: int, patch: int, stride: int = 1) -> tuple[int, int]:
    """The number of patches on each axis of an image: (h, w).

    Args:
      height: H, in pixels.
      width: W, in pixels.
      patch: side of a patch, in pixels of the map that is cut.
      stride: pixels of the image for one of that map, whose sides are ceil(H / stride) and
        ceil(W / stride); 1 where the image itself is cut.

    Raises:
      ValueError: if the patch does not divide the map, with the nearest image sizes where it does.
    """
    sides = [-(-side // stride) for side in (height, width)]
    if patch < 1:
        raise ValueError(f"patch={patch} must be at least 1")
    if all(side and side % patch == 0 for side in sides):
        return sides[0] // patch, sides[1] // patch
    whole = stride * patch
    below = [max(side // whole, 1) * whole for side in (height, width)]
    above = [-(-max(side, 1) // whole) * whole for side in (height, width)]
    sizes = " or ".join(dict.fromkeys(f"{h}x{w}" for h, w in (below, above)))
    what = f"patch={patch}" + (f" on a map of 1/{stride} of the image" if stride > 1 else "")
    raise ValueError(
        f"image size {height}x{width} (height x width): {what} must divide both sides; "
        f"the nearest sizes that fit: {sizes}"
    )


class PatchEmbed(nn.Module):
    """A linear map of each patch: Dosovitskiy et al. 2021 (arXiv:2010.11929), E of eq. 1.

    Attributes:
      width: D.
      patch: side of a patch, in pixels.
      dtype: of the computation; parameters stay float32.
      bias: whether the map has one; CLIP's has none.
    """

    width: int
    patch: int
    dtype: jnp.dtype = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / patch, W / patch, D]; ValueError if the patch does not divide."""
        grid_size(*x.shape[1:3], self.patch)
        side = (self.patch, self.patch)
        return nn.Conv(
            self.width,
            side,
            side,
            padding="VALID",
            use_bias=self.bias,
            dtype=self.dtype,
            name="proj",
        )(x)
