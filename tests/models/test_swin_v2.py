from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import swin_v2 as golden
from vit_jax.models import swin_v2
from vit_jax.models.swin_v2 import ContinuousBias, SwinV2, SwinV2Block
from vit_jax.pretrained import names
from vit_jax.pretrained.families.swin_v2 import HF

# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GOLDEN = Path(__file__).parents[1] / "golden" / "swin_v2_tiny.npz"


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(model, *inputs, **options):
    """Values that matter for every parameter; compiling `init` would take longer than the test."""
    shapes = jax.eval_shape(partial(model.init, **options), jax.random.key(0), *inputs)
    random = np.random.default_rng(0)

    def value(path, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 4
        return (random.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map_with_path(value, shapes)


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [
        ("swin_v2_t", 256, 28_347_154),
        ("swin_v2_s", 256, 49_728_418),
        ("swin_v2_b", 256, 87_918_816),
        ("swin_v2_l_384", 384, 196_739_932),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, size, parameters):
    model = getattr(swin_v2, name)()
    assert model.image_size == size
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
    model = SwinV2(
        golden.WIDTH,
        golden.DEPTHS,
        golden.HEADS,
        golden.WINDOW,
        pretrained_window=golden.PRETRAINED,
        image_size=golden.SIZES[0],
    )
    pixels = jax.ShapeDtypeStruct((1, 30, 41, 3), jnp.float32)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), pixels)
    variables = names.read(HF, shapes, state)  # all of both sides, or an error
    return model, jax.tree.map(lambda x: x.astype(np.float32), variables), arrays


@pytest.mark.parametrize("case", range(len(golden.SIZES)), ids=[str(s) for s in golden.SIZES])
def test_every_stage_equals_the_published_implementation(published, case):
    model, variables, arrays = published
    pixels = arrays[f"{case}/image"].astype(np.float32)
    out = quick(partial(model.apply, train=False))(variables, pixels)
    keys = [f"{case}/map_{i}" for i in range(len(golden.DEPTHS))] + [f"{case}/pooled"]
    for key, got in zip(keys, [*out.maps, out.pooled], strict=True):
        wanted = arrays[key]
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_fresh_block_returns_its_input():
    x = draw(1, 5, 7, 4)
    block = SwinV2Block(heads=2, window=4, shift=2, shifted=True)
    init = quick(partial(block.init_with_output, train=False))
    out, variables = init(jax.random.key(0), x)
    chex.assert_trees_all_equal(out, x)
    assert "bias" not in variables["params"]["attention"]["key"]


@pytest.mark.parametrize(
    ("shifted", "rows", "columns"), [(False, (0, 4), (4, 8)), (True, (2, 6), (2, 6))]
)
def test_windows_of_a_shifted_block_join_neighbours(shifted, rows, columns):
    block = SwinV2Block(heads=2, window=4, shift=2, shifted=shifted)
    x = jnp.asarray(draw(1, 8, 12, 4))
    apply = quick(partial(block.apply, random_variables(block, x, train=False), train=False))
    change = apply(x.at[0, 3, 5, 0].add(1.0)) - apply(x)
    wanted = np.zeros((8, 12), bool)
    wanted[slice(*rows), slice(*columns)] = True
    chex.assert_trees_all_equal(np.asarray(jnp.abs(change).sum(-1)[0] > 0), wanted)


def test_position_biases_are_of_the_published_form():
    layer = ContinuousBias(heads=3, window=2)
    params = random_variables(layer)["params"]
    bias = quick(layer.apply)({"params": params})
    assert bias.shape == (3, 4, 4)
    # Query 3 is one row below and one column right of key 0: 8 on both axes, log2(9) / log2(8).
    step = np.log2(9) / 3
    hidden = np.array([step, step]) @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    wanted = 16 / (1 + np.exp(-np.maximum(hidden, 0) @ params["fc2"]["kernel"]))
    chex.assert_trees_all_close(np.asarray(bias)[:, 3, 0], wanted.astype(np.float32), rtol=1e-5)


def test_a_larger_window_keeps_the_biases_of_the_one_before():
    small = ContinuousBias(heads=2, window=3)
    large = ContinuousBias(heads=2, window=5, pretrained_window=3)
    variables = random_variables(small)
    before = quick(small.apply)(variables).reshape(2, 3, 3, 3, 3)
    after = quick(large.apply)(variables).reshape(2, 5, 5, 5, 5)
    chex.assert_trees_all_close(after[:, :3, :3, :3, :3], before, rtol=1e-6)


def test_a_scanned_stage_gives_the_same_map():
    small = partial(SwinV2, width=4, depths=(2,), heads=(2,), window=2, image_size=16)
    x = draw(2, 10, 15, 3)
    params = random_variables(small(), x, train=False)["params"]
    pair = {"blocks": jax.tree.map(lambda x: x[None], params["stage_1"])}
    plain = quick(partial(small().apply, train=False))({"params": params}, x)
    scanned = quick(partial(small(scan=True).apply, train=False))(
        {"params": params | {"stage_1": pair}}, x
    )
    chex.assert_trees_all_close(scanned, plain, rtol=1e-5, atol=1e-5)


def test_drop_path_acts_in_training_only():
    x = draw(4, 8, 12, 3)
    model = SwinV2(width=4, depths=(1, 1), heads=(1, 1), window=2, image_size=16, drop_path=0.5)
    variables = random_variables(model, x, train=False)
    apply = quick(model.apply, static_argnames="train")
    rngs = [{"dropout": jax.random.key(seed)} for seed in range(4)]
    still = [apply(variables, x, train=False, rngs=r).pooled for r in rngs[:2]]
    chex.assert_trees_all_equal(*still)
    first, *others = (apply(variables, x, train=True, rngs=r).pooled for r in rngs)
    assert any(jnp.abs(first - other).max() > 1e-3 for other in others)


def test_pretrained_windows_of_unequal_number_are_refused():
    model = SwinV2(pretrained_window=(12, 6))
    with pytest.raises(ValueError, match=r"pretrained_window=\(12, 6\) must name one number"):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), draw(1, 8, 8, 3))
