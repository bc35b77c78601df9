from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax.contracts import Features
from vit_jax.models import detr
from vit_jax.models.detr import DETR

# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SMALL = {"width": 16, "heads": 2, "hidden": 12, "encoder_depth": 1, "decoder_depth": 2}


class Patches(nn.Module):
    """A backbone that looks at no other patch, so that padding cannot reach across an edge."""

    side: int = 8

    @nn.compact
    def __call__(self, image, *, train):
        side = (self.side, self.side)
        x = nn.Conv(6, side, side, padding="VALID", name="proj")(image)
        return Features(maps=(x,), pooled=x.mean((1, 2)))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


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


def tiny(**fields):
    return DETR(Patches(), num_classes=4, queries=5, **(SMALL | fields))


def padded(*sizes):
    """Two images of sizes in patches, in a batch of 4 x 5 patches, and where they are."""
    image, mask = np.zeros((2, 32, 40, 3), np.float32), np.zeros((2, 32, 40), bool)
    for i, (h, w) in enumerate(sizes):
        image[i, : 8 * h, : 8 * w] = draw(8 * h, 8 * w, 3, seed=i)
        mask[i, : 8 * h, : 8 * w] = True
    return image, mask


@pytest.fixture(scope="module")
def variables():
    return random_variables(tiny(), *padded((4, 3), (2, 5)), train=False)


@pytest.fixture(scope="module")
def evaluate():
    return quick(partial(tiny().apply, train=False))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("detr_r50_dc5", 41_524_768),
        ("detr_r101", 60_464_672),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, parameters):
    model = getattr(detr, name)()
    pixels = jax.ShapeDtypeStruct((1, 132, 164, 3), jnp.float32)
    out, variables = jax.eval_shape(
        partial(model.init_with_output, train=False), jax.random.key(0), pixels
    )
    params = variables["params"]
    assert count(params) == parameters
    assert {k: v.shape for k, v in out.items()} == {"logits": (1, 100, 92), "boxes": (1, 100, 4)}
    layers = [v for k, v in params.items() if k.startswith(("encoder", "decoder"))]
    assert count(layers) == 17_363_456
    parts = ("class_head", "box_head", "query", "input_proj")
    assert [count(params[k]) for k in parts] == [23_644, 132_612, 25_600, 524_544]


def test_dilation_is_all_that_tells_dc5():
    for name in ("detr_r50", "detr_r101"):
        model, dilated = getattr(detr, name)(), getattr(detr, f"{name}_dc5")()
        assert dilated == model.clone(backbone=model.backbone.clone(dilation=2))


def test_an_image_does_not_depend_on_what_else_is_in_the_batch(variables, evaluate):
    image, mask = padded((4, 3), (2, 5))
    both = evaluate(variables, image, mask)
    image, mask = image.copy(), mask.copy()  # JAX may still be reading the others
    image[1], mask[1] = (part[0] for part in padded((3, 4), (1, 1)))  # another second image
    other = evaluate(variables, image, mask)
    chex.assert_trees_all_equal(*({k: v[0] for k, v in out.items()} for out in (both, other)))
    assert np.abs(both["logits"][1] - other["logits"][1]).max() > 1e-3


def test_padding_further_changes_nothing(variables, evaluate):
    image, mask = padded((4, 3), (2, 5))
    out = evaluate(variables, image, mask)
    alone = evaluate(variables, image[1:, :16, :40])  # and without a mask
    second = {key: value[1:] for key, value in out.items()}
    chex.assert_trees_all_close(alone, second, rtol=1e-4, atol=1e-5)


def test_what_lies_in_the_padding_is_not_seen(variables, evaluate):
    image, mask = padded((4, 3), (2, 5))
    noise = np.where(mask[..., None], image, draw(*image.shape))
    chex.assert_trees_all_equal(evaluate(variables, image, mask), evaluate(variables, noise, mask))


def test_queries_are_a_set(variables, evaluate):
    image, mask = padded((4, 3), (2, 5))
    order = np.array([3, 0, 4, 1, 2])
    params = variables["params"]
    moved = {"params": params | {"query": params["query"][order]}}
    wanted = {k: v[:, order] for k, v in evaluate(variables, image, mask).items()}
    chex.assert_trees_all_close(evaluate(moved, image, mask), wanted, rtol=1e-4, atol=1e-5)


def test_training_gives_every_layer(variables, evaluate):
    image, mask = padded((4, 3), (2, 5))
    model = tiny(dropout=0.0, attention_dropout=0.0)
    out = quick(partial(model.apply, train=True))(variables, image, mask)
    assert set(out) == {"logits", "boxes", "auxiliary"}
    (first,) = out.pop("auxiliary")  # of two layers
    chex.assert_trees_all_close(out, evaluate(variables, image, mask), rtol=1e-4, atol=1e-5)
    # A decoder of one layer is the first part of one of two.
    short = quick(partial(tiny(decoder_depth=1).apply, train=False))(variables, image, mask)
    chex.assert_trees_all_close(first, short, rtol=1e-4, atol=1e-5)


def test_remat_recomputes_each_layer(variables):
    image, mask = padded((4, 3), (2, 5))

    def program(remat):
        model = tiny(remat=remat)
        key = {"dropout": jax.random.key(0)}
        run = partial(model.apply, train=True, rngs=key)
        return [e.primitive.name for e in jax.make_jaxpr(run)(variables, image, mask).eqns]

    layers = SMALL["encoder_depth"] + SMALL["decoder_depth"]
    assert program(remat=True).count("remat2") == layers
    assert program(remat=False).count("remat2") == 0


def test_half_precision_keeps_outputs_and_parameters_float32(variables):
    image, mask = padded((4, 3), (2, 5))
    model = tiny(dtype=jnp.bfloat16)
    out, made = jax.eval_shape(
        partial(model.init_with_output, train=False), jax.random.key(0), image, mask
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((out, made))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"width": 18, "heads": 3}, "a width that 4 divides, not 18"),
        ({"heads": 3}, "heads=3 must divide the width 16"),
        ({"activation": "relo"}, "activation='relo' does not exist. Did you mean 'relu'"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    model = tiny().clone(**fields)
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), draw(1, 8, 16, 3))
