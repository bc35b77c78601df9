"""LSTMs that write: one that was shown the picture once, and one that looks at each word."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vit_jax.contracts import Array
from vit_jax.layers.decoder import State
from vit_jax.layers.dense import Dense

UNIFORM = nn.initializers.xavier_uniform()


class AdditiveAttention(nn.Module):
    """Attention by a layer of its own instead of a product: Bahdanau et al. 2015
    (arXiv:1409.0473), section A.1.2, e = v tanh(W query + U key), over the cells of a picture as in
    Xu et al. 2015, "Show, Attend and Tell" (arXiv:1502.03044), eq. 4 and 5.

    Parameters: `query`, `energy`; the keys U come from outside, since they are those of all words.

    Attributes:
      dtype: of the computation, but for the softmax, which is float32; parameters stay float32.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, query: Array, key: Array, value: Array) -> tuple[jax.Array, jax.Array]:
        """[R, D], [B, M, D], [B, M, C] -> what is seen [R, C], and the weights [R, M].

        R is a multiple of B: the rows of one picture follow each other.
        """
        query = nn.Dense(key.shape[-1], dtype=self.dtype, kernel_init=UNIFORM, name="query")(query)
        query = rearrange(query, "(b k) d -> b k 1 d", b=len(key))
        hidden = nn.tanh(query + rearrange(key, "b m d -> b 1 m d"))  # [B, K, M, D]
        # A bias would move all energies alike.
        energy = Dense(1, use_bias=False, dtype=self.dtype, kernel_init=UNIFORM, name="energy")
        weights = nn.softmax(energy(hidden)[..., 0].astype(jnp.float32))  # [B, K, M]
        seen = jnp.einsum("bkm,bmc->bkc", weights.astype(value.dtype), value)
        return rearrange(seen, "b k c -> (b k) c"), rearrange(weights, "b k m -> (b k) m")


class Cell(nn.Module):
    """One word further: layers of LSTM cells (Hochreiter and Schmidhuber 1997), the first of which
    reads the word and, with attention, what the last one looked at before.

    Parameters: `lstm_0`, ..., and `attention`, `gate` where there is attention.

    Attributes:
      width: D of each layer.
      depth: number of layers.
      attention: whether the picture is looked at, as far as a gate lets it through: Xu et al. 2015,
        section 4.2.1.
      dtype: of the computation; parameters stay float32.
    """

    width: int
    depth: int
    attention: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, carry: Any, word: Array, picture: Any) -> tuple[Any, Any]:
        """States of the layers, a word [R, D], (keys, values) [B, M, D] -> (states, outputs).

        The outputs are the last layer's [R, D], what it saw [R, D] and where [R, M], the latter
        two empty without attention.
        """
        seen = weights = jnp.zeros((len(word), 0), self.dtype)
        x, carry = word, list(carry)
        if self.attention:
            last = carry[-1][1]
            seen, weights = AdditiveAttention(self.dtype, name="attention")(last, *picture)
            gate = nn.Dense(seen.shape[-1], dtype=self.dtype, kernel_init=UNIFORM, name="gate")
            seen = seen * nn.sigmoid(gate(last))
            x = jnp.concatenate([x, seen], -1)
        for i in range(self.depth):
            lstm = nn.OptimizedLSTMCell(self.width, dtype=self.dtype, name=f"lstm_{i}")
            carry[i], x = lstm(carry[i], x)
        return tuple(carry), (x, seen, weights)


class RecurrentDecoder(nn.Module):
    """An LSTM as decoder, with or without attention.

    Without, all it knows of the picture is the state that it begins with: Sutskever et al. 2014
    (arXiv:1409.3215), section 2, with an encoder of pictures as in Vinyals et al. 2015
    (arXiv:1411.4555). With attention: Xu et al. 2015 (arXiv:1502.03044), section 3.1.2, whose deep
    output (eq. 7) makes a word of the last word, the state and what is seen; the state begins with
    the picture's description rather than the mean of its cells.

    What each word looks at is sown as `attention_weights` [R, N, M] where the caller makes
    `intermediates` mutable.

    Parameters: `words` [V, D], `initial`, `cell`, `head`; with attention `key`, `of_state`,
    `of_seen` too.

    Attributes:
      vocabulary: V.
      width: D of embeddings, states and layers between.
      depth: layers of LSTM cells.
      attention: whether it looks at the picture at each word.
      dropout: rate after the embeddings and before the logits.
      dtype: of the computation; parameters stay float32.
    """

    vocabulary: int
    width: int = 256
    depth: int = 1
    attention: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        pooled: Array | None,
        memory: Array | None,
        state: State | None = None,
        *,
        train: bool,
    ) -> tuple[jax.Array, State]:
        """[R, N], [B, C], [B, M, D] -> logits [R, N, V], float32, of the words that follow.

        Args:
          tokens: int32, ids of words.
          pooled: the picture's description, one row for each of the tokens'; not read where there
            is a state.
          memory: what is looked at; not read where there is a state, nor without attention.
          state: what was remembered of the words before.
          train: whether dropout acts.
        """
        drop = nn.Dropout(self.dropout, deterministic=not train)
        word = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")(tokens)
        word = drop(word)  # [R, N, D]
        if state is None:
            first = Dense(2 * self.depth * self.width, dtype=self.dtype, name="initial")(pooled)
            first = rearrange(nn.tanh(first), "b (l two d) -> l two b d", two=2, d=self.width)
            carry = tuple((layer[0], layer[1]) for layer in first)
            picture = ()
            if self.attention:
                key = Dense(self.width, dtype=self.dtype, kernel_init=UNIFORM, name="key")
                picture = (key(memory), memory)
        else:
            carry, picture = state
        cell = nn.scan(
            Cell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=(1, nn.broadcast),
            out_axes=1,
        )(self.width, self.depth, self.attention, self.dtype, name="cell")
        carry, (hidden, seen, weights) = cell(carry, word, picture)  # [R, N, D]
        self.sow("intermediates", "attention_weights", weights)
        if self.attention:
            dense = partial(Dense, self.width, dtype=self.dtype, kernel_init=UNIFORM)
            hidden = word + dense(name="of_state")(hidden) + dense(name="of_seen")(seen)
        logits = Dense(self.vocabulary, dtype=self.dtype, name="head")(drop(hidden))
        return logits.astype(jnp.float32), (carry, picture)
