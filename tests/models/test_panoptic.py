from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import detr as golden
from vit_jax.models import panoptic
from vit_jax.models.panoptic import DETRPanoptic, MaskAttention, MaskHead
from vit_jax.models.resnet import ResNet
from vit_jax.pretrained import names
from vit_jax.pretrained.families.detr import HF

# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GOLDEN = Path(__file__).parents[1] / "golden" / "detr_tiny.npz"


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(model, *inputs):
    """Values that matter for every parameter; compiling `init` would take longer than the test."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)


def test_the_named_size_has_the_published_number_of_parameters():
    pixels = jax.ShapeDtypeStruct((1, 132, 164, 3), jnp.float32)
    out, variables = jax.eval_shape(
        partial(panoptic.detr_r50_panoptic().init_with_output, train=False),
        jax.random.key(0),
        pixels,
    )
    params = variables["params"]

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert count(params) == 42_899_288
    assert count(params["mask_attention"]) == 131_584
    assert count(params["mask_head"]) == 1_202_073
    assert out["logits"].shape == (1, 100, 251)
    assert out["masks"].shape == (1, 100, 33, 41)


def test_every_part_equals_the_published_implementation():
    arrays = np.load(GOLDEN)
    state = {k.removeprefix("state/"): arrays[k] for k in arrays if k.startswith("state/")}
    model = DETRPanoptic(
        ResNet(golden.DEPTHS, width=golden.ROOT, norm="frozen"),
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
    table = HF[True, False]
    variables = names.read(table, shapes, state)  # all of both sides, or an error
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    run = partial(model.apply, train=False, capture_intermediates=True, mutable=["intermediates"])
    out, seen = quick(run)(variables, image, mask)
    stages = {"projected": "input_proj", "memory": "encoder_1"}
    stages |= {name: name for name in ("decoder_0", "mask_attention")}
    parts = {k: seen["intermediates"][name]["__call__"][0] for k, name in stages.items()}
    for key, got in (parts | out).items():
        wanted = arrays[key]
        got = np.reshape(got, wanted.shape)  # pixels may be in rows, or one after the other
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_the_weights_of_a_query_sum_to_one_over_heads_and_real_pixels():
    query, memory = draw(2, 3, 8), draw(2, 4, 5, 8, seed=1)
    seen = np.ones((2, 4, 5), bool)
    seen[1, :, 3:] = False
    layer = MaskAttention(heads=2)
    variables = random_variables(layer, query, memory, seen)
    weights = quick(layer.apply)(variables, query, memory, seen)
    assert weights.shape == (2, 3, 4, 5, 2)
    chex.assert_trees_all_close(weights.sum((2, 3, 4)), np.ones((2, 3), np.float32), rtol=1e-5)
    assert np.all(weights[1, :, :, 3:] == 0)
    by_head = weights.sum((2, 3))  # heads compete: theirs is no equal share
    assert np.abs(by_head - 0.5).max() > 0.05


def test_each_query_has_a_mask_of_its_own():
    projected, finer = draw(2, 3, 4, 16), [draw(2, 2 * 3**i, 5 * i + 4, 3) for i in (1, 2, 3)]
    attention = np.abs(draw(2, 3, 3, 4, 8, seed=2))
    head = MaskHead(width=16)
    variables = random_variables(head, projected, attention, finer)
    run = quick(head.apply)
    masks = run(variables, projected, attention, finer)
    assert masks.shape == (2, 3, *finer[-1].shape[1:3])
    order = np.array([2, 0, 1])
    moved = run(variables, projected, attention[:, order], finer)
    chex.assert_trees_all_close(moved, masks[:, order], rtol=1e-4, atol=1e-4)
    other = run(variables, projected, attention, [np.roll(x, 1, 0) for x in finer])
    assert np.abs(other - masks).max() > 1e-2  # the finer maps are those of each image


def test_a_backbone_of_three_maps_is_refused():
    model = DETRPanoptic(ResNet((1, 1, 1), width=2, norm="frozen"), 3, 4, 16, 2, 8, 1, 1)
    with pytest.raises(ValueError, match="a backbone with 4 maps, not 3"):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), draw(1, 32, 40, 3))
