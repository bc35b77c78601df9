"""Sentences written word by word: greedy and beam search over any decoder, as one function."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from vit_jax.contracts import Array

Tree = Any
# (the last words [B K], what is remembered of each sentence, their place) -> (logits [B K, V] of
# the next words, what they looked at [B K, M], what is remembered then)
Step = Callable[[jax.Array, Tree, jax.Array], tuple[Array, Array, Tree]]


@flax.struct.dataclass
class Written:
    """Sentences, the best one of each picture or K of them.

    Attributes:
      tokens: [..., T] int32: start, words, end where there was room for it, padding.
      log_prob: [...] float32, of all words and the end together.
      score: [...] float32, what sentences of different lengths are compared by.
      weights: [..., T, M] float32, what the decoder looked at when it chose each word; 0 at the
        start and at padding.
    """

    tokens: Array
    log_prob: Array
    score: Array
    weights: Array


@flax.struct.dataclass
class _Beam:
    written: Written  # [B, K, ...]
    ended: Array  # [B, K] bool
    words: Array  # [B, K] float32, how many there are with the end


def length_penalty(words: Array | float, power: float) -> jax.Array:
    """What a log-probability is divided by: ((5 + words) / 6) ** power, Wu et al. 2016
    (arXiv:1609.08144), eq. 14. Each word makes a sentence less probable; a power above 0 makes up
    for some of that, 0 for none.
    """
    return ((5.0 + words) / 6.0) ** power


def search(
    step: Step,
    first: tuple[Array, Array],
    rows: Tree,
    *,
    beams: int,
    length: int,
    start: int,
    end: int,
    padding: int,
    power: float,
) -> Written:
    """The best sentence of each picture among those that a beam of K = `beams` follows.

    With one beam it is the greedy choice of the likeliest word each time: Sutskever et al. 2014
    (arXiv:1409.3215), section 3.4, with their beams otherwise. A sentence with an end keeps its
    place in the beam until better ones push it out, and scores are as of `length_penalty`. What has
    no end when there is no more room is taken as it is. The search ends when no sentence without an
    end could still become the best, so that the cost is the longest sentence's, not T.

    Start and padding are never written; their share of the probability is lost.

    Args:
      step: as of `Step`.
      first: the logits [B, V] of the words after the start, and what they looked at [B, M].
      rows: what is remembered after the start, arrays [B, ...].
      beams: K.
      length: T, with start and end.
      start: id of the start, the first of each sentence.
      end: id of the end.
      padding: id of what follows the end.
      power: of the length penalty, 0 or more.
    """
    logits, weights = first
    batch, vocabulary = logits.shape
    forbidden = jnp.zeros(vocabulary, bool).at[jnp.array([start, padding])].set(True)
    forbidden = forbidden.at[end].set(False)  # some vocabularies pad with their end
    # An ended sentence goes on in one way only, at no cost.
    staying = jnp.where(jnp.arange(vocabulary) == padding, 0.0, -jnp.inf)[None, None]
    longest = length_penalty(length - 1.0, power)

    def choose(beam: _Beam, logits: Array, weights: Array, place: Array | int):
        """[B, K, V], [B, K, M] -> the best K sentences with one word more, and whence each came."""
        old = beam.written
        word = jax.nn.log_softmax(logits.astype(jnp.float32))
        word = jnp.where(forbidden[None, None], -jnp.inf, word)
        word = jnp.where(beam.ended[..., None], staying, word)
        total = old.log_prob[..., None] + word  # [B, K, V]
        words = beam.words + ~beam.ended  # [B, K]
        score = total / length_penalty(words, power)[..., None]
        score, at = jax.lax.top_k(rearrange(score, "b k v -> b (k v)"), beams)  # [B, K]
        parent, token = at // vocabulary, (at % vocabulary).astype(jnp.int32)

        def of_parent(x: Array) -> jax.Array:
            index = parent.reshape(*parent.shape, *(1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, index, 1)

        ended = of_parent(beam.ended)
        seen = jnp.where(ended[..., None], 0.0, of_parent(weights).astype(jnp.float32))
        written = Written(
            tokens=of_parent(old.tokens).at[:, :, place].set(token),
            log_prob=jnp.take_along_axis(rearrange(total, "b k v -> b (k v)"), at, 1),
            score=score,
            weights=of_parent(old.weights).at[:, :, place].set(seen),
        )
        return _Beam(written, ended | (token == end), of_parent(words)), parent, token

    def unfinished(carry) -> jax.Array:
        place, beam, _, _ = carry
        ended, written = beam.ended, beam.written
        best = jnp.where(ended, written.score, -jnp.inf).max(1)
        # Words only take from a log-probability, and no penalty is milder than the longest's.
        hope = jnp.where(ended, -jnp.inf, written.log_prob).max(1) / longest
        return (place < length) & jnp.any(hope > best)

    def grow(carry):
        place, beam, token, rows = carry
        logits, weights, rows = step(rearrange(token, "b k -> (b k)"), rows, place - 1)
        logits, weights = (rearrange(x, "(b k) n -> b k n", k=beams) for x in (logits, weights))
        beam, parent, token = choose(beam, logits, weights, place)
        return place + 1, beam, token, _follow(rows, parent)

    # All but the first of the equal beginnings are out of the race.
    race = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    empty = Written(
        tokens=jnp.full((batch, beams, length), padding, jnp.int32).at[..., 0].set(start),
        log_prob=jnp.broadcast_to(race, (batch, beams)),
        score=jnp.broadcast_to(race, (batch, beams)),
        weights=jnp.zeros((batch, beams, length, weights.shape[-1]), jnp.float32),
    )
    none = jnp.zeros((batch, beams))
    beam = _Beam(empty, none.astype(bool), none)
    logits, weights = (repeat(x, "b n -> b k n", k=beams) for x in (logits, weights))
    beam, _, token = choose(beam, logits, weights, 1)
    rows = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), rows)
    carry = (jnp.int32(2), beam, token, rows)
    _, beam, _, _ = jax.lax.while_loop(unfinished, grow, carry)
    return jax.tree.map(lambda x: x[:, 0], beam.written)


def _follow(rows: Tree, parent: Array) -> Tree:
    """What is remembered [B K, ...] of the sentences that each of the new ones goes on with."""
    batch, beams = parent.shape
    if beams == 1:
        return rows
    at = (parent + beams * jnp.arange(batch)[:, None]).reshape(-1)  # [B K]
    return jax.tree.map(lambda x: x[at], rows)
