from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import swin as golden
from vit_jax import programs
from vit_jax.models import swin
from vit_jax.models.swin import PatchMerging, Swin, SwinBlock
from vit_jax.pretrained import names
from vit_jax.pretrained.families.swin import HF

GOLDEN = Path(__file__).parents[1] / "golden" / "swin_tiny.npz"
TINY = partial(Swin, width=8, depths=(2, 2), heads=(2, 4), window=2)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def image(seed=0, shape=(2, 18, 23, 3)):
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
    ("name", "size", "parameters"),
    [
        ("swin_t", 224, 28_288_354),
        ("swin_s", 224, 49_606_258),
        ("swin_b", 224, 87_768_224),
        ("swin_l", 224, 196_532_476),
        ("swin_b_384", 384, 87_903_584),
        ("swin_l_384", 384, 196_735_516),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, size, parameters):
    model = getattr(swin, name)()
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    features, variables = jax.eval_shape(
        partial(model.init_with_output, train=False), jax.random.key(0), pixels
    )
    width = features.pooled.shape[-1]
    assert count(variables) + 1000 * (width + 1) == parameters  # with a head for 1,000 classes
    sides = [size // 4, size // 8, size // 16, size // 32]
    assert [m.shape for m in features.maps] == [
        (1, side, side, model.width * 2**i) for i, side in enumerate(sides)
    ]


@pytest.fixture(scope="module")
def published():
    arrays = np.load(GOLDEN)
    state = {k.removeprefix("state/"): arrays[k] for k in arrays if k.startswith("state/")}
    model = Swin(golden.WIDTH, golden.DEPTHS, golden.HEADS, golden.WINDOW)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image())
    variables = names.read(HF, shapes, state)  # all of both sides, or an error
    return model, jax.tree.map(lambda x: x.astype(np.float32), variables), arrays


@pytest.mark.parametrize("case", range(len(golden.SIZES)), ids=[str(s) for s in golden.SIZES])
def test_every_stage_equals_the_published_implementation(published, case):
    model, variables, arrays = published
    pixels = arrays[f"{case}/image"].astype(np.float32)
    out = jax.jit(partial(model.apply, train=False))(variables, pixels)
    keys = [f"{case}/map_{i}" for i in range(len(golden.DEPTHS))] + [f"{case}/pooled"]
    for key, got in zip(keys, [*out.maps, out.pooled], strict=True):
        wanted = arrays[key]
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_parameters_do_not_depend_on_the_image_size():
    def shapes(height, width):
        pixels = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        return jax.eval_shape(partial(Swin().init, train=False), jax.random.key(0), pixels)

    chex.assert_trees_all_equal_shapes(shapes(1, 3), shapes(30, 50), shapes(300, 230))


def test_a_small_map_is_shifted_only_where_that_was_published():
    def reach(shape, **fields):
        """How many pixels change when the first does, with windows of 4."""
        block = SwinBlock(heads=2, window=4, shifted=True, **fields)
        x = image(shape=(1, *shape, 4))
        apply = jax.jit(partial(block.apply, random_variables(block, x), train=False))
        change = apply(x.at[0, 0, 0, 0].add(1.0)) - apply(x)
        return int((jnp.abs(change).sum(-1) > 0).sum())

    assert reach((4, 4)) == 16  # one window, not shifted
    assert reach((4, 4), always_shift=True) == 4  # the quarter before the shift
    assert reach((3, 4)) == 9  # a window of 3
    assert reach((3, 4), always_shift=True) == 4  # padded to 4


def block_and_reach(shifted):
    """Which pixels of an 8x12 map change when pixel (3, 5) does, with windows of 4."""
    block = SwinBlock(heads=2, window=4, shifted=shifted)
    x = image(shape=(1, 8, 12, 4))
    apply = jax.jit(partial(block.apply, random_variables(block, x), train=False))
    change = apply(x.at[0, 3, 5, 0].add(1.0)) - apply(x)
    return np.asarray(jnp.abs(change).sum(-1)[0] > 0)


def test_regular_windows_keep_to_themselves():
    wanted = np.zeros((8, 12), bool)
    wanted[0:4, 4:8] = True
    chex.assert_trees_all_equal(block_and_reach(shifted=False), wanted)


def test_shifted_windows_join_neighbours():
    wanted = np.zeros((8, 12), bool)
    wanted[2:6, 2:6] = True
    chex.assert_trees_all_equal(block_and_reach(shifted=True), wanted)


def test_a_map_no_larger_than_the_window_is_not_shifted():
    x = image(shape=(1, 3, 5, 4))
    variables = random_variables(SwinBlock(heads=2, window=3), x)
    regular, shifted = (
        jax.jit(partial(SwinBlock(heads=2, window=3, shifted=s).apply, train=False))(variables, x)
        for s in (False, True)
    )
    chex.assert_trees_all_equal(regular, shifted)


def test_patch_merging_lays_columns_of_neighbours_side_by_side():
    x = jnp.arange(1.0, 7.0).reshape(1, 2, 3, 1) ** 2  # an odd width: a column of zeros is added
    norm = {"scale": jnp.array([1.0, 2, 3, 4]), "bias": jnp.array([0.1, 0.2, 0.3, 0.4])}
    kernel = jnp.array([[1.0, -1], [2, 0], [0, 3], [5, 1]])
    params = {"norm": norm, "reduction": {"kernel": kernel}}
    out = PatchMerging().apply({"params": params}, x)
    assert out.shape == (1, 1, 2, 2)
    for place, pixels in enumerate([[1, 16, 4, 25], [9, 36, 0, 0]]):
        four = np.array(pixels, np.float32)
        four = (four - four.mean()) / np.sqrt(four.var() + 1e-5) * norm["scale"] + norm["bias"]
        chex.assert_trees_all_close(out[0, 0, place], four @ kernel, rtol=1e-5, atol=1e-5)


def test_pooled_is_the_mean_of_the_normalised_last_map(tiny):
    model, variables = tiny
    out = jax.jit(partial(model.apply, train=False))(variables, image())
    assert [m.shape for m in out.maps] == [(2, 5, 6, 8), (2, 3, 3, 16)]
    last = np.asarray(out.maps[-1])
    normal = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
    norm = variables["params"]["norm"]
    wanted = normal.mean((1, 2)) * norm["scale"][None] + norm["bias"][None]
    chex.assert_trees_all_close(out.pooled, wanted, rtol=1e-4, atol=1e-5)


def test_an_image_does_not_depend_on_the_others_of_its_batch(tiny):
    model, variables = tiny
    apply = jax.jit(partial(model.apply, train=False))
    both = image()
    other = both.at[1].set(image(5)[1])
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[0], apply(variables, both)),
        jax.tree.map(lambda x: x[0], apply(variables, other)),
    )


def test_scan_and_remat_change_neither_values_nor_gradients():
    small = partial(Swin, width=4, depths=(2,), heads=(2,), window=2)
    x = image(shape=(2, 10, 15, 3))
    params = random_variables(small(), x)["params"]

    def run(params, **how):
        def loss(params):
            out = small(**how).apply({"params": params}, x, train=False)
            return jnp.sin(out.maps[0]).sum() + jnp.sin(out.pooled).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    def stacked(params):  # one pair of blocks, with an axis in front
        return params | {"stage_1": {"blocks": jax.tree.map(lambda x: x[None], params["stage_1"])}}

    close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)
    value, gradient = run(params)
    close(run(params, remat=True), (value, gradient))
    close(run(stacked(params), scan=True, remat=True), (value, stacked(gradient)))


def test_a_scanned_stage_runs_its_pairs_in_order():
    x = image(shape=(1, 9, 14, 3))
    plain = Swin(width=4, depths=(4,), heads=(2,), window=2, patch=2)
    params = random_variables(plain, x)["params"]
    blocks = [params["stage_1"][f"block_{i}"] for i in range(4)]
    pairs = [{"block_0": blocks[i], "block_1": blocks[i + 1]} for i in (0, 2)]
    stage = {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)}
    wanted = jax.jit(partial(plain.apply, train=False))({"params": params}, x)
    got = jax.jit(partial(plain.clone(scan=True).apply, train=False))(
        {"params": params | {"stage_1": stage}}, x
    )
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path_acts_in_training_only(scan):
    x = image()
    model = TINY(drop_path=0.5, scan=scan)
    variables = random_variables(model, x)
    apply = jax.jit(model.apply, static_argnames="train")
    rngs = [{"dropout": jax.random.key(seed)} for seed in range(3)]
    still = [apply(variables, x, train=False, rngs=r).pooled for r in rngs]
    chex.assert_trees_all_equal(*still)
    first, *others = (apply(variables, x, train=True, rngs=r).pooled for r in rngs)
    assert any(jnp.abs(first - other).max() > 1e-3 for other in others)


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


def test_stages_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match=r"heads=\(2,\) must name one number for each stage"):
        jax.eval_shape(partial(TINY(heads=(2,)).init, train=False), jax.random.key(0), image())


def test_padding_of_zeros_leaves_the_gradient_of_a_fresh_model_as_large_as_it_was():
    model = TINY(depths=(1, 1), heads=(1, 1))
    full = image(shape=(1, 16, 16, 3))
    half = full.at[:, 8:].set(0)

    @jax.jit
    def norm_of_gradient(variables, pixels):
        def loss(variables):
            return model.apply(variables, pixels, train=False).maps[-1].var()

        gradient = jax.grad(loss)(variables)
        return jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))

    init = jax.jit(partial(model.init, train=False)).lower(jax.random.key(0), full)
    variables = init.compile(programs.once("cpu"))(jax.random.key(0), full)
    assert norm_of_gradient(variables, half) < 10 * norm_of_gradient(variables, full)
