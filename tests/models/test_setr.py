from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax.contracts import Features
from vit_jax.models.setr import DECODERS, SETR, MlaNeck

# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Tapped(nn.Module):
    """A backbone with maps of one size from four depths."""

    width: int = 6
    patch: int = 16

    @nn.compact
    def __call__(self, image, *, train):
        side, maps = (self.patch, self.patch), []
        x = nn.Conv(self.width, side, side, padding="VALID", name="embed")(image)
        for i in range(4):
            x = x + nn.tanh(nn.Dense(self.width, name=f"block_{i}")(x))
            maps.append(x)
        return Features(maps=tuple(maps), pooled=x.mean((1, 2)))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(model, *inputs, **options):
    """Values that matter for every parameter; compiling `init` would take longer than the test."""
    shapes = jax.eval_shape(partial(model.init, **options), jax.random.key(0), *inputs)
    random = np.random.default_rng(0)

    def value(path, leaf):
        if path[-1].key in ("scale", "var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 4
        return (random.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map_with_path(value, shapes)


@pytest.mark.parametrize(
    ("decoder", "parameters", "auxiliary"),
    [("naive", 303_254, 3), ("pup", 4_171_414, 3), ("mla", 5_268_630, 4)],
)
def test_decoders_have_the_published_number_of_parameters(decoder, parameters, auxiliary):
    model = SETR(Tapped(width=1024), 150, decoder)
    pixels = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    out, variables = jax.eval_shape(
        partial(model.init_with_output, train=False), jax.random.key(0), pixels
    )
    assert out.shape == (1, 64, 96, 150)
    params = variables["params"]
    parts = [params[name] for name in ("neck", "decoder") if name in params]
    assert sum(leaf.size for leaf in jax.tree.leaves(parts)) == parameters
    assert sum(name.startswith("auxiliary") for name in params) == auxiliary


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_are_as_large_as_the_image(decoder):
    model = SETR(Tapped(), 3, decoder, features=4, head_features=3)
    image = draw(2, 32, 48, 3)
    variables = random_variables(model, image, train=False)
    run = partial(model.apply, train=True, mutable=["batch_stats"])
    out, changed = quick(run)(variables, image)
    assert out["logits"].shape == (2, 32, 48, 3)
    assert {x.shape for x in out["auxiliary"]} == {(2, 32, 48, 3)}
    # A head that is not read leaves its statistics as they are; here all are read.
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]),
        jax.tree.leaves(changed["batch_stats"]),
        strict=True,
    ):
        assert np.abs(before - after).max() > 0


def test_the_decoder_alone_is_read_in_evaluation():
    model = SETR(Tapped(), 3, "naive", features=4)
    image = draw(1, 32, 48, 3)
    variables = random_variables(model, image, train=False)
    run = quick(partial(model.apply, train=False))
    logits = run(variables, image)
    main = {k: v for k, v in variables["params"].items() if not k.startswith("auxiliary")}
    stats = {"decoder": variables["batch_stats"]["decoder"]}
    again = run({"params": main, "batch_stats": stats}, image)
    chex.assert_trees_all_equal(again, logits)


def test_aggregation_hands_deep_maps_to_shallow_ones():
    maps = tuple(draw(1, 2, 3, 4, seed=i) for i in range(3))
    neck = MlaNeck(features=5)
    variables = random_variables(neck, maps, train=False)
    run = quick(partial(neck.apply, train=False))
    out = run(variables, maps)
    for i in range(3):
        changed = run(
            variables, (*maps[:i], maps[i] * np.arange(4, dtype=np.float32), *maps[i + 1 :])
        )
        moved = [np.abs(a - b).max() > 1e-6 for a, b in zip(out, changed, strict=True)]
        assert moved == [j <= i for j in range(3)]


def test_a_decoder_that_does_not_exist_is_refused():
    init = partial(SETR(Tapped(), 3, "nave").init, train=False)
    with pytest.raises(ValueError, match=r"decoder='nave' does not exist\. Did you mean 'naive'"):
        jax.eval_shape(init, jax.random.key(0), draw(1, 16, 16, 3))
