from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import vit as golden
from vit_jax.layers.position import resize_grid
from vit_jax.models import vit
from vit_jax.models.classifier import Classifier
from vit_jax.models.vit import ViT

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = partial(ViT, patch=4, width=12, depth=2, heads=2, image_size=(8, 12))
# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


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


def stacked(params):
    """`block_0`, `block_1`, ... -> `blocks` with a leading axis."""
    params = dict(params)
    blocks = [params.pop(name) for name in sorted(n for n in params if n.startswith("block_"))]
    return params | {"blocks": jax.tree.map(lambda *x: np.stack(x), *blocks)}


@pytest.mark.parametrize(
    ("name", "size", "parameters", "grid"),
    [
        ("vit_ti16", 224, 5_717_416, 14),
        ("vit_s32", 224, 22_878_952, 7),
        ("vit_s16", 224, 22_050_664, 14),
        ("vit_b32", 224, 88_224_232, 7),
        ("vit_b16", 224, 86_567_656, 14),
        ("vit_b16", 384, 86_859_496, 24),
        ("vit_b8", 224, 86_576_872, 28),
        ("vit_l16", 224, 304_326_632, 14),
        ("vit_l32", 384, 306_632_680, 12),
        ("vit_h14", 224, 632_045_800, 16),
        ("vit_r50_b16", 224, 98_659_112, 14),
        ("vit_r50_b16", 384, 98_950_952, 24),
        ("vit_r50_l32", 224, 328_994_856, 7),
        ("vit_r26_s32", 224, 36_431_912, 7),
        ("vit_r_ti16", 224, 6_337_704, 7),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, size, parameters, grid):
    backbone = getattr(vit, name)(image_size=size)
    _, variables = shapes(Classifier(backbone, 1000), size, size)
    assert count(variables) == parameters
    head = variables["params"]["head"]
    assert head["kernel"].shape == (backbone.width, 1000)
    assert variables["params"]["backbone"]["position"]["grid"].shape[:2] == (grid, grid)


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [
        ("vit_b16", 224, 85_798_656),
        ("vit_b16", 384, 86_090_496),
        ("vit_l16", 224, 303_301_632),
        ("vit_h14", 224, 630_764_800),
    ],
)
def test_backbones_alone_have_the_published_number_of_parameters(name, size, parameters):
    features, variables = shapes(getattr(vit, name)(image_size=size), size, size)
    assert count(variables) == parameters
    width = features.pooled.shape[1]
    assert features.maps[0].shape == (1, *variables["params"]["position"]["grid"].shape[:2], width)


@pytest.mark.parametrize(
    ("name", "i"), [(n, i) for n, case in golden.CASES.items() for i in range(len(case.sizes))]
)
def test_every_stage_equals_the_published_implementation(name, i):
    case, arrays = golden.CASES[name], np.load(GOLDEN / f"{name}.npz")
    pixels = arrays[f"{i}/image"].astype(np.float32)
    recipe = golden.recipe(name, arrays)
    assert recipe.backbone["pooling"] == case.pooling
    model = golden.model_of(recipe)
    params = golden.variables(recipe, shapes(model, *case.sizes[0])[1], arrays)
    apply = jax.jit(partial(model.apply, train=False, capture_intermediates=True))
    logits, state = apply(params, pixels)
    seen = state["intermediates"]["backbone"]
    compared = 0
    for path in (k.removeprefix(f"{i}/") for k in arrays if k.startswith(f"{i}/")):
        if path == "image":
            continue
        got = seen
        for part in path.split("/"):
            got = got.get(part, {})
        got = logits if path == "head" else got["__call__"][0]
        wanted = arrays[f"{i}/{path}"]
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        compared += 1
    assert compared == 3 + golden.DEPTH + (0 if case.stem is None else max(len(case.stem), 1))


@pytest.mark.parametrize(
    ("name", "registers", "parameters"),
    [
        ("dinov2_s14", 0, 22_056_192),
        ("dinov2_s14", 4, 22_057_728),
        ("dinov2_b14", 0, 86_579_712),
        ("dinov2_l14", 0, 304_367_616),
        ("dinov2_g14", 0, 1_136_479_232),
    ],
)
def test_dinov2_has_the_published_number_of_parameters(name, registers, parameters):
    model = getattr(vit, name)(registers=registers)
    features, variables = shapes(model, 42, 56)
    assert count(variables) == parameters
    assert features.maps[0].shape == (1, 3, 4, model.width)  # no token among the patches
    assert variables["params"]["position"]["grid"].shape[:2] == (37, 37)


def test_the_map_is_in_reading_order_and_the_token_is_apart():
    model = TINY()
    variables = random_variables(model, 8, 12)
    apply = quick(partial(model.apply, train=False, capture_intermediates=True))
    features, state = apply(variables, image(8, 12))
    tokens = state["intermediates"]["norm"]["__call__"][0]
    assert tokens.shape == (2, 1 + 2 * 3, 12)
    chex.assert_trees_all_equal(features.pooled, tokens[:, 0])
    chex.assert_trees_all_equal(features.maps[0][:, 1, 0], tokens[:, 1 + 3])
    embedded = np.asarray(state["intermediates"]["embed"]["__call__"][0])
    position = variables["params"]["position"]
    before = state["intermediates"]["dropout"]["__call__"][0]
    place = embedded[:, 1, 2] + position["grid"][1, 2]
    chex.assert_trees_all_close(before[:, 6], place, rtol=1e-6)
    token = variables["params"]["class_token"][:, 0] + position["token"]
    chex.assert_trees_all_close(before[:, 0], np.broadcast_to(token, (2, 12)), rtol=1e-6)


def test_each_pooling_reads_its_tokens():
    found = {}
    for pooling in vit.POOLINGS:
        model = TINY(pooling=pooling, distilled=pooling == "token", registers=2, depth=1)
        variables = random_variables(model, 8, 12)
        apply = quick(partial(model.apply, train=False, capture_intermediates=True))
        features, state = apply(variables, image(8, 12))
        state = state["intermediates"]
        last, normal = state["block_0"]["__call__"][0], state["norm"]["__call__"][0]
        found[pooling] = features.pooled
        tokens = {"mean": 0, "attention": 0, "token": 2, "tokens": 2}.get(pooling, 1)
        assert last.shape == (2, tokens + 2 + 6, 12)  # two registers, six patches
        assert features.maps[0].shape == (2, 2, 3, 12)
        patches = features.maps[0].reshape(2, 6, 12)
        if pooling == "mean_norm":  # only the mean is normalised
            chex.assert_trees_all_equal(patches, last[:, -6:])
            chex.assert_trees_all_equal(features.pooled, normal)
            mean = np.asarray(patches.mean(1))
            unit = (mean - mean.mean(-1, keepdims=True)) / mean.std(-1, keepdims=True)
            norm = variables["params"]["norm"]
            wanted = unit * norm["scale"][None] + norm["bias"][None]
        elif pooling == "attention":  # what it gathers: tests/layers/test_attention_pool.py
            chex.assert_trees_all_equal(patches, normal[:, -6:])
            wanted = state["attention_pool"]["__call__"][0]
        else:
            chex.assert_trees_all_equal(patches, normal[:, -6:])
            parts = {
                "token": [normal[:, 0]],
                "mean": [patches.mean(1)],
                "token+mean": [normal[:, 0], patches.mean(1)],
                "tokens": [normal[:, 0], normal[:, 1]],
            }[pooling]
            wanted = jnp.concatenate(parts, -1)
        chex.assert_trees_all_close(features.pooled, wanted, rtol=1e-4, atol=1e-4)
    assert {k: v.shape[1] for k, v in found.items() if v.shape[1] != 12} == {
        "token+mean": 24,
        "tokens": 24,
    }


def test_registers_and_tokens_may_go_without_positions():
    model = TINY(registers=3, class_position=False, distilled=True)
    variables = random_variables(model, 8, 12)
    params = variables["params"]
    assert set(params["position"]) == {"grid"}
    apply = quick(partial(model.apply, train=False, capture_intermediates=True))
    before = apply(variables, image(8, 12))[1]["intermediates"]["dropout"]["__call__"][0]
    names = ("class_token", "distillation_token", "register_token")
    leading = np.concatenate([params[name] for name in names], 1)
    assert leading.shape == (1, 5, 12)
    chex.assert_trees_all_equal(before[:, :5], np.broadcast_to(leading, (2, 5, 12)))


def test_sincos_positions_of_big_vision_end_at_the_lowest_frequency():
    x, wanted = np.zeros((1, 4, 8, 3), np.float32), [0.0, 1e-4]  # sines of column 1: 1, 1e-4
    model = TINY(positions="sincos_closed", pooling="mean", width=8, depth=1)
    variables = jax.tree.map(np.zeros_like, random_variables(model, 4, 8))
    apply = partial(model.apply, train=False, capture_intermediates=True)
    before = quick(apply)(variables, x)[1]["intermediates"]["dropout"]["__call__"][0]
    chex.assert_trees_all_close(before[0, :, 1], np.array(wanted, np.float32), rtol=1e-5)


def test_mean_pooling_averages_the_map_and_has_no_token():
    model = TINY(pooling="mean")
    variables = random_variables(model, 8, 12)
    assert "class_token" not in variables["params"]
    assert set(variables["params"]["position"]) == {"grid"}
    features = quick(partial(model.apply, train=False))(variables, image(8, 12))
    chex.assert_trees_all_close(features.pooled, features.maps[0].mean((1, 2)), rtol=1e-5)


def test_another_size_resamples_learned_positions_and_leaves_the_token():
    small, large = TINY(), TINY(image_size=(16, 20))
    params = dict(random_variables(small, 8, 12)["params"])
    resized = params | {
        "position": {
            "grid": resize_grid(params["position"]["grid"], (4, 5), "align_corners"),
            "token": params["position"]["token"],
        }
    }
    pixels = image(16, 20)
    got = quick(partial(small.apply, train=False))({"params": params}, pixels)
    wanted = quick(partial(large.apply, train=False))({"params": resized}, pixels)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert got.maps[0].shape == (2, 4, 5, 12)


def test_without_positions_in_sight_patches_could_be_shuffled_but_sincos_sees_them():
    model = TINY(positions="sincos", pooling="mean", depth=1)
    variables = random_variables(model, 8, 12)
    assert "position" not in variables["params"]
    apply = quick(partial(model.apply, train=False))
    same = np.broadcast_to(image(4, 4)[:, None, :, None], (2, 2, 4, 3, 4, 3)).reshape(2, 8, 12, 3)
    grid = np.asarray(apply(variables, same).maps[0]).reshape(2, 6, 12)  # one patch, six times
    distance = np.abs(grid[:, :, None] - grid[:, None]).max(-1)
    assert (distance + np.eye(6)).min() > 1e-3


def test_scan_and_remat_change_neither_values_nor_gradients():
    params = random_variables(TINY(), 8, 12)["params"]

    @partial(quick, static_argnums=0)
    def run(model, params):
        def loss(params):
            key = {"dropout": jax.random.key(3)}
            features = model.apply({"params": params}, image(8, 12), train=True, rngs=key)
            return jnp.sin(features.maps[0]).sum() + features.pooled.sum()

        return jax.value_and_grad(loss)(params)

    close = partial(chex.assert_trees_all_close, rtol=1e-3, atol=1e-4)
    # Recomputed blocks drop what they dropped before; a scan draws its own random numbers.
    drops = run(TINY(drop_path=0.5, dropout=0.1), params)
    close(run(TINY(drop_path=0.5, dropout=0.1, remat=True), params), drops)
    value, gradient = run(TINY(), params)
    assert abs(value - drops[0]) > 1e-2
    close(run(TINY(scan=True, remat=True), stacked(params)), (value, stacked(gradient)))


def test_drop_path_drops_the_last_block_in_training_only_with_and_without_scan():
    params = random_variables(TINY(), 8, 12)["params"]
    alone = {name: value for name, value in params.items() if name != "block_1"}
    wanted = quick(partial(TINY(depth=1).apply, train=False))({"params": alone}, image(8, 12))
    for scan in (False, True):
        # The first block always counts; the second is gone, up to one draw in a thousand.
        model = TINY(drop_path=0.999, scan=scan)
        variables = {"params": stacked(params) if scan else params}
        apply = quick(model.apply, static_argnames="train")
        rngs = {"dropout": jax.random.key(0)}
        dropped = apply(variables, image(8, 12), train=True, rngs=rngs)
        chex.assert_trees_all_close(dropped, wanted, rtol=1e-4, atol=1e-5)
        whole = apply(variables, image(8, 12), train=False, rngs=rngs)
        assert jnp.abs(whole.maps[0] - wanted.maps[0]).max() > 1e-2


def test_bfloat16_computes_close_by_and_keeps_float32_parameters():
    half, full = TINY(dtype=jnp.bfloat16, depth=1), TINY(depth=1)
    variables = random_variables(full, 8, 12)
    got = quick(partial(half.apply, train=False))(variables, image(8, 12))
    wanted = quick(partial(full.apply, train=False))(variables, image(8, 12))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    got = jax.tree.map(lambda x: x.astype(jnp.float32), got)
    chex.assert_trees_all_close(got, wanted, atol=0.1)
    assert jnp.abs(wanted.pooled).max() > 0.5
    hybrid = TINY(dtype=jnp.bfloat16, stem=(1,), stem_width=32, patch=1)
    for model in (half, hybrid):
        features, variables = shapes(model, 8, 12)
        assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        assert {x.dtype for x in jax.tree.leaves(features)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({}, (9, 12), r"image size 9x12 .*patch=4 must divide .*8x12 or 12x12"),
        ({"image_size": (8, 3)}, (8, 12), r"image size 8x3 .*nearest sizes that fit: 8x4"),
        (
            {"stem": (1, 1), "patch": 3, "stem_width": 32},
            (48, 50),
            r"image size 48x50 .*patch=3 on a map of 1/8 .*48x48 or 48x72",
        ),
        ({"heads": 5}, (8, 12), "heads=5 must divide the width 12"),
        ({"pooling": "toke"}, (8, 12), "pooling='toke' does not exist.*'token'"),
        ({"feed_forward": "swglu"}, (8, 12), "feed_forward='swglu' does not exist.*'swiglu'"),
        (
            {"stem": (1,), "stem_width": 32, "patch": 1, "stem_source": "tim"},
            (8, 12),
            "stem_source='tim' does not exist.*'timm'",
        ),
        ({"positions": "sin"}, (8, 12), "positions='sin' does not exist.*sincos"),
        ({"position_resize": "bicubik"}, (8, 12), "resize='bicubik' does not exist.*'bicubic'"),
        ({"activation": "gelo"}, (8, 12), "activation='gelo' does not exist.*'gelu'"),
        ({"positions": "sincos", "width": 18}, (8, 12), "that 4 divides, not 18"),
        ({"stem": (1, 0), "stem_width": 32, "patch": 1}, (8, 12), r"stem=\(1, 0\) must name"),
        ({"stem": (1,), "stem_width": 48, "patch": 1}, (8, 12), "stem_width=48 .*32 groups"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(fields, size, message):
    with pytest.raises(ValueError, match=message):
        shapes(TINY(**fields), *size)
