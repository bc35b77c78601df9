import math
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.contracts import Features
from vit_jax.models.classifier import Classifier, DistilledClassifier


class Means(nn.Module):
    """The smallest backbone: each channel's mean, times a scale."""

    @nn.compact
    def __call__(self, image, *, train):
        scale = self.param("scale", nn.initializers.ones, (1, 1, 1, image.shape[-1]))
        image = (image * scale).astype(jnp.bfloat16)
        return Features(maps=(image,), pooled=image.mean((1, 2)))


def image():
    return jax.random.normal(jax.random.key(0), (2, 4, 6, 3))


def test_the_first_loss_is_log_k_exactly():
    model = Classifier(Means(), 7)
    logits, variables = model.init_with_output(jax.random.key(1), image(), train=False)
    assert set(variables["params"]) == {"backbone", "head"}
    chex.assert_trees_all_equal(logits, jnp.zeros((2, 7)))
    loss = -jax.nn.log_softmax(logits)[:, 3].mean()
    assert float(loss) == pytest.approx(math.log(7), abs=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_an_affine_map_of_the_pooled_features_in_float32(dtype):
    model = Classifier(Means(), 2, dtype=dtype)
    kernel, bias = np.array([[1, 2], [0, -1], [3, 0.5]], np.float32), np.array([0.25, -4.0])
    params = {
        "backbone": {"scale": np.full((1, 1, 1, 3), 2.0, np.float32)},
        "head": {"kernel": kernel, "bias": bias.astype(np.float32)},
    }
    logits = model.apply({"params": params}, image(), train=False)
    assert logits.dtype == jnp.float32
    pooled = 2 * np.asarray(image()).mean((1, 2))
    np.testing.assert_allclose(logits, pooled @ kernel + bias, atol=0.05)


def test_dropout_acts_on_the_pooled_features_in_training_only():
    model = Classifier(Means(), 50, dropout=0.5)
    variables = {
        "params": {
            "backbone": {"scale": jnp.ones((1, 1, 1, 3))},
            "head": {"kernel": jnp.ones((3, 50)), "bias": jnp.zeros(50)},
        }
    }
    pixels = jnp.ones((400, 1, 1, 3))
    apply = partial(model.apply, variables, pixels)
    dropped = apply(train=True, rngs={"dropout": jax.random.key(0)})
    # All 50 logits share their features: 0, 2, 4 or 6 of three ones, kept at even odds and doubled.
    assert set(np.unique(dropped)) == {0, 2, 4, 6}
    assert (dropped == dropped[:, :1]).all()
    assert float(dropped.mean()) == pytest.approx(3, abs=0.3)
    chex.assert_trees_all_equal(apply(train=False), jnp.full((400, 50), 3.0))


def test_a_representation_is_a_layer_and_a_tanh_before_the_head():
    random = np.random.default_rng(0)
    params = {
        "backbone": {"scale": np.ones((1, 1, 1, 3), np.float32)},
        "pre_logits": {"kernel": random.normal(size=(3, 4)), "bias": random.normal(size=4)},
        "head": {"kernel": random.normal(size=(4, 2)), "bias": random.normal(size=2)},
    }
    model = Classifier(Means(), 2, representation=4)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image())
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)
    logits = model.apply({"params": params}, image(), train=False)
    pooled = np.asarray(image()).mean((1, 2))
    hidden = np.tanh(pooled @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"])
    wanted = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, wanted, atol=0.03)  # the backbone rounds to bfloat16


class Pair(nn.Module):
    """A backbone whose pooled is the first pixel's channels, then the last one's."""

    @nn.compact
    def __call__(self, image, *, train):
        pair = jnp.concatenate([image[:, 0, 0], image[:, -1, -1]], -1)
        return Features(maps=(image,), pooled=pair)


@pytest.mark.parametrize("train", [False, True])
def test_distilled_logits_are_the_mean_of_both_heads_each_of_its_token(train):
    model = DistilledClassifier(Pair(), 2)
    one, two = np.array([[1, 0], [0, 2], [0, 0]]), np.array([[0, 0], [3, 0], [0, 5]])
    params = {
        "head": {"kernel": one.astype(np.float32), "bias": np.array([1.0, 0])},
        "head_distilled": {"kernel": two.astype(np.float32), "bias": np.array([0, -1.0])},
    }
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image())
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)
    logits = model.apply({"params": params}, image(), train=train)
    first, last = np.asarray(image())[:, 0, 0], np.asarray(image())[:, -1, -1]
    wanted = (first @ one + [1, 0] + last @ two + [0, -1]) / 2
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Classifier, DistilledClassifier])
def test_a_head_without_classes_is_refused(kind):
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        kind(Means(), 0).init(jax.random.key(0), image(), train=False)
