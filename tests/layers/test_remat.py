from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax import cost
from vit_jax.layers.remat import POLICIES, recomputed
from vit_jax.layers.transformer import EncoderBlock, apply_blocks


class Stack(nn.Module):
    remat: bool | str
    scan: bool = False

    @nn.compact
    def __call__(self, x):
        block = partial(EncoderBlock, 2, 2.0)
        return apply_blocks(block, x, (0.0, 0.0), scan=self.scan, remat=self.remat, train=True)


def gradient(remat, scan, params, x):
    return jax.grad(lambda p: jnp.sin(Stack(remat, scan).apply({"params": p}, x)).sum())(params)


@pytest.mark.parametrize("scan", [False, True])
def test_the_more_is_kept_the_less_is_computed_again_and_gradients_stay(scan):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    params = Stack(False, scan).init(jax.random.key(0), x)["params"]
    kinds = (True, *POLICIES, False)
    flops = [cost.flops(partial(gradient, kind, scan), params, x) for kind in kinds]
    assert flops[0] == flops[1]  # True is the first of them
    assert flops[1] > flops[2] > flops[3] >= flops[4], flops
    wanted = jax.jit(partial(gradient, False, scan))(params, x)
    for kind in POLICIES[1:]:
        got = jax.jit(partial(gradient, kind, scan))(params, x)
        chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_policy_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"remat='dots_savable' must be True, False .*dots_saveab"):
        recomputed(len, "dots_savable")
    with pytest.raises(ValueError, match="remat=1 must be True, False"):
        recomputed(len, 1)
