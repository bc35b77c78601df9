from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.golden import detr as golden
from vit_jax.contracts import Features
from vit_jax.models import detr
from vit_jax.models.detr import DETR
from vit_jax.models.resnet import ResNet
from vit_jax.pretrained import names
from vit_jax.pretrained.families.detr import HF

# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GOLDEN = Path(__file__).parents[1] / "golden" / "detr_tiny.npz"
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
        ("detr_r50", 41_524_768),
        ("detr_r50_dc5", 41_524_768),
        ("detr_r101", 60_464_672),
        ("detr_r101_dc5", 60_464_672),
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


def test_every_part_equals_the_published_implementation():
    arrays = np.load(GOLDEN)
    state = {k.removeprefix("state/"): arrays[k] for k in arrays if k.startswith("state/")}
    # Without masks; the same weights with them are in test_panoptic.
    state = {k.removeprefix("detr."): v for k, v in state.items() if k.startswith("detr.")}
    backbone = ResNet(golden.DEPTHS, width=golden.ROOT, norm="frozen")
    model = DETR(
        backbone,
        golden.CLASSES,
        golden.QUERIES,
        golden.WIDTH,
        golden.HEADS,
        golden.HIDDEN,
        golden.LAYERS,
        golden.LAYERS,
    )
    image, mask = arrays["image"].astype(np.float32), arrays["mask"]
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image, mask)
    table = HF[False, False]
    variables = names.read(table, shapes, state)  # all of both sides, or an error
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    run = partial(model.apply, train=False, capture_intermediates=True, mutable=["intermediates"])
    out, seen = quick(run)(variables, image, mask)
    seen = seen["intermediates"]
    for key, got in (
        ("projected", seen["input_proj"]["__call__"][0]),
        ("memory", seen["encoder_1"]["__call__"][0]),
        ("decoder_0", seen["decoder_0"]["__call__"][0]),
        ("logits", out["logits"]),
        ("boxes", out["boxes"]),
    ):
        wanted = arrays[key]
        got = np.reshape(got, wanted.shape)  # pixels may be in rows, or one after the other
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_an_image_does_not_depend_on_what_else_is_in_the_batch(variables, evaluate):
    image, mask = padded((4, 3), (2, 5))
    both = evaluate(variables, image, mask)
    image[1], mask[1] = (part[0] for part in padded((3, 4), (1, 1)))  # another second image
    other = evaluate(variables, image, mask)
    chex.assert_trees_all_equal(
        *({k: v[0] for k, v in out.items()} for out in (both, other))
    )
    assert np.abs(both["logits"][1] - other["logits"][1]).max() > 1e-3


def test_padding_further_changes_nothing(variables, evaluate):
    image, mask = padded((4, 3), (2, 5))
    out = evaluate(variables, image, mask)
    for i, (h, w) in enumerate(((32, 24), (16, 40))):
        alone = evaluate(variables, image[i : i + 1, :h, :w])  # and without a mask
        for key in ("logits", "boxes"):
            chex.assert_trees_all_close(alone[key][0], out[key][i], rtol=1e-4, atol=1e-5)


def test_what_lies_in_the_padding_is_not_seen(variables, evaluate):
    image, mask = padded((4, 3), (2, 5))
    noise = np.where(mask[..., None], image, draw(*image.shape))
    chex.assert_trees_all_equal(
        evaluate(variables, image, mask), evaluate(variables, noise, mask)
    )


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


def test_remat_changes_no_gradient(variables):
    image, mask = padded((1, 2), (2, 1))
    image, mask = image[:, :16, :16], mask[:, :16, :16]
    fields = {"dropout": 0.0, "attention_dropout": 0.0, "encoder_depth": 1, "decoder_depth": 1}

    def gradient(remat):
        def loss(params):
            out = tiny(**fields, remat=remat).apply({"params": params}, image, mask, train=True)
            return jnp.sin(out["logits"]).sum() + out["boxes"].sum()

        return quick(jax.grad(loss))(variables["params"])

    chex.assert_trees_all_close(gradient(True), gradient(False), rtol=1e-3, atol=1e-4)


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
