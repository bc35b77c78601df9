"""Captioning: what counts as a word, what counts as right, and how it is drawn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.data.text import train_tokenizer
from vit_jax.errors import ConfigError, DataError
from vit_jax.tasks.captioning import GAP, LINE, TILE, Captioning

CAPTIONS = ("a red seven above a blue one", "a blue one below a red seven", "three cats asleep")
T, V = 6, 7
# Two words and an end; three words and no room for an end; a row that is not valid.
TOKENS = np.array([[1, 3, 4, 2, 0, 0], [1, 5, 6, 3, 4, 5], [1, 3, 2, 0, 0, 0]], np.int32)
BATCH = {"tokens": TOKENS, "valid": np.array([True, True, False])}
WORDS = 3 + 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS * 3, 290)


def logits(seed=0):
    return jax.random.normal(jax.random.key(seed), (3, T - 1, V))


def row(tokenizer, text, length=24, weights=None):
    prediction = {"generated": tokenizer.fill(text, length), "log_prob": np.float32(-0.5)}
    return prediction | ({} if weights is None else {"attention": weights})


def test_the_loss_is_the_mean_over_words_and_ends():
    x = logits()
    loss, sums = Captioning().score({"logits": x}, BATCH)
    log_probs = np.asarray(jax.nn.log_softmax(x))
    counted = [(0, 0, 3), (0, 1, 4), (0, 2, 2)] + [(1, i, w) for i, w in enumerate([5, 6, 3, 4, 5])]
    total = -sum(log_probs[place] for place in counted)
    assert sums["count"] == WORDS
    assert sums["captions"] == 2
    np.testing.assert_allclose(sums["loss"], total, rtol=1e-5)
    np.testing.assert_allclose(loss, total / WORDS, rtol=1e-5)
    assert sums["correct"] == sum(log_probs[b, t].argmax() == w for b, t, w in counted)


def test_what_does_not_count_has_no_gradient_even_where_it_is_infinite():
    x = logits().at[0, 3:].set(jnp.inf).at[2].set(jnp.nan)
    gradient = jax.grad(lambda x: Captioning().score({"logits": x}, BATCH)[0])(x)
    assert not gradient[0, 3:].any()
    assert not gradient[2].any()
    assert np.isfinite(gradient).all()
    assert gradient[0, :3].any(-1).all()


def test_without_a_valid_row_the_loss_is_zero():
    loss, sums = Captioning().score({"logits": logits()}, BATCH | {"valid": np.zeros(3, bool)})
    assert loss == sums["count"] == 0
    with pytest.raises(DataError, match="no word to measure"):
        Captioning().summarize(sums)


def test_smoothing_moves_a_share_of_the_target_to_all_words():
    x, batch = logits(), {"tokens": TOKENS}
    plain, sums = Captioning().score({"logits": x}, batch)
    smooth, smoothed = Captioning(label_smoothing=0.1).score({"logits": x}, batch)
    flat = Captioning(label_smoothing=0.999999).score({"logits": x}, batch)[0]
    np.testing.assert_allclose(smooth, 0.9 * plain + 0.1 * flat, rtol=1e-4)
    np.testing.assert_allclose(smoothed["nats"], sums["nats"], rtol=1e-6)
    with pytest.raises(ConfigError, match="label_smoothing=1 must be"):
        Captioning(label_smoothing=1)


def test_a_word_beyond_the_vocabulary_makes_the_loss_nan():
    tokens = TOKENS.copy()
    tokens[0, 1] = V
    assert np.isnan(Captioning().score({"logits": logits()}, BATCH | {"tokens": tokens})[0])
    tokens = TOKENS.copy()
    tokens[2, 1] = V  # in a row that does not count
    assert np.isfinite(Captioning().score({"logits": logits()}, BATCH | {"tokens": tokens})[0])


def test_a_vocabulary_that_pads_with_its_end_counts_one_end():
    class Ending:
        padding = end = 2

    tokens = np.where(TOKENS == 0, 2, TOKENS)
    sums = Captioning(tokenizer=Ending()).score({"logits": logits()}, BATCH | {"tokens": tokens})[1]
    assert sums["count"] == WORDS


def test_knowing_nothing_is_a_perplexity_of_the_vocabulary():
    _, sums = Captioning().score({"logits": jnp.zeros((3, T - 1, V))}, BATCH)
    numbers = Captioning().summarize(sums)
    assert set(numbers) == {"loss", "perplexity", "token_accuracy"}
    np.testing.assert_allclose(numbers["perplexity"], V, rtol=1e-5)
    np.testing.assert_allclose(numbers["loss"], math.log(V), rtol=1e-5)


def test_a_batch_without_captions_is_one_sentence():
    with pytest.raises(ValueError, match=r"dataset with captions and data\.text\.Tokenize"):
        Captioning().score({"logits": logits()}, {"valid": np.ones(3, bool)})


def compared(tokenizer, *pairs):
    sums = {"loss": 1.0, "nats": 1.0, "correct": 1.0, "count": 1.0, "captions": 1.0}
    results = ((row(tokenizer, text), {"captions": captions}) for text, captions in pairs)
    return Captioning(tokenizer=tokenizer).summarize(sums, results)


def test_a_sentence_is_right_if_it_is_any_of_the_picture_s_captions(tokenizer):
    other = "three cats asleep"
    numbers = compared(tokenizer, (CAPTIONS[1], CAPTIONS[:2]), (other, CAPTIONS[2:]))
    assert numbers["exact_match"] == 1
    np.testing.assert_allclose([numbers["bleu4"], numbers["chrf"]], 1, rtol=1e-6)
    half = compared(tokenizer, (CAPTIONS[1], CAPTIONS[:2]), ("three cats", (other,)))
    assert half["exact_match"] == 0.5
    assert 0 < half["bleu4"] < 1
    assert 0 < half["chrf"] < 1


def test_bleu_makes_a_short_sentence_pay_for_its_length(tokenizer):
    words = "a red seven above a blue"
    # All of its one to four words in a row are right, and there are 6 of 7.
    numbers = compared(tokenizer, (words, CAPTIONS[:1]))
    np.testing.assert_allclose(numbers["bleu4"], math.exp(1 - 7 / 6), rtol=1e-6)


def test_bleu_does_not_mind_capitals_but_an_exact_match_does(tokenizer):
    numbers = compared(tokenizer, (CAPTIONS[0], (CAPTIONS[0].capitalize(),)))
    np.testing.assert_allclose(numbers["bleu4"], 1, rtol=1e-6)
    assert numbers["exact_match"] == 0


def test_nothing_written_is_wrong_and_no_error(tokenizer):
    numbers = compared(tokenizer, ("", CAPTIONS[:1]))
    assert numbers["exact_match"] == numbers["bleu4"] == numbers["chrf"] == 0


def test_a_wrong_sentence_is_drawn_with_a_true_one(tokenizer):
    task, image = Captioning(tokenizer=tokenizer), np.zeros((5, 7, 3), np.uint8)
    example = {"captions": CAPTIONS[:2]}
    picture, title, right = task.draw(image, example, row(tokenizer, CAPTIONS[1]), ())
    assert (title, right) == (CAPTIONS[1], True)
    assert picture is image
    _, title, right = task.draw(image, example, row(tokenizer, "a cat"), ())
    assert (title, right) == (f"a cat; is: {CAPTIONS[0]}", False)
    target = {"tokens": tokenizer.fill(CAPTIONS[2], 24)}
    assert task.draw_target(image, target, ())[1] == CAPTIONS[2]


def test_a_word_of_several_pieces_looked_where_they_looked_on_average(tokenizer):
    text = "three zebras"
    ids = tokenizer.encode(text)
    assert len(ids) > 3  # "zebras" is no word of this vocabulary
    weights = np.zeros((24, 1, 24), np.float32)
    weights[np.arange(24), 0, np.arange(24)] = 1  # each piece looks at a cell of its own
    task = Captioning(tokenizer=tokenizer)
    (three, first), (zebras, rest) = task.words(row(tokenizer, text, weights=weights))
    assert (three, zebras) == ("three", "zebras")
    pieces = len(tokenizer.encode("three"))
    np.testing.assert_allclose(first[0, 1 : pieces + 1], 1 / pieces)
    np.testing.assert_allclose(rest[0, pieces + 1 : len(ids) + 1], 1 / (len(ids) - pieces))
    assert rest[0, : pieces + 1].sum() == rest[0, len(ids) + 1 :].sum() == 0


def test_a_picture_without_captions_is_drawn_with_a_lit_one_for_each_word(tokenizer):
    weights = np.zeros((24, 2, 3), np.float32)
    weights[:, 0, 2] = 1  # the upper right
    task, image = Captioning(tokenizer=tokenizer), np.full((40, 60, 3), 100, np.uint8)
    prediction = row(tokenizer, CAPTIONS[2], weights=weights)
    sheet, title, right = task.draw(image, {"image": image}, prediction, ())
    assert (title, right) == (CAPTIONS[2], True)
    assert sheet.shape == (GAP + TILE * 2 // 3 + 1 + LINE + GAP, 4 * (TILE + GAP) + GAP, 3)
    for tile in range(4):
        left = GAP + tile * (TILE + GAP)
        upper_right, lower_left = sheet[GAP + 5, left + TILE - 5], sheet[GAP + 95, left + 5]
        # The picture itself, and then three words that look at the upper right.
        assert upper_right.tolist() == [100] * 3
        assert lower_left.tolist() == [100 if tile == 0 else 20] * 3
    plain = task.draw(image, {"image": image}, row(tokenizer, CAPTIONS[2]), ())[0]
    assert plain is image
