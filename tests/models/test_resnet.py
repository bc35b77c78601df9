import re
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import resnet as golden
from vit_jax import programs
from vit_jax.layers import portions
from vit_jax.layers.convolution import Conv
from vit_jax.models import resnet
from vit_jax.models.resnet import FrozenBatchNorm, ResNet
from vit_jax.pretrained import names
from vit_jax.pretrained.families.resnet import HF

# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GOLDEN = Path(__file__).parents[1] / "golden"
TINY = partial(ResNet, width=4, depths=(1, 2))


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


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet_18", 11_689_512),
        ("resnet_26", 15_995_176),
        ("resnet_34", 21_797_672),
        ("resnet_50", 25_557_032),
        ("resnet_101", 44_549_160),
        ("resnet_152", 60_192_808),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, parameters):
    model = getattr(resnet, name)()
    pixels = jax.ShapeDtypeStruct((1, 224, 240, 3), jnp.float32)
    features, variables = jax.eval_shape(
        partial(model.init_with_output, train=False), jax.random.key(0), pixels
    )
    width = features.pooled.shape[-1]
    # With a head for 1,000 classes.
    assert count(variables["params"]) + 1000 * (width + 1) == parameters
    sides = [(56, 60), (28, 30), (14, 15), (7, 8)]
    assert [m.shape for m in features.maps] == [
        (1, *side, width // 8 * 2**i) for i, side in enumerate(sides)
    ]


def test_the_frozen_backbone_of_detr_has_its_published_numbers():
    model = resnet.resnet_50(norm="frozen", dilation=2)
    pixels = jax.ShapeDtypeStruct((1, 231, 199, 3), jnp.float32)
    features, variables = jax.eval_shape(
        partial(model.init_with_output, train=True), jax.random.key(0), pixels
    )
    assert (count(variables["params"]), count(variables["batch_stats"])) == (23_454_912, 106_240)
    assert [m.shape[1:3] for m in features.maps] == [(58, 50), (29, 25), (15, 13), (15, 13)]


@pytest.mark.parametrize("norm", resnet.NORMS)
@pytest.mark.parametrize("block", golden.BLOCKS)
def test_every_stage_equals_the_published_implementation(block, norm):
    arrays = np.load(GOLDEN / f"resnet_{block}.npz")
    state = {k.removeprefix("state/"): arrays[k] for k in arrays if k.startswith("state/")}
    model = ResNet(golden.DEPTHS, block, golden.WIDTH, norm)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), draw(1, 32, 40, 3))
    variables = names.read(HF, shapes, state)  # all of both sides, or an error
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    for case in range(len(golden.SIZES)):
        pixels = arrays[f"{case}/image"].astype(np.float32)
        out = quick(partial(model.apply, train=False))(variables, pixels)
        keys = [f"{case}/map_{i}" for i in range(len(golden.DEPTHS))] + [f"{case}/pooled"]
        for key, got in zip(keys, [*out.maps, out.pooled], strict=True):
            wanted = arrays[key]
            chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_dilated_convolution_sees_every_second_pixel():
    x = draw(1, 9, 7, 3)
    dilated, plain = Conv(4, 3, dilation=2), Conv(4, 3)
    variables = random_variables(dilated, x)
    out = quick(dilated.apply)(variables, x)
    assert out.shape == (1, 9, 7, 4)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):  # each quarter of the pixels by itself
        part = quick(plain.apply)(variables, x[:, row::2, column::2])
        chex.assert_trees_all_close(out[:, row::2, column::2], part, rtol=1e-4, atol=1e-5)


def test_dilation_keeps_the_map_and_leaves_the_first_block_as_it_is():
    x = draw(1, 33, 42, 3)
    variables = random_variables(TINY(), x, train=False)

    def run(model, depths):
        params = {k: dict(v) for k, v in variables["params"].items()}
        model = model.clone(depths=depths)
        return quick(partial(model.apply, train=False))(variables | {"params": params}, x).maps

    # One block: the dilated network is the strided one, before every second pixel is left out.
    strided, kept = (run(TINY(dilation=d), (1, 1)) for d in (1, 2))
    assert [m.shape[1:3] for m in strided] == [(9, 11), (5, 6)]
    assert [m.shape[1:3] for m in kept] == [(9, 11), (9, 11)]
    chex.assert_trees_all_close(kept[1][:, ::2, ::2], strided[1], rtol=1e-4, atol=1e-5)
    # Two blocks: still so, since the second looks at every second pixel where the first did not.
    strided, kept = (run(TINY(dilation=d), (1, 2)) for d in (1, 2))
    chex.assert_trees_all_close(kept[1][:, ::2, ::2], strided[1], rtol=1e-4, atol=1e-5)


def test_training_moves_the_running_statistics_by_a_tenth():
    x = draw(4, 10, 14, 3)
    model = ResNet(width=2, depths=(1,), block="basic")
    variables = random_variables(model, x, train=False)
    train = quick(partial(model.apply, train=True, mutable=["batch_stats"]))
    _, changed = train(variables, x)
    given = quick(Conv(2, 7, 2, use_bias=False).apply)(
        {"params": variables["params"]["root_conv"]}, x
    )
    before, after = variables["batch_stats"]["root_norm"], changed["batch_stats"]["root_norm"]
    wanted = {"mean": given.mean((0, 1, 2)), "var": given.var((0, 1, 2))}
    wanted = {k: 0.9 * before[k] + 0.1 * v for k, v in wanted.items()}
    chex.assert_trees_all_close(dict(after), wanted, rtol=1e-3, atol=1e-4)


def test_frozen_norms_are_constants_in_training():
    x = draw(2, 3, 5, 4)
    layer = FrozenBatchNorm()
    variables = random_variables(layer, x)
    assert set(variables) == {"batch_stats"}  # nothing that an optimizer is given
    out, changed = quick(partial(layer.apply, mutable=["batch_stats"]))(variables, x)
    chex.assert_trees_all_equal(changed["batch_stats"], variables["batch_stats"])
    mean, var, scale, bias = (
        variables["batch_stats"][k][None, None, None] for k in ("mean", "var", "scale", "bias")
    )
    wanted = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    chex.assert_trees_all_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_remat_changes_no_gradient():
    x = draw(2, 12, 17, 3)
    model = ResNet(width=2, depths=(2,), block="basic")
    variables = random_variables(model, x, train=False)

    def gradient(model):
        def loss(params):
            out, changed = model.apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.sin(out.pooled).sum(), changed

        return quick(jax.grad(loss, has_aux=True))(variables["params"])

    chex.assert_trees_all_close(
        gradient(model.clone(remat=True)), gradient(model), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("norm", resnet.NORMS)
def test_early_stages_by_portions_are_those_of_the_whole_batch(norm, monkeypatch):
    model = ResNet(width=2, depths=(1, 1, 1), block="basic", norm=norm, dilation=2)
    x = draw(4, 33, 18, 3)
    variables = random_variables(model, x, train=False)

    def run(x, variables):
        out = model.apply(variables, x, train=False)
        return jnp.sin(out.pooled).sum(), out

    results = []
    for largest in (2 * 2 * 17 * 9 * 4, 0):  # two pictures at a time, and all at once
        monkeypatch.setattr(portions, "LARGEST", largest)
        function = jax.value_and_grad(lambda *args: run(*args), has_aux=True)
        traced = jax.jit(function).trace(x, variables)
        loops = "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()
        assert loops == (largest > 0)
        results.append(quick(function)(x, variables))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_an_image_may_be_one_pixel_high():
    model = ResNet(width=2, depths=(1, 1, 1), block="basic")
    x = draw(2, 1, 40, 3)
    variables = random_variables(model, x, train=False)
    out = jax.eval_shape(partial(model.apply, train=False), variables, x)
    assert [m.shape[1:3] for m in out.maps] == [(1, 10), (1, 5), (1, 3)]


def test_who_looks_into_the_stages_sees_all_of_them():
    model = ResNet(width=2, depths=(1, 1, 1), block="basic")
    x = draw(2, 16, 20, 3)
    apply = partial(model.apply, train=False, capture_intermediates=True)
    variables = random_variables(model, x, train=False)
    _, seen = jax.eval_shape(apply, variables, x)
    names = {"root_conv", "root_norm", "stage_1", "stage_2", "stage_3", "__call__"}
    assert set(seen["intermediates"]) == names


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says how a CPU's compiler fuses")
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_block_reads_its_shortcut_and_not_what_each_block_before_it_has_added(block):
    model = ResNet(width=8, depths=(6,), block=block)
    x = jax.ShapeDtypeStruct((2, 52, 68, 3), jnp.float32)
    apply = partial(model.apply, train=False)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    program = jax.jit(apply).lower(variables, x).compile(programs.options("cpu"))
    entry = program.as_text().partition("\nENTRY")[2]
    width = 32 if block == "bottleneck" else 8
    wide = rf"f32\[(?:2,13,17|{2 * 13 * 17}),{width}\]"  # maps of a block's end
    maps = set(re.findall(rf"(%[\w.\-]+) = {wide}", entry))
    kernels = (line.partition(" fusion(")[2] for line in entry.splitlines())
    read = [len(maps & set(re.findall(r"%[\w.\-]+", operands))) for operands in kernels]
    assert len(maps) >= 12  # a convolution's and the sum in each block
    assert max(read) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"norm": "frosen"}, "norm='frosen' does not exist. Did you mean 'frozen'"),
        ({"block": "basics"}, "block='basics' does not exist. Did you mean 'basic'"),
        ({"dilation": 4}, "dilation=4 must be 1 or 2"),
        ({"depths": (2, 0)}, r"depths=\(2, 0\) must name at least one block"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(
            partial(ResNet(**fields).init, train=False), jax.random.key(0), draw(1, 8, 8, 3)
        )
