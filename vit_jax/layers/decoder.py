"""A transformer that writes: each word from those before it and from what it looks at."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers.attention import Attention, Cache
from vit_jax.layers.dense import Dense
from vit_jax.layers.norm import LayerNorm
from vit_jax.layers.rows import keep_rows
from vit_jax.layers.transformer import Mlp

SMALL = nn.initializers.normal(0.02)
# What a decoder remembers: of each sentence, and of each picture.
State = tuple[Any, Any]


class DecoderBlock(nn.Module):
    """Masked self-attention, attention to a memory, an MLP: Vaswani et al. 2017
    (arXiv:1706.03762), section 3.1, with the norms before each instead of after, as in ViT (Xiong
    et al. 2020, arXiv:2002.04745).

    Parameters: `norm1`, `self_attention`, `norm2`, `cross_attention`, `norm3`, `mlp`.

    Attributes:
      heads: A.
      mlp_ratio: hidden width of the MLP over D.
      dropout: rate after the attentions and the MLP's layers.
      dtype: of the computation; parameters stay float32.
    """

    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        memory: Array | None,
        mask: Array,
        caches: tuple[Cache, Cache] | None,
        place: Array | int,
        *,
        train: bool,
    ) -> tuple[jax.Array, tuple[Cache, Cache] | None]:
        """[R, N, D], [B, M, D] -> [R, N, D] and the caches, those of the words and the memory.

        R is a multiple of B: the rows of one picture follow each other and share its memory.
        Without a memory its cache is complete.
        """
        norm = partial(LayerNorm, epsilon=1e-6, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = partial(Attention, self.heads, dtype=self.dtype)
        own, seen = (None, None) if caches is None else caches
        placed = {} if caches is None else {"cache": own, "place": place}
        y = attention(name="self_attention")(
            norm(name="norm1")(x), mask=mask, train=train, **placed
        )
        if caches is not None:
            y, own = y
        x = x + drop(y)

        batch = len(memory) if seen is None else len(seen.key)
        query = rearrange(norm(name="norm2")(x), "(b k) n d -> b (k n) d", b=batch)
        placed = {} if seen is None else {"cache": seen, "place": None if memory is None else 0}
        y = attention(name="cross_attention")(query, memory, train=train, **placed)
        if seen is not None:
            y, seen = y
        x = x + drop(rearrange(y, "b (k n) d -> (b k) n d", n=x.shape[1]))
        hidden = int(x.shape[-1] * self.mlp_ratio)
        mlp = Mlp(hidden, dropout=self.dropout, dtype=self.dtype, name="mlp")
        return x + mlp(norm(name="norm3")(x), train=train), caches and (own, seen)


class TransformerDecoder(nn.Module):
    """The decoder of Vaswani et al. 2017 (arXiv:1706.03762), with learned positions, and a layer of
    its own for the words' logits.

    What each word looks at is sown as `attention_weights` by each block's `cross_attention`, where
    the caller makes `intermediates` mutable.

    Parameters: `words` [V, D], `position` [T, D], `block_0`, ..., `norm`, `head`.

    Attributes:
      vocabulary: V.
      length: the most words that follow each other, T.
      width: D.
      depth: number of blocks.
      heads: attention heads of each block.
      mlp_ratio: hidden width of the MLPs over D.
      dropout: rate after the words' embeddings, the attentions and the MLPs' layers.
      dtype: of the computation; parameters stay float32.
    """

    vocabulary: int
    length: int
    width: int = 256
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        memory: Array | None,
        state: State | None = None,
        *,
        place: Array | int = 0,
        remember: bool = False,
        train: bool,
    ) -> tuple[jax.Array, State | None]:
        """[R, N], [B, M, D] -> logits [R, N, V], float32, of the words that follow each of them.

        Args:
          tokens: int32, ids of words.
          memory: what is looked at; None where there is a state.
          state: what was remembered of the words before.
          place: of the first of `tokens` in its sentence.
          remember: whether the keys and values of words and memory are wanted.
          train: whether dropout acts.
        """
        rows, number = tokens.shape
        x = nn.Embed(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=SMALL, name="words"
        )(tokens)  # [R, N, D]
        learned = self.param("position", SMALL, (self.length, self.width))
        learned = jax.lax.dynamic_slice_in_dim(learned, place, number, 0)
        x = x + learned.astype(x.dtype)[None]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)

        keys = jnp.arange(number)
        caches: Any = [None] * self.depth
        if remember and state is None:
            sizes = {"heads": self.heads, "width": self.width, "dtype": self.dtype}
            words = Cache.empty(rows, self.length, **sizes)
            seen = Cache.empty(*memory.shape[:2], **sizes)
            caches = [(words, seen)] * self.depth
        elif state is not None:
            caches = list(zip(*state, strict=True))
        if caches[0] is not None:
            keys = jnp.arange(self.length)
        # A word sees itself and what stands before it, which also hides what is not written yet.
        mask = keys[None, :] <= (place + jnp.arange(number))[:, None]
        mask = mask[None, None]  # [1, 1, N, M]
        for i in range(self.depth):
            block = DecoderBlock(
                self.heads, self.mlp_ratio, self.dropout, self.dtype, name=f"block_{i}"
            )
            x, caches[i] = block(keep_rows(x), memory, mask, caches[i], place, train=train)
        x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        head = Dense(self.vocabulary, dtype=self.dtype, kernel_init=SMALL, name="head")
        kept = None if caches[0] is None else tuple(zip(*caches, strict=True))
        return head(x).astype(jnp.float32), kept
