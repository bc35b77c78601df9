"""DETR: detection as the prediction of a set."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers.attention import Attention
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.pyramid import nearest
from vit_jax.layers.remat import recomputed
from vit_jax.layers.sine import sine_positions
from vit_jax.layers.transformer import Mlp
from vit_jax.models.resnet import resnet_50, resnet_101

# PyTorch's own for a linear layer: uniform, up to 1 / sqrt(inputs).
FAN_IN = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@flax.struct.dataclass
class Detected:
    """What the parts of a detector give, for heads that go on from there.

    Attributes:
      maps: of the backbone, fine to coarse, each [B, h, w, C].
      seen: bool [B, h, w], True on real pixels of the last map; None if all are real.
      projected: the last map at width D, [B, h, w, D].
      memory: it as the encoder leaves it, [B, h, w, D].
      decoded: the normalised queries after each decoder layer, or the last, [L, B, Q, D].
    """

    maps: tuple[Array, ...]
    seen: Array | None
    projected: Array
    memory: Array
    decoded: Array


class EncoderLayer(nn.Module):
    """Self-attention and an MLP, each followed by a norm: Carion et al. 2020 (arXiv:2005.12872),
    section A.3 and figure 10. Positions are added to queries and keys, never to values.

    Attributes:
      heads: A.
      hidden: width of the MLP between its layers.
      activation: of the MLP, a name of `layers.activation.ACTIVATIONS`.
      epsilon: of the layer norms.
      dropout: rate after the attention and the MLP's layers.
      attention_dropout: rate on the attention weights.
      dtype: of the computation; parameters stay float32.
    """

    heads: int
    hidden: int
    activation: str = "relu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, position: Array, mask: Array | None, *, train: bool) -> jax.Array:
        """[B, N, D], [B, N, D], bool [B, 1, 1, N], True on real pixels, -> [B, N, D]."""
        norm = partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        placed = x + position
        y = Attention(
            self.heads, dropout=self.attention_dropout, dtype=self.dtype, name="attention"
        )(placed, placed, x, mask=mask, train=train)
        x = norm(name="norm1")(x + drop(y))
        mlp = Mlp(self.hidden, self.activation, self.dropout, dtype=self.dtype, name="mlp")
        return norm(name="norm2")(x + mlp(x, train=train))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the image, an MLP, each followed by a norm:
    Carion et al. 2020, section A.3 and figure 10.

    The queries' embeddings are added to queries and keys of the first attention and to queries of
    the second, positions to its keys; nothing is added to values.

    Attributes:
      As of `EncoderLayer`.
    """

    heads: int
    hidden: int
    activation: str = "relu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        query: Array,
        memory: Array,
        position: Array,
        mask: Array | None,
        *,
        train: bool,
    ) -> jax.Array:
        """[B, Q, D], embeddings [B, Q, D], the image and its positions [B, N, D] -> [B, Q, D]."""
        norm = partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = partial(Attention, self.heads, dropout=self.attention_dropout, dtype=self.dtype)
        y = attention(name="self_attention")(x + query, x + query, x, train=train)
        x = norm(name="norm1")(x + drop(y))
        y = attention(name="cross_attention")(
            x + query, memory + position, memory, mask=mask, train=train
        )
        x = norm(name="norm2")(x + drop(y))
        mlp = Mlp(self.hidden, self.activation, self.dropout, dtype=self.dtype, name="mlp")
        return norm(name="norm3")(x + mlp(x, train=train))


class BoxHead(nn.Module):
    """Three dense layers with ReLUs between them: Carion et al. 2020, section 3.2.

    Attributes:
      dtype: of the computation; parameters stay float32.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """[..., D] -> [..., 4], float32 in 0..1."""
        dense = partial(Dense, dtype=self.dtype, kernel_init=FAN_IN)
        for name in ("fc1", "fc2"):
            x = nn.relu(dense(x.shape[-1], name=name)(x))
        return nn.sigmoid(dense(4, name="fc3")(x).astype(jnp.float32))


class DETR(nn.Module):
    """DETR: Carion et al. 2020, "End-to-End Object Detection with Transformers"
    (arXiv:2005.12872), sections 3.2 and A.3.

    The last map of the backbone, at width D, goes through an encoder; learned queries read from
    what comes out, and each predicts a class and a box, or that it found nothing. Pixels that only
    pad the batch are no keys of any attention, and positions are those within the unpadded image,
    so that an image's numbers depend on nothing else in the batch but, as far as the backbone looks
    across the edge, on how far it is padded.

    Parameters: `backbone`, `input_proj`, `encoder_0`, ..., `query` [Q, D], `decoder_0`, ...,
    `decoder_norm`, `class_head`, `box_head`.

    Attributes:
      backbone: a module that maps (image, train=) to `Features`; the last map is taken.
      num_classes: K; "nothing" is one more, the last.
      queries: Q.
      width: D; 4 must divide it, and so must the heads.
      heads: attention heads of each layer.
      hidden: width of the MLPs between their layers.
      encoder_depth: layers of the encoder.
      decoder_depth: layers of the decoder.
      activation: of the MLPs, a name of `layers.activation.ACTIVATIONS`.
      epsilon: of the layer norms.
      dropout: rate after the attentions and the MLPs' layers.
      attention_dropout: rate on the attention weights.
      remat: what is recomputed of each layer in the backward pass: `layers.remat`.
      dtype: of the computation behind the backbone; parameters stay float32.
    """

    backbone: nn.Module
    num_classes: int
    queries: int = 100
    width: int = 256
    heads: int = 8
    hidden: int = 2048
    encoder_depth: int = 6
    decoder_depth: int = 6
    activation: str = "relu"
    epsilon: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.1
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: Array, image_mask: Array | None = None, *, train: bool
    ) -> dict[str, Any]:
        """[B, H, W, 3], and bool [B, H, W] that is True on real pixels, all of them without it.

        Returns:
          `logits`: float32 [B, Q, K + 1].
          `boxes`: float32 [B, Q, 4], (cx, cy, w, h) as fractions of the unpadded image.
          `auxiliary`, in training only: a list of such dictionaries, one for each layer of the
            decoder but the last.

        Raises:
          ValueError: if K, Q or a depth is less than 1, or the width cannot be divided.
        """
        return self._predict(self._detect(image, image_mask, train=train), train=train)

    def _detect(self, image: Array, image_mask: Array | None, *, train: bool) -> Detected:
        """All but the heads."""
        for name in ("num_classes", "queries", "decoder_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        maps = self.backbone(image, train=train).maps
        projected = Dense(self.width, dtype=self.dtype, kernel_init=FAN_IN, name="input_proj")(
            maps[-1]
        )  # [B, h, w, D]
        batch, *size = projected.shape[:3]
        seen = mask = None
        if image_mask is not None:
            seen = nearest(image_mask, size)  # [B, h, w]
            mask = rearrange(seen, "b h w -> b 1 1 (h w)")
        real = jnp.ones((batch, *size), bool) if seen is None else seen
        position = sine_positions(real, self.width).astype(self.dtype)
        position = rearrange(position, "b h w d -> b (h w) d")

        layer = {
            "heads": self.heads,
            "hidden": self.hidden,
            "activation": self.activation,
            "epsilon": self.epsilon,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "dtype": self.dtype,
        }

        def run(module: nn.Module, *arrays: Array | None) -> jax.Array:
            return module(*arrays, train=train)

        run = recomputed(run, self.remat)
        x = rearrange(projected, "b h w d -> b (h w) d")
        for i in range(self.encoder_depth):
            x = run(EncoderLayer(**layer, name=f"encoder_{i}"), x, position, mask)
        memory = x  # [B, N, D]

        query = self.param("query", nn.initializers.normal(1.0), (self.queries, self.width))
        query = jnp.broadcast_to(query.astype(self.dtype), (batch, self.queries, self.width))
        x = jnp.zeros_like(query)
        states = []
        for i in range(self.decoder_depth):
            name = f"decoder_{i}"
            x = run(DecoderLayer(**layer, name=name), x, query, memory, position, mask)
            states.append(x)
        # One norm for all layers; only the last layer's queries are read outside training.
        states = jnp.stack(states if train else states[-1:])  # [L, B, Q, D]
        decoded = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="decoder_norm")(states)
        memory = rearrange(memory, "b (h w) d -> b h w d", h=size[0])
        return Detected(maps, seen, projected, memory, decoded)

    def _predict(self, found: Detected, *, train: bool) -> dict[str, Any]:
        """The outputs, as of `__call__`."""
        classes = self.num_classes + 1
        head = Dense(classes, dtype=self.dtype, kernel_init=FAN_IN, name="class_head")
        logits = head(found.decoded).astype(jnp.float32)  # [L, B, Q, K + 1]
        boxes = BoxHead(self.dtype, name="box_head")(found.decoded)  # [L, B, Q, 4]
        *earlier, last = ({"logits": c, "boxes": b} for c, b in zip(logits, boxes, strict=True))
        return last | ({"auxiliary": earlier} if train else {})


# The class ids of COCO go to 90.
detr_r50 = partial(DETR, backbone=resnet_50(norm="frozen"), num_classes=91)
detr_r50_dc5 = partial(DETR, backbone=resnet_50(norm="frozen", dilation=2), num_classes=91)
detr_r101 = partial(DETR, backbone=resnet_101(norm="frozen"), num_classes=91)
detr_r101_dc5 = partial(DETR, backbone=resnet_101(norm="frozen", dilation=2), num_classes=91)
