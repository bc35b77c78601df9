from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax.data.patches import HidePatches
from vit_jax.models import masked
from vit_jax.models.beit import Beit, beit_b16
from vit_jax.models.cvt import CvT
from vit_jax.models.masked import MAE, MaskedPatches, SimMIM, hidden_count
from vit_jax.models.swin import Swin
from vit_jax.models.swin_v2 import SwinV2
from vit_jax.models.vit import ViT, vit_b16

SIZE = (12, 20)  # 3x5 patches of 4x4
VIT = partial(ViT, patch=4, width=8, depth=1, heads=2, mlp_ratio=2.0, image_size=SIZE)
SWIN = {"patch": 2, "width": 8, "depths": (2, 1), "heads": (1, 2), "window": 3, "norm_map": True}
DECODER = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, "decoder_hidden": 12}
MODELS = {
    "mae": MAE(VIT(), ratio=0.6, **DECODER),
    "mae without a class token": MAE(VIT(pooling="mean", positions="sincos"), 0.6, **DECODER),
    "simmim on vit": SimMIM(VIT()),
    "simmim on swin": SimMIM(Swin(**SWIN)),
    "simmim on swin v2": SimMIM(SwinV2(**SWIN, image_size=SIZE)),
    "patches of vit": MaskedPatches(VIT(pooling="mean"), classes=7),
    "patches of beit": MaskedPatches(
        Beit(4, 8, 1, 2, 2.0, SIZE, shared_positions=True, pooling="mean"), classes=7
    ),
}
# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(2, *SIZE, 3)).astype(np.float32)


def mask_of(model, seed=0):
    """9 of 15 squares of 4x4 pixels, on the grid of the model's patches."""
    step = HidePatches(patch=model.backbone.patch, unit=4, ratio=0.6)
    example, rng = {"image": np.zeros((*SIZE, 3))}, np.random.default_rng(seed)
    return np.stack([step(example, rng)["patch_mask"] for _ in range(2)])


def on_pixels(mask):
    side = SIZE[0] // mask.shape[1]
    return mask.repeat(side, 1).repeat(side, 2)[..., None]


def shapes(model, size=SIZE):
    pixels = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), pixels)


@cache
def variables_of(name):
    """Values that matter for every parameter: at their start some are 0."""
    leaves, tree = jax.tree.flatten(shapes(MODELS[name]))
    random = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [(0.3 * random.normal(size=x.shape)).astype(np.float32) for x in leaves]
    )


@cache
def applied(name):
    return quick(partial(MODELS[name].apply, train=False))


def parameters(model, size=224):
    return sum(x.size for x in jax.tree.leaves(shapes(model, (size, size))))


@pytest.mark.parametrize(
    ("size", "there"),
    [("mae_b16", 111_907_840), ("mae_l16", 329_541_888), ("mae_h14", 657_074_508)],
)
def test_mae_has_the_published_number_of_parameters(size, there):
    model = vit_jax.create(size)
    # The authors count their fixed positions too, those of the class token included.
    tokens = 1 + (224 // model.backbone.patch) ** 2
    assert parameters(model) == there - tokens * (model.backbone.width + 512)


def test_learned_positions_are_counted_as_the_published_fixed_ones():
    assert parameters(MAE(vit_b16(), positions="learned")) == 111_907_840


def test_the_others_have_the_published_number_of_parameters():
    assert parameters(masked.simmim_swin_b(), 192) == 89_874_104
    beit = beit_b16(shared_positions=True, pooling="mean")
    assert parameters(MaskedPatches(beit, classes=8192)) == 91_965_776
    encoder = 85_798_656
    assert parameters(masked.masked_patches_b16()) == encoder + 768 + 769 * 512
    assert parameters(masked.simmim_b16()) == encoder + 768 + 769 * 768


@pytest.mark.parametrize("name", MODELS)
def test_what_is_hidden_changes_nothing_and_what_is_seen_does(name):
    mask = mask_of(MODELS[name])
    pixels, other = images(0), images(1)
    apply, variables = applied(name), variables_of(name)
    wanted = apply(variables, pixels, mask)
    grid = mask.shape[1:] if "patches" in name else SIZE
    assert wanted.shape == (2, *grid, 7 if "patches" in name else 3)
    assert wanted.dtype == jnp.float32
    unseen = np.where(on_pixels(mask), other, pixels)
    chex.assert_trees_all_equal(apply(variables, unseen, mask), wanted)
    seen = np.where(on_pixels(mask), pixels, other)
    assert np.abs(apply(variables, seen, mask) - wanted).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_picture_s_numbers_depend_on_its_own_mask_alone(name):
    masks = mask_of(MODELS[name], 0), mask_of(MODELS[name], 1)
    both = np.stack([masks[0][0], masks[1][1]])
    apply, variables = applied(name), variables_of(name)
    first, second, mixed = (apply(variables, images(), m) for m in (*masks, both))
    chex.assert_trees_all_close(mixed[0], first[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(mixed[1], second[1], rtol=1e-5, atol=1e-5)
    assert np.abs(first[1] - second[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["mae", "simmim on swin", "patches of vit"])
def test_without_a_mask_everything_is_seen(name):
    apply, variables = applied(name), variables_of(name)
    nothing = np.zeros_like(mask_of(MODELS[name]))
    wanted = apply(variables, images())
    assert np.isfinite(wanted).all()
    if name != "mae":  # whose encoder sees as many patches of each picture, come what may
        chex.assert_trees_all_close(apply(variables, images(), nothing), wanted, rtol=1e-5)


def test_another_patch_in_a_place_is_that_patch_of_the_picture():
    name = "patches of vit"
    source = np.tile(np.arange(15, dtype=np.int32).reshape(3, 5), (2, 1, 1))
    source[0, 1, 2], source[1, 2, 4] = 3, 0  # a patch of the first row, and the very first
    swapped = images().copy()
    swapped[0, 4:8, 8:12] = swapped[0, 0:4, 12:16]
    swapped[1, 8:12, 16:20] = swapped[1, 0:4, 0:4]
    mask = source != source[:1] * 0 + np.arange(15).reshape(1, 3, 5)
    apply, variables = applied(name), variables_of(name)
    got = apply(variables, images(), mask, source)
    chex.assert_trees_all_close(got, apply(variables, swapped), rtol=1e-5, atol=1e-5)
    source[mask] = -1
    got = apply(variables, images(), mask, source)
    chex.assert_trees_all_close(got, apply(variables, images(), mask), rtol=1e-5, atol=1e-5)


def test_simmim_lays_the_channels_of_its_layer_out_as_the_published_pixel_shuffle():
    name = "simmim on vit"
    variables = jax.tree.map(np.zeros_like, variables_of(name))
    numbers = np.arange(48, dtype=np.float32)  # channel, row, column
    variables["params"]["decoder"]["bias"] = numbers
    got = applied(name)(variables, images(), mask_of(MODELS[name]))
    patch = numbers.reshape(3, 4, 4).transpose(1, 2, 0)
    np.testing.assert_array_equal(got[0], np.tile(patch, (3, 5, 1)))


def test_mae_lays_a_patch_s_pixels_out_row_by_row_with_the_channel_last():
    variables = jax.tree.map(np.zeros_like, variables_of("mae"))
    numbers = np.arange(48, dtype=np.float32)
    variables["params"]["decoder"]["predict"]["bias"] = numbers
    got = applied("mae")(variables, images(), mask_of(MODELS["mae"]))
    np.testing.assert_array_equal(got[0], np.tile(numbers.reshape(4, 4, 3), (3, 5, 1)))


def test_a_picture_of_which_mae_hides_another_number_becomes_nan_but_not_a_row_of_nothing():
    mask = mask_of(MODELS["mae"])
    mask[0] = False
    fewer = mask.copy()
    fewer[1, np.nonzero(fewer[1])[0][0]] = False
    apply, variables = applied("mae"), variables_of("mae")
    assert np.isfinite(apply(variables, images(), mask)).all()
    got = apply(variables, images(), fewer)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize(
    ("total", "ratio", "hidden"),
    [(196, 0.75, 147), (256, 0.75, 192), (36, 0.6, 22), (50, 0.14, 7), (4, 0.01, 1)],
)
def test_the_number_of_hidden_patches_is_that_of_the_mask(total, ratio, hidden):
    assert hidden_count(total, ratio) == hidden
    example = {"image": np.zeros((total, 1, 3))}
    found = HidePatches(patch=1, ratio=ratio)(example, np.random.default_rng(0))
    assert found["patch_mask"].sum() == hidden


MASK = jax.ShapeDtypeStruct((2, 3, 5), bool)


@pytest.mark.parametrize(
    ("model", "mask", "said"),
    [
        (MAE(VIT(), ratio=0.99, **DECODER), MASK, "ratio=0.99 of 15 patches .* at most 14/15"),
        (MAE(VIT(), ratio=1.0, **DECODER), MASK, "ratio=1.0 of 15 patches"),
        (MAE(VIT(), ratio=0.0, **DECODER), MASK, "ratio=0.0 of 15 patches"),
        (MAE(VIT(pooling="mean_norm"), **DECODER), MASK, "with pooling 'mean_norm'"),
        (MAE(VIT(taps=(0,)), **DECODER), MASK, r"taps=\(0,\)"),
        (MAE(Swin(**SWIN), **DECODER), MASK, "Swin cannot hide patches: wanted a backbone"),
        (MAE(VIT(), positions="sincs", **DECODER), MASK, "Did you mean 'sincos'"),
        (SimMIM(CvT()), MASK, "CvT cannot hide patches"),
        (SimMIM(VIT(patch=2)), MASK, "patch_mask is of 3x5 patches .* embedding has 6x10"),
        (MAE(VIT(patch=2), **DECODER), MASK, "patch_mask is of 3x5 patches"),
        (
            SimMIM(Swin(**SWIN | {"depths": (1, 1, 1), "heads": (1, 1, 1)})),
            jax.ShapeDtypeStruct((2, 6, 10), bool),
            "12x20 .* is no multiple of the backbone's map of 2x3",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(model, mask, said):
    pixels = jax.ShapeDtypeStruct((2, *SIZE, 3), jnp.float32)
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), pixels, mask)


@pytest.mark.parametrize("name", [pytest.param("mae", marks=pytest.mark.slow), "patches of beit"])
def test_scan_and_remat_change_neither_values_nor_gradients(name):
    model, mask, params = MODELS[name], mask_of(MODELS[name]), variables_of(name)["params"]
    other = model.clone(backbone=model.backbone.clone(scan=True, remat=True))
    stacked = dict(params["backbone"])
    stacked["blocks"] = jax.tree.map(lambda x: x[None], stacked.pop("block_0"))

    def run(model, params):
        def loss(params):
            return jnp.sin(model.apply({"params": params}, images(), mask, train=False)).sum()

        return quick(jax.value_and_grad(loss))(params)

    value, gradient = run(model, params)
    got, got_gradient = run(other, params | {"backbone": stacked})
    np.testing.assert_allclose(got, value, rtol=1e-4)
    unstacked = dict(got_gradient["backbone"])
    unstacked["block_0"] = jax.tree.map(lambda x: x[0], unstacked.pop("blocks"))
    got_gradient = got_gradient | {"backbone": unstacked}
    chex.assert_trees_all_close(got_gradient, gradient, rtol=1e-3, atol=1e-3)
    assert np.abs(gradient["mask_token"]).min() > 0
