from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.layers.attention import Attention, Cache, attend

# Less optimised code is compiled in half the time, and a whole function at once in less still.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
fast_attend = quick(attend, static_argnames="scale")


def plain(query, key, value, scale, bias=0.0, mask=True):
    """Equation 1 of the paper as it stands, in float64: the values and the weights."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = scale * np.einsum("...nad,...mad->...anm", query, key) + bias
    weights = np.where(mask, np.exp(logits), 0)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("...anm,...mad->...nad", weights, value), weights


def draw(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def close(got, wanted):
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_attention_is_the_softmax_of_the_paper_with_more_keys_than_queries():
    query, key, value = draw((2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    out, weights = fast_attend(query, key, value, scale=0.5)
    wanted = plain(query, key, value, 0.5)
    close(out, wanted[0])
    close(weights, wanted[1])


def test_large_logits_neither_overflow_nor_vanish():
    query, key, value = draw((1, 5, 2, 4), (1, 6, 2, 4), (1, 6, 2, 4))
    out, weights = fast_attend(query, key, value, scale=1000.0)
    np.testing.assert_array_equal(weights.argmax(-1), plain(query, key, value, 1.0)[1].argmax(-1))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert np.isfinite(out).all()


def test_bias_and_mask_broadcast_over_any_leading_axes():
    query, key, value, bias = draw(*[(2, 3, 4, 2, 5)] * 3, (3, 2, 4, 4))
    mask = np.tri(4, dtype=bool)  # of lower rank than the logits
    out, weights = fast_attend(query, key, value, scale=0.3, bias=bias, mask=mask)
    wanted = plain(query, key, value, 0.3, bias[None], mask)
    close(out, wanted[0])
    close(weights, wanted[1])
    assert (np.asarray(weights)[..., ~mask] == 0).all()


def test_a_query_that_sees_no_key_gives_finite_values_and_gradients():
    query, key, value = draw((2, 3, 1, 4), (2, 5, 1, 4), (2, 5, 1, 4))
    mask = np.ones((2, 1, 3, 5), bool)
    mask[1, 0, 1] = False

    @quick
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(query, key, value):
        out, weights = attend(query, key, value, scale=0.5, mask=mask)
        return out.sum(), (out, weights)

    (_, (out, weights)), gradients = run(query, key, value)
    close(weights[1, 0, 1], np.full(5, 0.2))
    close(out[0], plain(query, key, value, 0.5)[0][0])
    assert all(np.isfinite(g).all() for g in gradients)
    assert (np.asarray(gradients[0])[1, 1] == 0).all()


def test_the_gradient_is_that_of_the_plain_form():
    query, key, value, bias, weight = draw(*[(2, 4, 3, 5)] * 3, (3, 4, 4), (2, 4, 3, 5))

    def ours(query, key, value, bias):
        return (attend(query, key, value, scale=0.4, bias=bias)[0] * weight).sum()

    def textbook(query, key, value, bias):
        logits = 0.4 * jnp.einsum("bnad,bmad->banm", query, key) + bias[None]
        out = jnp.einsum("banm,bmad->bnad", jax.nn.softmax(logits), value)
        return (out * weight).sum()

    got, wanted = (
        quick(jax.grad(f, (0, 1, 2, 3)))(query, key, value, bias) for f in (ours, textbook)
    )
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_keeps_the_weights_once_and_in_the_dtype_of_the_values(dtype):
    query, key, value = (jnp.asarray(x, dtype) for x in draw((2, 6, 3, 4), *[(2, 11, 3, 4)] * 2))
    _, backward = jax.vjp(lambda *x: attend(*x, scale=0.5)[0], query, key, value)
    kept = [x.dtype for x in jax.tree.leaves(backward) if x.size == 2 * 3 * 6 * 11]
    assert kept == [dtype]


def test_gradients_in_bfloat16_are_those_of_float32_but_for_its_rounding():
    drawn = draw((2, 6, 3, 4), *[(2, 11, 3, 4)] * 2, (2, 6, 3, 4))

    def gradients(dtype):
        query, key, value, given = (jnp.asarray(x, dtype) for x in drawn)
        _, backward = jax.vjp(lambda *x: attend(*x, scale=0.5)[0], query, key, value)
        return [np.asarray(x, np.float32) for x in backward(given)]

    for got, wanted in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert np.abs(got - wanted).max() < 2**-6 * np.abs(wanted).max()


def test_dropout_drops_weights_and_keeps_their_mean():
    query, key = draw((1, 2, 1, 3), (1, 4, 1, 3))
    value = np.eye(4, dtype=np.float32)[None, :, None]  # the values are then the weights themselves

    class Dropped(nn.Module):
        @nn.compact
        def __call__(self):
            dropout = nn.Dropout(0.25, deterministic=False)
            return attend(query, key, value, scale=1.0, dropout=dropout)

    def run(key):
        return Dropped().apply({}, rngs={"dropout": key})

    out, weights = quick(jax.vmap(run))(jax.random.split(jax.random.key(0), 2000))
    whole = plain(query, key, value, 1.0)[1]
    close(weights[0], whole)  # as before dropout
    kept = np.asarray(out)[:, 0, :, 0] / whole[:, 0]  # [draws, N, M]
    np.testing.assert_allclose(np.unique(kept.round(3)), [0, 1.333])
    np.testing.assert_allclose(kept.mean(0), 1, atol=0.06)


def test_weights_in_bfloat16_come_from_a_float32_softmax():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in draw(*[(2, 9, 2, 8)] * 3))
    out, weights = fast_attend(query, key, value, scale=0.25)
    assert (out.dtype, weights.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    wanted = plain(query, key, value, 0.25)[0]
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=0.03)


def test_the_module_projects_by_heads_and_back():
    x, context = draw((2, 3, 6), (2, 5, 6))
    params = {
        name: dict(zip(("kernel", "bias"), draw((6, 6), (6,), seed=i), strict=True))
        for i, name in enumerate(("query", "key", "value", "out"))
    }

    def dense(x, name):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def apply(layer):
        return quick(partial(layer.apply, train=False))({"params": params}, x, context)

    query, key, value = (
        dense(inputs, name).reshape(2, -1, 2, 3)  # the first half of D is the first head
        for inputs, name in ((x, "query"), (context, "key"), (context, "value"))
    )
    wanted = dense(plain(query, key, value, 3**-0.5)[0].reshape(2, 3, 6), "out")
    np.testing.assert_allclose(apply(Attention(heads=2)), wanted, rtol=1e-4, atol=1e-5)
    wanted = dense(plain(query, key, value, 0.1)[0].reshape(2, 3, 6), "out")
    np.testing.assert_allclose(apply(Attention(2, scale=0.1)), wanted, rtol=1e-4, atol=1e-5)


def test_without_qkv_bias_only_the_last_projection_has_one():
    shapes = jax.eval_shape(
        lambda x: Attention(heads=2, qkv_bias=False).init(jax.random.key(0), x, train=False),
        jnp.zeros((1, 3, 4)),
    )
    has_bias = {name: "bias" in leaves for name, leaves in shapes["params"].items()}
    assert has_bias == {"query": False, "key": False, "value": False, "out": True}


def test_weights_are_sown_where_asked_for_and_nowhere_else():
    (x,) = draw((2, 3, 4))
    layer = Attention(heads=2)
    variables = quick(partial(layer.init, train=False))(jax.random.key(0), x)
    assert set(variables) == {"params"}
    out = quick(partial(layer.apply, train=False))(variables, x)
    seen, state = quick(partial(layer.apply, train=False, mutable=["intermediates"]))(variables, x)
    chex.assert_trees_all_close(seen, out, rtol=1e-5)
    (weights,) = state["intermediates"]["attention_weights"]
    assert weights.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads=4 must divide the width 6"):
        jax.eval_shape(
            lambda x: Attention(heads=4).init(jax.random.key(0), x, train=False),
            jnp.zeros((1, 2, 6)),
        )


@pytest.mark.parametrize("cosine", [False, True])
def test_tokens_that_come_one_by_one_read_the_same_from_a_cache(cosine):
    (x,) = draw((2, 5, 8))
    module = Attention(heads=2, cosine=cosine)
    causal = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    init = quick(lambda x: module.init_with_output(jax.random.key(0), x, mask=causal, train=False))
    whole, variables = init(x)

    @quick
    def read(token, cache, place):
        seen = (jnp.arange(5) <= place)[None, None, None]
        return module.apply(variables, token, mask=seen, cache=cache, place=place, train=False)

    cache = Cache.empty(2, 5, 2, 8, jnp.float32)
    for place in range(5):
        out, cache = read(x[:, place : place + 1], cache, place)
        np.testing.assert_allclose(out, whole[:, place : place + 1], atol=1e-6)


def test_a_complete_cache_is_read_without_what_it_was_made_of():
    x, memory = draw((2, 3, 8), (2, 4, 8))
    module = Attention(heads=2)

    @quick
    def read(x, memory):
        whole, variables = module.init_with_output(jax.random.key(0), x, memory, train=False)
        empty = Cache.empty(2, 4, 2, 8, jnp.float32)
        first, cache = module.apply(variables, x, memory, cache=empty, place=0, train=False)
        again, same = module.apply(variables, x, cache=cache, train=False)
        return whole, first, again, cache, same

    whole, first, again, cache, same = read(x, memory)
    np.testing.assert_allclose(first, whole, atol=1e-6)
    np.testing.assert_allclose(again, first, atol=1e-6)
    np.testing.assert_array_equal(same.key, cache.key)
