"""CLIP and SigLIP: pictures and texts in one space."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.errors import nearest
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.transformer import EncoderBlock, apply_blocks
from vit_jax.models.vit import ViT

READINGS = ("end", "last")


class TextTransformer(nn.Module):
    """One vector for a text: Radford et al. 2021, "Learning Transferable Visual Models From Natural
    Language Supervision" (arXiv:2103.00020), section 2.4.

    Parameters: `embed`, `position`, `block_0`, ... (with `scan` one `blocks` with a leading axis),
    `norm`.

    Attributes:
      vocabulary: V.
      length: the most tokens of a text, T.
      width: D.
      depth: number of blocks.
      heads: attention heads of each block.
      mlp_ratio: hidden width of the MLPs over D.
      causal: whether a token sees itself and those before it only; SigLIP's sees all, padding too.
      reading: which token describes the text: "end", the first that is `end`; or "last", whatever
        stands there, as in SigLIP, whose texts are padded to one length.
      end: number of the token that ends a text; None is the greatest number of a row, as in the
        authors' code, where the end has the last number of all.
      activation: of the MLPs, a name of `layers.activation.ACTIVATIONS`.
      epsilon: of the layer norms.
      dropout: rate after the positions, the attentions and the MLPs' layers.
      attention_dropout: rate on the attention weights.
      dtype: of the computation; parameters stay float32.
      scan: compiles one block and loops over it.
      remat: what is recomputed of each block in the backward pass: `layers.remat`.
    """

    vocabulary: int
    length: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    causal: bool = True
    reading: str = "end"
    end: int | None = None
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    scan: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(self, tokens: Array, *, train: bool) -> jax.Array:
        """[B, T] int -> [B, D], normalised.

        Raises:
          ValueError: if there are more than `length` tokens, V is less than 1, the heads do not
            divide the width, or a name does not exist.
        """
        if self.reading not in READINGS:
            raise ValueError(
                f"reading={self.reading!r} does not exist.{nearest(self.reading, READINGS)}"
            )
        if self.vocabulary < 1:
            raise ValueError(f"vocabulary={self.vocabulary} must be at least 1")
        T = tokens.shape[1]
        if self.length < T:
            raise ValueError(
                f"the texts have {T} tokens, and the model has places for {self.length}"
            )
        normal = nn.initializers.normal
        embed = nn.Embed(
            self.vocabulary, self.width, embedding_init=normal(0.02), dtype=self.dtype, name="embed"
        )
        position = self.param("position", normal(0.01), (self.length, self.width))
        x = embed(tokens)  # [B, T, D]
        x = x + position[:T].astype(x.dtype)[None]
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        block = partial(
            EncoderBlock,
            self.heads,
            mlp_ratio=self.mlp_ratio,
            activation=self.activation,
            epsilon=self.epsilon,
            causal=self.causal,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )
        rates = (0.0,) * self.depth
        x = apply_blocks(block, x, rates, scan=self.scan, remat=self.remat, train=train)
        if self.reading == "last":
            x = x[:, -1]  # [B, D]
        else:
            # The first of equal ones: a vocabulary may pad with its end.
            at = tokens.argmax(-1) if self.end is None else (tokens == self.end).argmax(-1)
            x = jnp.take_along_axis(x, at[:, None, None], 1)[:, 0]  # [B, D]
        return LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)


class CLIP(nn.Module):
    """Two encoders whose vectors are alike where picture and text belong together.

    Radford et al. 2021 (arXiv:2103.00020), section 2.3 and figure 3; SigLIP is Zhai et al. 2023
    (arXiv:2303.15343), section 3.2, with a bias on the logits, which are

        exp(logit_scale) * <image_embedding, text_embedding> + logit_bias.

    Blocks start as the backbones here do, by Glorot's rule, where the authors scale normal numbers
    by width and depth; embeddings, positions and projections start as theirs.

    Parameters: `backbone`, `image_projection`, `text`, `text_projection`, `logit_scale`,
    `logit_bias`.

    Attributes:
      backbone: a module that maps (image, train=) to `Features`.
      text: a module that maps (tokens, train=) to [B, D], and has `length`, such as
        `TextTransformer`.
      features: D of the shared space.
      image_projection: whether a matrix takes the pooled features there; else they are D wide.
      text_bias: whether the text's projection has a bias.
      scale: what `logit_scale` starts at, the logarithm of one over the temperature; the paper's is
        0.07. `config.optimizer.clamp` keeps it below ln 100.
      bias: what `logit_bias` starts at; None is none.
      dtype: of the projections' computation; parameters stay float32.
    """

    backbone: nn.Module
    text: nn.Module
    features: int = 512
    image_projection: bool = True
    text_bias: bool = False
    scale: float = math.log(1 / 0.07)
    bias: float | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: Array | None = None, tokens: Array | None = None, *, train: bool
    ) -> dict[str, jax.Array]:
        """[B, H, W, 3] and [B, T] int, or either alone -> vectors of unit length, float32.

        Pictures and texts need not be equally many.

        Returns:
          {"image_embedding": [B, D], "text_embedding": [B, D], "logit_scale": [], "logit_bias":
          []}: what was given, the scale's logarithm, and the bias where there is one.

        Raises:
          ValueError: if neither was given, or a width does not fit.
        """
        if image is None and tokens is None:
            raise ValueError("image or tokens must be given, or both")
        project = partial(
            nn.Dense,
            self.features,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
        )
        found = {}
        if image is not None:
            x = self.backbone(image, train=train).pooled
            if self.image_projection:
                x = project(use_bias=False, name="image_projection")(x)
            elif x.shape[-1] != self.features:
                raise ValueError(
                    f"image_projection is off, and the backbone gives {x.shape[-1]} features where "
                    f"features={self.features}"
                )
            found["image_embedding"] = unit(x)
        if tokens is not None:
            x = self.text(tokens, train=train)
            x = project(use_bias=self.text_bias, name="text_projection")(x)
            found["text_embedding"] = unit(x)
        constant = nn.initializers.constant
        found["logit_scale"] = self.param("logit_scale", constant(self.scale), ())
        if self.bias is not None:
            found["logit_bias"] = self.param("logit_bias", constant(self.bias), ())
        return found

    def encode_image(self, image: Array, *, train: bool = False) -> jax.Array:
        """[B, H, W, 3] -> [B, D] of unit length."""
        return self(image=image, train=train)["image_embedding"]

    def encode_text(self, tokens: Array, *, train: bool = False) -> jax.Array:
        """[B, T] int -> [B, D] of unit length."""
        return self(tokens=tokens, train=train)["text_embedding"]


def unit(x: Array) -> jax.Array:
    """[..., D] -> the same directions with length 1, float32; a vector of zeros stays one."""
    x = jnp.asarray(x, jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    # Bounded below the root, where the gradient of a length of 0 would be infinite.
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


# The published models of OpenAI, and SigLIP's of 224 pixels: tables 19 and 20 of Radford et al.
_vision = partial(
    ViT,
    patch_bias=False,
    pre_norm=True,
    activation="quick_gelu",
    epsilon=1e-5,
    position_resize="bicubic_torch",
)
_text = partial(TextTransformer, vocabulary=49_408)
clip_b32 = partial(CLIP, backbone=_vision(patch=32), text=_text())
clip_b16 = partial(CLIP, backbone=_vision(patch=16), text=_text())
clip_l14 = partial(
    CLIP,
    backbone=_vision(patch=14, width=1024, depth=24, heads=16),
    text=_text(width=768, heads=12),
    features=768,
)
siglip_b16 = partial(
    CLIP,
    backbone=ViT(
        patch=16, pooling="attention", activation="gelu_tanh", position_resize="bicubic_torch"
    ),
    text=TextTransformer(
        vocabulary=32_000,
        length=64,
        width=768,
        heads=12,
        causal=False,
        reading="last",
        activation="gelu_tanh",
        epsilon=1e-6,
    ),
    features=768,
    image_projection=False,
    text_bias=True,
    scale=math.log(10.0),
    bias=-10.0,
)
