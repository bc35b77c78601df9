"""Captioners: what a word depends on, and that writing word by word is the same computation."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax.contracts import Features
from vit_jax.models.captioner import DECODERS, Captioner, captioner_b16, captioner_r50

B, H, W, T, V = 2, 8, 12, 7, 9
LOOKING = ("attention", "transformer")
# Of the fresh parameters: so that words depend on the picture, and none is certain.
SCALE = {"lstm": 2, "attention": 1, "transformer": 3}


class Eyes(nn.Module):
    """A map of every second pixel's colour, and a description of its own."""

    @nn.compact
    def __call__(self, image, *, train):
        cells = nn.Dense(6, name="cells")(image[:, ::2, ::2])
        return Features(maps=(image, cells), pooled=nn.Dense(5, name="pooled")(image[:, 0, 0]))


def captioner(decoder, **more):
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "length": T, "vocabulary": V}
    return Captioner(Eyes(), decoder=decoder, **sizes | more)


@cache
def pictures():
    return jax.random.normal(jax.random.key(0), (B, H, W, 3))


@cache
def variables(decoder):
    """Of a model that nobody trained, as large as `SCALE` says."""
    init = jax.jit(lambda x: captioner(decoder).init(jax.random.key(1), x, train=False))
    return jax.tree.map(lambda x: SCALE[decoder] * np.asarray(x), init(pictures()))


@cache
def forward(decoder, **more):
    model = captioner(decoder, **more)

    def apply(variables, image, tokens=None, train=False):
        return model.apply(variables, image, tokens, train=train, mutable=["intermediates"])

    return jax.jit(apply, static_argnames="train")


@cache
def written(decoder, beams=1):
    return forward(decoder, beams=beams)(variables(decoder), pictures())[0]


def taught(decoder, tokens, image=None):
    """Logits by teacher forcing."""
    image = pictures() if image is None else image
    return forward(decoder)(variables(decoder), image, tokens, train=True)[0]["logits"]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("decoder", DECODERS)
def test_word_by_word_is_what_reading_the_whole_sentence_gives(decoder, beams):
    out = written(decoder, beams)
    tokens = out["generated"]
    log_probs = jax.nn.log_softmax(taught(decoder, tokens))
    each = jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1)[..., 0]
    log_prob = jnp.where(tokens[:, 1:] == 0, 0.0, each).sum(1)
    chex.assert_trees_all_close(out["log_prob"], log_prob, atol=1e-5)


@pytest.mark.parametrize("decoder", DECODERS)
def test_greedy_writes_the_likeliest_word_each_time(decoder):
    out = written(decoder)
    tokens = np.asarray(out["generated"])
    logits = np.array(taught(decoder, tokens))
    logits[..., :2] = -np.inf  # padding and start are never written
    real = tokens[:, 1:] != 0
    assert (logits.argmax(-1) == tokens[:, 1:])[real].all()
    assert real.sum() > B  # more than an end each
    assert abs(out["log_prob"][0] - out["log_prob"][1]) > 1e-3  # the pictures differ
    assert (out["log_prob"] < -0.1).all()


@pytest.mark.parametrize("decoder", LOOKING)
def test_where_it_looked_adds_up_to_one_for_each_word(decoder):
    out = written(decoder)
    assert out["attention"].shape == (B, T, H // 2, W // 2)
    expected = np.asarray(out["generated"] != 0) * (np.arange(T) > 0)
    np.testing.assert_allclose(out["attention"].sum((2, 3)), expected, atol=1e-5)


def test_where_it_looked_is_the_mean_over_blocks_and_heads_of_the_whole_sentence():
    out = written("transformer")
    _, sown = forward("transformer")(
        variables("transformer"), pictures(), out["generated"], train=True
    )
    decoder = sown["intermediates"]["decoder"]
    weights = [decoder[f"block_{i}"]["cross_attention"]["attention_weights"][0] for i in (0, 1)]
    mean = np.mean([np.asarray(w).mean(1) for w in weights], 0)  # [B, T - 1, h w]
    mean = mean * np.asarray(out["generated"][:, 1:, None] != 0)
    np.testing.assert_allclose(out["attention"][:, 1:].reshape(B, T - 1, -1), mean, atol=1e-5)


def test_the_last_state_lstm_tells_nothing_of_where_it_looked():
    assert set(written("lstm")) == {"generated", "log_prob"}


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_word_depends_on_those_before_it_and_on_no_other(decoder):
    tokens = jnp.array([[1, 3, 4, 5, 6, 2, 0], [1, 7, 8, 3, 2, 0, 0]])
    changed = tokens.at[:, 3].set(8)
    difference = np.abs(taught(decoder, tokens) - taught(decoder, changed)).max((0, 2))
    np.testing.assert_allclose(difference[:3], 0, atol=1e-6)
    assert (difference[3:] > 1e-4).all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_only_a_decoder_that_looks_sees_more_than_the_description(decoder):
    tokens = jnp.array([[1, 3, 4, 5, 6, 2, 0]] * B)
    elsewhere = pictures().at[:, 4, 6].add(2.0)  # a pixel that the description does not see
    same = taught(decoder, tokens) - taught(decoder, tokens, elsewhere)
    assert (np.abs(same).max() > 1e-4) == (decoder in LOOKING)
    described = pictures().at[:, 0, 0].add(2.0)
    assert np.abs(taught(decoder, tokens) - taught(decoder, tokens, described)).max() > 1e-4


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_parameters_are_the_same_with_and_without_a_sentence(decoder):
    tokens = jnp.ones((B, T), jnp.int32)
    model, key = captioner(decoder), jax.random.key(1)
    shapes = [
        jax.eval_shape(lambda x, t=t: model.init(key, x, t, train=False), pictures())
        for t in (None, tokens)
    ]
    chex.assert_trees_all_equal_shapes_and_dtypes(*shapes)
    assert ("memory" in shapes[0]["params"]) == (decoder in LOOKING)


@pytest.mark.parametrize("decoder", DECODERS)
def test_it_writes_in_half_precision(decoder):
    model = captioner(decoder, dtype=jnp.bfloat16, beams=2)
    out = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False), variables(decoder), pictures()
    )
    assert out["log_prob"].dtype == jnp.float32


def parameters(model):
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    params = shapes["params"]
    return {name: sum(x.size for x in jax.tree.leaves(params[name])) for name in params}


def test_the_transformer_of_a_published_size_has_the_exact_number_of_parameters():
    V, D = 8000, 512
    found = parameters(captioner_b16(vocabulary=V))
    assert found["backbone"] == 85_798_656  # ViT-B/16 without a head
    assert found["memory"] == 768 * D + D
    attention, mlp, norm = 4 * (D * D + D), 2 * 4 * D * D + 5 * D, 2 * D
    blocks = 6 * (2 * attention + mlp + 3 * norm)
    assert found["decoder"] == V * D + 31 * D + blocks + norm + D * V + V


def test_the_lstm_of_a_published_size_has_the_exact_number_of_parameters():
    V, D, C = 8000, 512, 2048
    found = parameters(captioner_r50(vocabulary=V))
    assert found["backbone"] == 23_508_032  # ResNet-50 without a head
    lstm = 4 * (2 * D * D + D * D + D)  # it reads a word and what is seen
    attention = (D * D + D) + D
    dense = D * D + D  # the keys, the gate, and two before the logits
    initial = C * 2 * D + 2 * D
    assert found["decoder"] == V * D + initial + lstm + attention + 4 * dense + D * V + V


@pytest.mark.parametrize(
    ("fields", "tokens", "train", "message"),
    [
        ({"decoder": "transfomer"}, T, True, "Did you mean 'transformer'"),
        ({"vocabulary": 0}, T, True, "vocabulary=0 must be at least 1"),
        ({"beams": 0}, T, True, "beams=0 must be at least 1"),
        ({"length_penalty": -1.0}, T, True, "length_penalty=-1.0 must be at least 0"),
        ({"end": V}, T, True, "end=9 is no id of a vocabulary of 9"),
        ({}, T + 1, True, "captions have 8 ids; the model is made for length=7"),
        ({}, None, True, "trained on `tokens`"),
        ({"heads": 3}, T, True, "heads=3 must divide the width 16"),
    ],
)
def test_what_cannot_be_is_refused(fields, tokens, train, message):
    model = captioner(fields.pop("decoder", "transformer"), **fields)
    tokens = None if tokens is None else jnp.ones((B, tokens), jnp.int32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, tokens, train=train), pictures())
