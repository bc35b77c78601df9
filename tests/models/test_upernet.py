from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.golden import upernet as golden
from vit_jax.contracts import Features
from vit_jax.layers.pyramid import ConvNorm
from vit_jax.models import upernet
from vit_jax.models.swin import Swin
from vit_jax.models.upernet import UPerNet
from vit_jax.pretrained import names
from vit_jax.pretrained.families.upernet import HF

# Less optimised code is compiled in half the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GOLDEN = Path(__file__).parents[1] / "golden" / "upernet_tiny.npz"
TINY = {"num_classes": 3, "features": 4, "pools": (1, 2), "auxiliary_features": 3}


class Strided(nn.Module):
    """A backbone whose maps are every `4 * 2**i`-th pixel; with one map, a plain one."""

    maps: int = 3

    @nn.compact
    def __call__(self, image, *, train):
        x = image[:, ::4, ::4] * self.param("gain", nn.initializers.ones, (1, 1, 1, 1))
        x = jnp.concatenate([x, 1 - x, x[..., :2]], -1)  # [B, h, w, 8]
        maps = tuple(x[:, :: 2**i, :: 2**i] for i in range(self.maps))
        return Features(maps=maps, pooled=x.mean((1, 2)))


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
        ("upernet_swin_t", 59_943_398),
        ("upernet_swin_s", 81_261_302),
        ("upernet_swin_b", 121_417_124),
        ("upernet_swin_l", 233_966_048),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, parameters):
    pixels = jax.ShapeDtypeStruct((1, 90, 110, 3), jnp.float32)
    out, variables = jax.eval_shape(
        partial(getattr(upernet, name)().init_with_output, train=False), jax.random.key(0), pixels
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    assert out.shape == (1, 90, 110, 150)


def test_every_part_equals_the_published_implementation():
    arrays = np.load(GOLDEN)
    state = {k.removeprefix("state/"): arrays[k] for k in arrays if k.startswith("state/")}
    backbone = Swin(golden.WIDTH, golden.DEPTHS, golden.HEADS, golden.WINDOW)
    model = UPerNet(backbone, golden.CLASSES, golden.FEATURES, auxiliary_features=golden.HELP)
    image = arrays["image"].astype(np.float32)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    variables = names.read(HF, shapes, state)  # all of both sides, or an error
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    run = partial(model.apply, train=False, capture_intermediates=True, mutable=["intermediates"])
    logits, seen = quick(run)(variables, image)
    seen = seen["intermediates"]
    # Evaluation leaves the auxiliary head out.
    own = {k: v["auxiliary"] for k, v in variables.items()}
    convolution = partial(ConvNorm(golden.HELP, 3).apply, train=False)
    for key, got in (
        ("bottleneck", seen["head"]["bottleneck"]["__call__"][0]),
        ("lateral_0", seen["head"]["lateral_0"]["__call__"][0]),
        ("head", seen["head"]["__call__"][0]),
        ("auxiliary", quick(convolution)(own, seen["norm_3"]["__call__"][0])),
        ("logits", logits[:, :: golden.STEP, :: golden.STEP]),
    ):
        wanted = arrays[key]
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_training_gives_the_auxiliary_head_and_moves_the_statistics():
    model, image = UPerNet(Strided(), dropout=0.0, **TINY), draw(2, 33, 42, 3)
    variables = random_variables(model, image, train=False)
    assert "auxiliary" in variables["params"]  # there from the start, though evaluation skips it
    run = partial(model.apply, train=True, mutable=["batch_stats"])
    out, changed = quick(run)(variables, image)
    assert out["logits"].shape == (2, 33, 42, 3)
    assert [x.shape for x in out["auxiliary"]] == [(2, 33, 42, 3)]
    before, after = (jax.tree.leaves(tree["batch_stats"]) for tree in (variables, changed))
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, after, strict=True))
    without = UPerNet(Strided(), **TINY | {"auxiliary_features": 0})
    shapes = jax.eval_shape(partial(without.init, train=False), jax.random.key(0), image)
    assert set(variables["params"]) - set(shapes["params"]) == {
        "auxiliary",
        "auxiliary_classifier",
    }


def test_a_backbone_with_one_map_gets_a_pyramid():
    model, image = UPerNet(Strided(maps=1), **TINY), draw(1, 20, 28, 3)
    logits, variables = jax.eval_shape(
        partial(model.init_with_output, train=False), jax.random.key(0), image
    )
    assert logits.shape == (1, 20, 28, 3)
    assert set(variables["params"]["pyramid"]) == {f"level_{i}" for i in (1, 2, 3, 4)}
    assert not any(name.startswith("norm_") for name in variables["params"])


def test_no_classes_are_refused():
    model = UPerNet(Strided(), 0)
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), draw(1, 16, 16, 3))
