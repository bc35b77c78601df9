"""Greedy and beam search, on tables of words small enough to try every sentence."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.layers.search import length_penalty, search

PADDING, START, END, V, T = 0, 1, 2, 5, 5
WORDS = [END, 3, 4]
MARKS = {"start": START, "end": END, "padding": PADDING, "length": T}
PICTURES = 12


@pytest.fixture(scope="module")
def tables():
    """The logits [B, 625, V] of the word after each beginning, by its words as one number."""
    return 2 * np.random.default_rng(0).normal(size=(PICTURES, V**4, V)).astype(np.float32)


def writer(tables):
    """What `search` asks: (step, the first answer, what is remembered of the start)."""
    tables = jnp.asarray(tables)

    def answer(picture, code):
        seen = jnp.stack([picture, code], -1).astype(jnp.float32)  # "looked at": [R, 2]
        return tables[picture, code], seen

    def step(tokens, rows, place):
        code = (rows["code"] * V + tokens) % V**4
        return *answer(rows["picture"], code), rows | {"code": code}

    start = {"picture": jnp.arange(len(tables)), "code": jnp.full(len(tables), START)}
    return step, answer(start["picture"], start["code"]), start


@partial(jax.jit, static_argnames=("beams", "power", "padding", "poisoned"))
def found(tables, beams, power=0.6, padding=PADDING, poisoned=False):
    step, first, rows = writer(tables)

    def poison(*arguments):
        logits, *rest = step(*arguments)
        return logits * jnp.nan, *rest

    ask, marks = poison if poisoned else step, MARKS | {"padding": padding}
    return search(ask, first, rows, beams=beams, power=power, **marks)


def log_softmax(x):
    x = x.astype(np.float64) - x.max()
    return x - np.log(np.exp(x).sum())


def log_prob(table, words):
    """Of a sentence, the start left out, one word after the other."""
    code, total = START, 0.0
    for word in words:
        total += log_softmax(table[code])[word]
        code = (code * V + word) % V**4
    return total


def sentences():
    """All that end, and those that fill the room without an end."""
    for number in range(1, T):
        for words in itertools.product(WORDS[1:], repeat=number - 1):
            yield [*words, END]
    yield from map(list, itertools.product(WORDS[1:], repeat=T - 1))


@pytest.mark.parametrize("power", [0.0, 0.6, 3.0])
def test_a_beam_that_holds_every_sentence_finds_the_best_of_all(tables, power):
    written = found(tables, 32, power)
    for row, table in enumerate(tables):
        ranked = sorted(
            ((log_prob(table, s) / ((5 + len(s)) / 6) ** power, s) for s in sentences()),
            reverse=True,
        )
        score, best = ranked[0]
        expected = [START, *best] + [PADDING] * (T - 1 - len(best))
        assert written.tokens[row].tolist() == expected
        np.testing.assert_allclose(written.score[row], score, rtol=1e-5)
        np.testing.assert_allclose(written.log_prob[row], log_prob(table, best), rtol=1e-5)


def test_one_beam_takes_the_likeliest_word_each_time(tables):
    written = found(tables, 1)
    for row, table in enumerate(tables):
        code, words = START, []
        while len(words) < T - 1 and END not in words:
            words.append(max(WORDS, key=lambda word: table[code][word]))
            code = (code * V + words[-1]) % V**4
        expected = [START, *words] + [PADDING] * (T - 1 - len(words))
        assert written.tokens[row].tolist() == expected


def test_no_sentence_is_better_than_that_of_a_wide_beam_and_some_are_than_the_greedy_one(tables):
    greedy, some, wide = (found(tables, beams) for beams in (1, 3, 32))
    assert (wide.score >= greedy.score - 1e-6).all()
    assert (wide.score >= some.score - 1e-6).all()
    assert (wide.score > greedy.score + 1e-3).any()
    assert (some.score > greedy.score + 1e-3).any()


def test_each_word_keeps_what_was_looked_at_when_it_was_chosen(tables):
    written = found(tables, 3)
    for row, tokens in enumerate(written.tokens.tolist()):
        code, ended = START, False
        np.testing.assert_array_equal(written.weights[row, 0], [0, 0])
        for place in range(1, T):
            expected = [0, 0] if ended else [row, code]
            np.testing.assert_array_equal(written.weights[row, place], expected)
            ended |= tokens[place] == END
            code = (code * V + tokens[place]) % V**4


def test_the_search_ends_when_no_sentence_can_become_the_best():
    tables = np.zeros((2, V**4, V), np.float32)
    tables[..., END] = 9.0
    for beams in (1, 2):
        written = found(tables, beams, poisoned=True)
        assert written.tokens.tolist() == [[START, END, PADDING, PADDING, PADDING]] * 2
        assert np.isfinite(written.log_prob).all()


def test_start_and_padding_are_never_written():
    tables = np.zeros((1, V**4, V), np.float32)
    tables[..., [PADDING, START]] = 50.0
    for beams in (1, 4):
        words = found(tables, beams).tokens[0, 1:].tolist()
        assert set(words) <= {*WORDS, PADDING}
        assert words[0] != PADDING


def test_a_vocabulary_may_pad_with_its_end():
    tables = np.zeros((1, V**4, V), np.float32)
    tables[..., END] = 5.0
    written = found(tables, 2, padding=END)
    assert written.tokens.tolist() == [[START, END, END, END, END]]


def test_the_length_penalty_is_that_of_wu_and_others():
    np.testing.assert_allclose(length_penalty(7.0, 0.6), 2**0.6, rtol=1e-6)
    assert length_penalty(7.0, 0.0) == 1
