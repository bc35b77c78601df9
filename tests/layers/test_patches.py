from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.layers.patches import PatchEmbed, grid_size


def test_each_patch_is_mapped_alone_and_in_its_place():
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 6, 9, 3)).astype(np.float32)
    layer = PatchEmbed(width=5, patch=3)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]["proj"]
    assert {name: s.shape for name, s in shapes.items()} == {"kernel": (3, 3, 3, 5), "bias": (5,)}
    proj = {name: random.normal(size=s.shape).astype(np.float32) for name, s in shapes.items()}
    apply = jax.jit(partial(layer.apply, {"params": {"proj": proj}}))
    out = apply(x)
    wanted = x[1, 3:6, 6:9].reshape(-1) @ proj["kernel"].reshape(-1, 5) + proj["bias"]
    assert out.shape == (2, 2, 3, 5)
    np.testing.assert_allclose(out[1, 1, 2], wanted, rtol=1e-4, atol=1e-5)
    x[:, 0, 0] += 1
    moved = apply(x) - out
    np.testing.assert_array_equal(np.abs(moved).max((0, 3)) > 0, [[1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [
        ((224, 320, 16), (14, 20)),
        ((32, 48, 1, 16), (2, 3)),
        ((33, 47, 1, 16), (3, 3)),  # the CNN rounds up
        ((60, 64, 8, 4), None),
        ((61, 64, 8, 4), (2, 2)),
    ],
)
def test_the_grid_counts_patches_of_the_image_or_of_the_map(arguments, grid):
    if grid:
        assert grid_size(*arguments) == grid
        return
    with pytest.raises(ValueError, match=r"60x64.*patch=8 on a map of 1/4.*32x64 or 64x64"):
        grid_size(*arguments)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((225, 223), "224x208 or 240x224"), ((7, 40), "16x32 or 16x48"), ((0, 16), "16x16")],
)
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(size, nearest):
    message = rf"image size {size[0]}x{size[1]} .*patch=16 must divide both sides; .*{nearest}"
    with pytest.raises(ValueError, match=message):
        grid_size(*size, 16)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: PatchEmbed(4, 16).init(jax.random.key(0), jnp.zeros((1, *size, 3))))


def test_a_patch_without_pixels_is_refused():
    with pytest.raises(ValueError, match="patch=0 must be at least 1"):
        grid_size(8, 8, 0)
