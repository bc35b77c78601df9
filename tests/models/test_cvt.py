from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import cvt as golden
from vit_jax.models import cvt
from vit_jax.models.cvt import ConvProjection, CvT
from vit_jax.pretrained import names
from vit_jax.pretrained.families.cvt import HF

GOLDEN = Path(__file__).parents[1] / "golden" / "cvt_tiny.npz"
TINY = partial(CvT, widths=(4, 8, 12), depths=(1, 1, 2), heads=(1, 2, 3))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def image(seed=0, shape=(2, 34, 41, 3)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_variables(model, pixels, seed=0):
    """Values that matter for every parameter; compiling `init` would take longer than the test."""
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), pixels)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 4
        return (random.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def tiny():
    model = TINY()
    return model, random_variables(model, image())


@pytest.mark.parametrize(
    ("name", "parameters", "statistics"),
    [
        ("cvt_13", 19_997_480, 25_728),
        ("cvt_21", 31_622_696, 41_856),
        ("cvt_w24", 277_196_392, 134_400),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, parameters, statistics):
    model = getattr(cvt, name)()
    pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    features, variables = jax.eval_shape(
        partial(model.init_with_output, train=False), jax.random.key(0), pixels
    )
    width = features.pooled.shape[-1]
    with_head = count(variables["params"]) + 1000 * (width + 1)  # 1,000 classes
    assert (with_head, count(variables["batch_stats"])) == (parameters, statistics)
    sides = [(56, 56), (28, 28), (14, 14)]
    assert [m.shape[1:] for m in features.maps] == [
        (*side, c) for side, c in zip(sides, model.widths, strict=True)
    ]


@pytest.fixture(scope="module")
def published():
    arrays = np.load(GOLDEN)
    state = {k.removeprefix("state/"): arrays[k] for k in arrays if k.startswith("state/")}
    state = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    model = CvT(golden.WIDTHS, golden.DEPTHS, golden.HEADS)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image())
    variables = names.read(HF, shapes, state)  # all of both sides, or an error
    return jax.tree.map(lambda x: x.astype(np.float32), variables), arrays


@pytest.mark.parametrize("activation", golden.ACTIVATIONS)
@pytest.mark.parametrize("case", range(len(golden.SIZES)), ids=[str(s) for s in golden.SIZES])
def test_every_stage_equals_the_published_implementation(published, case, activation):
    variables, arrays = published
    model = CvT(golden.WIDTHS, golden.DEPTHS, golden.HEADS, activation=activation)
    pixels = arrays[f"{case}/image"].astype(np.float32)
    out = jax.jit(partial(model.apply, train=False))(variables, pixels)
    keys = [f"map_{i}" for i in range(len(golden.DEPTHS))] + ["pooled"]
    for key, got in zip(keys, [*out.maps, out.pooled], strict=True):
        wanted = arrays[f"{case}/{activation}/{key}"]
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_keys_are_squeezed_and_the_class_token_goes_around_the_convolutions(tiny):
    model, variables = tiny
    _, seen = jax.jit(partial(model.apply, train=False, mutable=["intermediates"]))(
        variables, image()
    )
    weights = {
        stage: seen["intermediates"][stage]["block_0"]["attention"]["attention_weights"][0]
        for stage in ("stage_1", "stage_2", "stage_3")
    }
    # Maps of 8x10, 4x5 and 2x3: every second row and column as keys, and in the last stage a
    # class token more on both sides.
    assert {stage: w.shape for stage, w in weights.items()} == {
        "stage_1": (2, 1, 80, 20),
        "stage_2": (2, 2, 20, 6),
        "stage_3": (2, 3, 1 + 6, 1 + 2),
    }


def test_training_normalises_by_the_batch_and_moves_the_running_statistics():
    x = 3 + 2 * image(shape=(4, 5, 7, 6))
    layer = ConvProjection()
    kernel = {"conv": random_variables(layer, x)["params"]["conv"]}
    # A normalisation that leaves its input alone shows what it is given.
    params = kernel | {"norm": {"scale": jnp.ones(6), "bias": jnp.zeros(6)}}
    statistics = {"norm": {"mean": jnp.zeros(6), "var": jnp.ones(6) - 1e-5}}
    variables = {"params": params, "batch_stats": statistics}
    given = jax.jit(partial(layer.apply, train=False))(variables, x)
    out, changed = jax.jit(partial(layer.apply, train=True, mutable=["batch_stats"]))(variables, x)
    mean, var = given.mean((0, 1)), given.var((0, 1))
    wanted = (given - mean[None, None]) / jnp.sqrt(var + 1e-5)[None, None]
    chex.assert_trees_all_close(out, wanted, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(
        changed["batch_stats"]["norm"],
        {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var},
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("scan", [False, True])
def test_every_running_statistic_moves_in_training(scan):
    model = TINY(scan=scan)

    variables = random_variables(model, image())
    step = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    before, after = variables["batch_stats"], step(variables, image())[1]["batch_stats"]
    chex.assert_trees_all_equal_shapes(before, after)
    assert all(
        jnp.abs(a - b).max() > 0
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_an_image_does_not_depend_on_the_others_of_its_batch(tiny):
    model, variables = tiny
    apply = jax.jit(partial(model.apply, train=False))
    both = image()
    other = both.at[1].set(image(5)[1])
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[0], apply(variables, both)),
        jax.tree.map(lambda x: x[0], apply(variables, other)),
    )


def test_scan_and_remat_change_neither_values_gradients_nor_statistics():
    small = partial(
        CvT, widths=(6,), depths=(2,), heads=(2,), kernels=(7,), strides=(4,), paddings=(2,)
    )
    x = image(shape=(2, 14, 21, 3))
    variables = random_variables(small(), x)

    def run(variables, **how):
        def loss(params):
            out, changed = small(**how).apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.sin(out.maps[0]).sum() + jnp.sin(out.pooled).sum(), changed["batch_stats"]

        (value, statistics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            variables["params"]
        )
        return value, statistics, gradient

    def stacked(tree):
        stage = dict(tree["stage_1"])
        blocks = [stage.pop(f"block_{i}") for i in range(2)]
        stage["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        return tree | {"stage_1": stage}

    close = partial(chex.assert_trees_all_close, rtol=1e-3, atol=1e-3)
    value, statistics, gradient = run(variables)
    close(run(variables, remat=True), (value, statistics, gradient))
    close(
        run({name: stacked(tree) for name, tree in variables.items()}, scan=True, remat=True),
        (value, stacked(statistics), stacked(gradient)),
    )


def test_drop_path_acts_in_the_last_stage_and_in_training_only(tiny):
    model, variables = TINY(drop_path=0.5), tiny[1]
    rngs = [{"dropout": jax.random.key(seed)} for seed in range(3)]
    train = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    first, *others = (train(variables, image(), rngs=r)[0] for r in rngs)
    chex.assert_trees_all_equal(*(out.maps[:2] for out in [first, *others]))
    assert any(jnp.abs(first.pooled - other.pooled).max() > 1e-3 for other in others)
    evaluate = jax.jit(partial(model.apply, train=False))
    chex.assert_trees_all_equal(*(evaluate(variables, image(), rngs=r) for r in rngs))


def test_bfloat16_computes_close_by_and_keeps_float32_parameters(tiny):
    model, variables = tiny
    half = TINY(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(partial(half.init, train=False), jax.random.key(0), image())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    out = jax.jit(partial(half.apply, train=False))(variables, image())
    wanted = jax.jit(partial(model.apply, train=False))(variables, image())
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}
    chex.assert_trees_all_close(
        out.maps[-1].astype(jnp.float32), wanted.maps[-1], atol=0.1, rtol=0.05
    )


def test_stages_of_unequal_number_and_images_too_small_are_refused():
    def shapes(model, *size):
        return jax.eval_shape(
            partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, *size, 3))
        )

    with pytest.raises(ValueError, match=r"depths=\(1, 2\) must name one number for each stage"):
        shapes(TINY(depths=(1, 2)), 32, 32)
    with pytest.raises(ValueError, match=r"embed_depths=\(2,\) must name one number for each"):
        shapes(TINY(embed_depths=(2,)), 32, 32)
    with pytest.raises(ValueError, match=r"embed_depths=\(1, 0, 1\) must be at least 1 each"):
        shapes(TINY(embed_depths=(1, 0, 1)), 32, 32)
    with pytest.raises(ValueError, match="2x9 pixels is smaller than the 3x3"):
        shapes(TINY(), 2, 9)
    shapes(TINY(), 3, 9)


def test_a_deeper_embedding_adds_3x3_convolutions_at_the_size_of_its_map(tiny):
    model = TINY(embed_depths=(2, 1, 3))
    pixels = image()
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), pixels)
    plain = jax.eval_shape(partial(TINY().init, train=False), jax.random.key(0), pixels)
    added = {
        f"{stage}/{name}": part["kernel"].shape
        for stage, parts in shapes["params"].items()
        for name, part in parts.items()
        if name not in plain["params"][stage] and "kernel" in part
    }
    assert added == {
        "stage_1/embed_1": (3, 3, 4, 4),
        "stage_3/embed_1": (3, 3, 12, 12),
        "stage_3/embed_2": (3, 3, 12, 12),
    }
    # With the identity for a kernel and for a batch norm, what is left of it is its ReLU.
    small, variables = TINY(depths=(0, 0, 1)), random_variables(TINY(depths=(0, 0, 1)), pixels)
    deeper = TINY(depths=(0, 0, 1), embed_depths=(2, 1, 1))
    identity = np.zeros((3, 3, 4, 4), np.float32)
    identity[1, 1] = np.eye(4)
    stage = variables["params"]["stage_1"]
    stage["embed_1"] = {"kernel": identity, "bias": np.zeros(4, np.float32)}
    stage["embed_bn_1"] = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    statistics = {"mean": np.zeros(4, np.float32), "var": np.full(4, 1 - 1e-5, np.float32)}
    variables["batch_stats"]["stage_1"] = {"embed_bn_1": statistics}

    def seen(layer, name):
        _, state = jax.jit(
            partial(layer.apply, train=False, capture_intermediates=True, mutable="intermediates")
        )(variables, pixels)
        return state["intermediates"]["stage_1"][name]["__call__"][0]

    first, further = seen(deeper, "embed"), seen(deeper, "embed_1")
    chex.assert_trees_all_close(further, jax.nn.relu(first), atol=1e-6)
    del stage["embed_1"], stage["embed_bn_1"]
    chex.assert_trees_all_equal(seen(small, "embed"), first)
