from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import beit as golden
from tests.golden import vit as shared
from vit_jax.layers.position import resize_grid
from vit_jax.models import beit
from vit_jax.models.beit import Beit, relative_bias
from vit_jax.models.classifier import Classifier
from vit_jax.pretrained.families import beit as family

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = partial(Beit, patch=4, width=12, depth=2, heads=2, image_size=(8, 12))
# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def image(*size):
    return np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)


def shapes(model, *size):
    """Features and variables of a 1-image batch, without computing them."""
    pixels = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(partial(model.init_with_output, train=False), jax.random.key(0), pixels)


@cache
def random_variables(model, *size):
    """Values that matter for every parameter: at their start some are 0."""
    leaves, tree = jax.tree.flatten(shapes(model, *size)[1])
    random = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [(0.3 * random.normal(size=x.shape)).astype(np.float32) for x in leaves]
    )


@pytest.mark.parametrize(
    ("name", "parameters"), [("beit_b16", 86_530_984), ("beit_l16", 304_430_568)]
)
def test_named_sizes_have_the_published_number_of_parameters(name, parameters):
    _, variables = shapes(Classifier(getattr(beit, name)(), 1000), 224, 224)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    block = variables["params"]["backbone"]["block_0"]
    assert block["relative_position_bias"].shape[0] == 27 * 27 + 3 == 732
    assert set(block["attention"]["key"]) == {"kernel"}


@pytest.mark.parametrize("i", range(len(golden.SIZES)), ids=[str(s) for s in golden.SIZES])
def test_every_stage_equals_the_published_implementation(i):
    arrays = np.load(GOLDEN / "beit_tiny.npz")
    state = shared.state_of(arrays)
    recipe = family.from_hf(shared.config_of(arrays), {k: v.shape for k, v in state.items()})
    model = shared.model_of(recipe)
    params = shared.variables(recipe, shapes(model, *golden.SIZES[0])[1], arrays)
    apply = jax.jit(partial(model.apply, train=False, capture_intermediates=True))
    logits, seen = apply(params, arrays[f"{i}/image"].astype(np.float32))
    blocks = seen["intermediates"]["backbone"]
    pairs = [(blocks[f"block_{n}"]["__call__"][0], f"block_{n}") for n in range(2)]
    for got, name in [*pairs, (logits, "logits")]:
        wanted = arrays[f"{i}/{name}"]
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_bias_of_a_pair_is_the_row_of_its_offset_and_the_token_has_three():
    h, w, heads = 2, 3, 2
    rows = (2 * h - 1) * (2 * w - 1) + 3
    table = np.arange(rows * heads, dtype=np.float32).reshape(rows, heads)
    bias = np.asarray(quick(relative_bias, static_argnums=1)(table, (h, w)))
    wanted = np.zeros((heads, 1 + h * w, 1 + h * w))
    for query, key in np.ndindex(h * w, h * w):
        down, right = query // w - key // w, query % w - key % w
        wanted[:, 1 + query, 1 + key] = table[(down + h - 1) * (2 * w - 1) + right + w - 1]
    wanted[:, 0, :] = table[-3][:, None]
    wanted[:, :, 0] = table[-2][:, None]
    wanted[:, 0, 0] = table[-1]
    np.testing.assert_array_equal(bias, wanted)


def test_another_size_resamples_the_tables_and_leaves_the_rows_of_the_token():
    small, large = TINY(), TINY(image_size=(16, 20))
    params = dict(random_variables(small, 8, 12)["params"])
    resized = dict(params)
    for name in ("block_0", "block_1"):
        table = params[name]["relative_position_bias"]  # for 2x3 patches, then for 4x5
        offsets = resize_grid(table[:-3].reshape(3, 5, 2), (7, 9), "bilinear_torch")
        both = jnp.concatenate([offsets.reshape(-1, 2), table[-3:]])
        resized[name] = params[name] | {"relative_position_bias": both}
    pixels = image(16, 20)
    got = quick(partial(small.apply, train=False))({"params": params}, pixels)
    wanted = quick(partial(large.apply, train=False))({"params": resized}, pixels)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert got.maps[0].shape == (2, 4, 5, 12)


def test_scan_and_remat_change_neither_values_nor_gradients():
    params = dict(random_variables(TINY(), 8, 12)["params"])

    def run(model, params):
        def loss(params):
            features = model.apply({"params": params}, image(8, 12), train=False)
            return jnp.sin(features.maps[0]).sum() + features.pooled.sum()

        return quick(jax.value_and_grad(loss))(params)

    def stacked(params):
        rest = {k: v for k, v in params.items() if not k.startswith("block_")}
        blocks = [params["block_0"], params["block_1"]]
        return rest | {"blocks": jax.tree.map(lambda *x: np.stack(x), *blocks)}

    value, gradient = run(TINY(), params)
    got = run(TINY(scan=True, remat=True), stacked(params))
    chex.assert_trees_all_close(got, (value, stacked(gradient)), rtol=1e-3, atol=1e-4)
    assert np.abs(gradient["block_0"]["relative_position_bias"]).min() > 0  # no row goes unused


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({}, (9, 12), r"image size 9x12 .*patch=4 must divide .*8x12 or 12x12"),
        ({"heads": 5}, (8, 12), "heads=5 must divide the width 12"),
        ({"position_resize": "bilinaer"}, (8, 12), "resize='bilinaer' does not exist.*'bilinear'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(fields, size, message):
    with pytest.raises(ValueError, match=message):
        shapes(TINY(**fields), *size)
