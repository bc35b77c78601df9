from functools import partial

import jax
import numpy as np
import pytest

from vit_jax.layers.attention_pool import AttentionPool
from vit_jax.layers.transformer import EncoderBlock


def tokens(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def made(layer, x):
    """A layer's variables and itself, compiled."""
    call = partial(layer.init_with_output, train=False)
    _, variables = jax.jit(call)(jax.random.key(0), x)
    return variables, jax.jit(partial(layer.apply, train=False))


def test_pooling_by_attention_is_blind_to_the_order_of_tokens_but_not_to_what_they_are():
    x = tokens(2, 5, 8)
    variables, apply = made(AttentionPool(heads=2), x)
    found = apply(variables, x)
    assert found.shape == (2, 8)
    assert set(variables["params"]) == {"probe", "attention", "norm", "mlp"}
    np.testing.assert_allclose(apply(variables, x[:, ::-1]), found, atol=1e-5)
    other = x.copy()
    other[:, 3] += 1
    assert np.abs(apply(variables, other) - found).max() > 1e-2


def test_pooling_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="heads=3 must divide the width 8"):
        AttentionPool(heads=3).init(jax.random.key(0), tokens(1, 2, 8), train=False)


def test_a_causal_block_sees_no_later_token():
    x = tokens(1, 5, 8)
    variables, apply = made(EncoderBlock(heads=2, causal=True), x)
    other = x.copy()
    other[:, 3:] *= -1
    before, after = np.asarray(apply(variables, x)), np.asarray(apply(variables, other))
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=1e-6)
    assert np.abs(after[:, 3:] - before[:, 3:]).min(-1).max() > 1e-4
    free = jax.jit(partial(EncoderBlock(heads=2).apply, train=False))
    assert np.abs(free(variables, other)[:, :3] - free(variables, x)[:, :3]).max() > 1e-3
