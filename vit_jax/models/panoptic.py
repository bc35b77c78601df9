"""A mask for each of DETR's boxes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers.attention import MASKED
from vit_jax.layers.convolution import Conv
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import GroupNorm
from vit_jax.layers.pyramid import nearest
from vit_jax.models.detr import DETR
from vit_jax.models.resnet import resnet_50

UNIFORM = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class MaskAttention(nn.Module):
    """Where each query looks: Carion et al. 2020 (arXiv:2005.12872), section 3.4 and figure 8.

    The weights of one query sum to 1 over all heads and pixels together, as in the authors' code,
    so that heads compete; `layers.attention` has no such softmax, and nothing is attended to.

    Parameters: `query`, `key`.

    Attributes:
      heads: A.
      dtype: of the products; the softmax is float32.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, query: Array, memory: Array, seen: Array | None) -> jax.Array:
        """[B, Q, D], [B, h, w, D], bool [B, h, w] or None -> float32 [B, Q, h, w, A]."""
        width = query.shape[-1]
        dense = partial(
            Dense, width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform()
        )
        query = dense(name="query")(query) * (width // self.heads) ** -0.5
        query = rearrange(query, "b q (a d) -> b q a d", a=self.heads)
        key = rearrange(dense(name="key")(memory), "b h w (a d) -> b h w a d", a=self.heads)
        logits = jnp.einsum("bqad,bhwad->bqhwa", query, key, preferred_element_type=jnp.float32)
        if seen is not None:
            logits = jnp.where(
                jnp.broadcast_to(seen[:, None, ..., None], logits.shape), logits, MASKED
            )
        return jax.nn.softmax(logits, (2, 3, 4))


class MaskHead(nn.Module):
    """Masks from a coarse map, finer with each of the backbone's: Carion et al. 2020, figure 8.

    Five 3x3 convolutions with group norms and ReLUs; before the last three the map grows to the
    size of the next finer one, by PyTorch's nearest neighbours, and a 1x1 convolution of that is
    added.

    Parameters: `conv1`, `norm1`, .. `conv5`, `norm5`, `adapter1` .. `adapter3`, `out`.

    Attributes:
      width: D; the convolutions have D / 2, D / 4, D / 8 and D / 16 features.
      groups: of the norms, or as many as there are channels where they are fewer.
      epsilon: of the norms.
      dtype: of the computation; parameters stay float32.
    """

    width: int
    groups: int = 8
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, projected: Array, attention: Array, finer: Sequence[Array]) -> jax.Array:
        """[B, h, w, D], [B, Q, h, w, A], three maps coarse to fine -> logits [B, Q, H, W] at the
        size of the finest.
        """
        batch, queries = attention.shape[:2]

        def conv(x: jax.Array, features: int, name: str) -> jax.Array:
            return Conv(features, 3, dtype=self.dtype, kernel_init=UNIFORM, name=name)(x)

        def block(x: jax.Array, features: int, i: int) -> jax.Array:
            x = conv(x, features, f"conv{i}")
            groups = min(self.groups, features)
            norm = GroupNorm(groups, epsilon=self.epsilon, dtype=self.dtype, name=f"norm{i}")
            return nn.relu(norm(x))

        shape = (batch, queries, *projected.shape[1:])
        x = jnp.broadcast_to(projected[:, None], shape)
        x = jnp.concatenate([x, attention.astype(x.dtype)], -1)  # [B, Q, h, w, D + A]
        x = rearrange(x, "b q h w c -> (b q) h w c")
        x = block(x, x.shape[-1], 1)
        x = block(x, self.width // 2, 2)
        for i, fine in enumerate(finer):
            adapter = Dense(
                x.shape[-1], dtype=self.dtype, kernel_init=UNIFORM, name=f"adapter{i + 1}"
            )(fine)  # [B, H, W, C], the same for all queries of an image
            x = rearrange(nearest(x, fine.shape[1:3]), "(b q) h w c -> b q h w c", b=batch)
            x = rearrange(x + adapter[:, None], "b q h w c -> (b q) h w c")
            x = block(x, self.width // 2 ** (i + 2), i + 3)
        x = conv(x, 1, "out").astype(jnp.float32)
        return rearrange(x, "(b q) h w 1 -> b q h w", b=batch)


class DETRPanoptic(DETR):
    """DETR with a mask for each query: Carion et al. 2020 (arXiv:2005.12872), section 3.4.

    Its parameters are those of `DETR`, by the same names, so that a trained detector is where it
    starts, and `mask_attention`, `mask_head`. The authors train these two with the rest frozen.

    Attributes:
      As of `DETR`; the backbone must give four maps.
    """

    @nn.compact
    def __call__(
        self, image: Array, image_mask: Array | None = None, *, train: bool
    ) -> dict[str, Any]:
        """As `DETR`, and `masks`: logits, float32 [B, Q, h, w] at the size of the backbone's first
        map, padding included; ValueError also if there are not four maps.
        """
        found = self._detect(image, image_mask, train=train)
        if len(found.maps) != 4:
            raise ValueError(f"the mask head needs a backbone with 4 maps, not {len(found.maps)}")
        outputs = self._predict(found, train=train)
        attention = MaskAttention(self.heads, self.dtype, name="mask_attention")(
            found.decoded[-1], found.memory, found.seen
        )
        masks = MaskHead(self.width, dtype=self.dtype, name="mask_head")(
            found.projected, attention, found.maps[2::-1]
        )
        return outputs | {"masks": masks}


# 133 classes of things and stuff, by the ids of COCO's panoptic annotations.
detr_r50_panoptic = partial(DETRPanoptic, backbone=resnet_50(norm="frozen"), num_classes=250)
