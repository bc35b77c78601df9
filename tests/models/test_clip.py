from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import clip as golden
from tests.golden import vit as shared
from vit_jax.build import build
from vit_jax.models import clip
from vit_jax.models.clip import CLIP, TextTransformer, unit
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import ViT
from vit_jax.pretrained import names
from vit_jax.pretrained.families import clip as clip_family
from vit_jax.pretrained.families import siglip as siglip_family

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    "clip_tiny": clip_family,
    "clip_old_tiny": clip_family,
    "siglip_tiny": siglip_family,
}
TINY = partial(ViT, patch=4, width=8, depth=1, heads=2, image_size=(8, 12), pre_norm=True)
WORDS = partial(TextTransformer, vocabulary=11, length=6, width=8, depth=1, heads=2, end=2)


def shapes(model, size=(16, 16), length=golden.LENGTH):
    """Variables of a model, without computing them."""
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    init = partial(model.init, train=False)
    return jax.eval_shape(lambda i, t: init(jax.random.key(0), i, t), image, tokens)


@cache
def text_model(**fields):
    """A text encoder, its variables, and itself compiled."""
    model = WORDS(**fields)
    init = jax.jit(partial(model.init, train=False))
    variables = init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))
    return model, variables, jax.jit(partial(model.apply, train=False))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("clip_b32", 151_277_313),
        ("clip_b16", 149_620_737),
        ("clip_l14", 427_616_513),
        ("siglip_b16", 203_155_970),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, parameters):
    model = getattr(clip, name)()
    variables = shapes(model, (224, 224), model.text.length)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    assert set(variables["params"]) >= {"backbone", "text", "text_projection", "logit_scale"}


@cache
def published(name):
    """A golden file's arrays, our model of it, and its variables by the public table."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    state = shared.state_of(arrays)
    recipe = CASES[name].from_hf(shared.config_of(arrays), {k: v.shape for k, v in state.items()})
    model = build(recipe.classifier | {"backbone": recipe.backbone})
    variables = names.read(recipe.table, shapes(model), state)
    apply = jax.jit(partial(model.apply, train=False, capture_intermediates=True))
    return arrays, variables, apply


@pytest.mark.parametrize(
    ("name", "i"), [(n, i) for n in CASES for i in range(2) if (n, i) != ("clip_old_tiny", 1)]
)
def test_every_stage_equals_the_published_implementation(name, i):
    arrays, variables, apply = published(name)
    image, tokens = arrays[f"{i}/image"].astype(np.float32), arrays["tokens"]
    out, seen = apply(variables, image, tokens)
    seen = seen["intermediates"]
    pairs = [
        (out["image_embedding"], arrays[f"{i}/image_embedding"]),
        (out["text_embedding"], arrays["text_embedding"]),
    ]
    for n in range(2):
        pairs.append((seen["backbone"][f"block_{n}"]["__call__"][0], arrays[f"{i}/block_{n}"]))
        pairs.append((seen["text"][f"block_{n}"]["__call__"][0], arrays[f"text/block_{n}"]))
    logits = jnp.exp(out["logit_scale"]) * out["image_embedding"] @ out["text_embedding"].T
    pairs.append((logits + out.get("logit_bias", 0.0), arrays[f"{i}/logits"]))
    for got, wanted in pairs:
        chex.assert_trees_all_close(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_two_ways_to_find_a_texts_end_differ_where_a_number_is_greater_than_the_end():
    arrays, old = (np.load(GOLDEN / f"{name}.npz") for name in ("clip_tiny", "clip_old_tiny"))
    assert arrays["tokens"].max() > golden.END
    # The second and the third text hold no greater number.
    gaps = np.abs(arrays["text_embedding"] - old["text_embedding"]).max(1)
    assert gaps[0] > 0.1


def test_each_encoder_works_alone_and_gives_vectors_of_length_one():
    model = CLIP(backbone=TINY(), text=WORDS(), features=5)
    image = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    tokens = np.array([[1, 5, 7, 2, 0, 0], [1, 9, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0]])
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), image, tokens)
    both = jax.jit(partial(model.apply, train=False))(variables, image, tokens)
    assert set(both) == {"image_embedding", "text_embedding", "logit_scale"}
    for name, rows in (("image_embedding", 2), ("text_embedding", 3)):
        chex.assert_shape(both[name], (rows, 5))
        np.testing.assert_allclose(np.linalg.norm(both[name], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(both["logit_scale"], np.log(1 / 0.07), rtol=1e-6)
    for one, method, given in (
        ("image_embedding", "encode_image", image),
        ("text_embedding", "encode_text", tokens),
    ):
        encode = jax.jit(partial(model.apply, method=method))
        chex.assert_trees_all_close(encode(variables, given), both[one], atol=1e-6)
    alone = jax.eval_shape(partial(model.apply, train=False), variables, tokens=tokens)
    assert set(alone) == {"text_embedding", "logit_scale"}
    with pytest.raises(ValueError, match="image or tokens must be given"):
        model.apply(variables, train=False)


def test_any_backbone_can_be_the_image_encoder():
    network = ResNet(depths=(1, 1), width=8)
    variables = shapes(CLIP(backbone=network, text=WORDS(), features=5), (32, 48), 6)
    assert variables["params"]["image_projection"]["kernel"].shape[1] == 5
    refused = CLIP(backbone=TINY(), text=WORDS(), features=5, image_projection=False)
    with pytest.raises(ValueError, match="the backbone gives 8 features where features=5"):
        shapes(refused, (8, 12), 6)


def test_what_follows_the_end_of_a_text_changes_nothing_and_what_precedes_it_does():
    _, variables, apply = text_model()
    rows = np.array([[1, 5, 7, 2, 0, 0], [1, 5, 7, 2, 9, 2], [1, 6, 7, 2, 0, 0]])
    found = np.asarray(apply(variables, rows))
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-2
    # Fewer places than the model has room for: the same numbers.
    np.testing.assert_allclose(apply(variables, rows[:, :4])[0], found[0], atol=1e-6)


def test_the_last_place_reads_a_whole_text_padding_too():
    _, variables, apply = text_model(causal=False, reading="last")
    rows = np.array([[1, 5, 7, 2, 0, 0], [1, 5, 7, 2, 9, 0]])
    found = np.asarray(apply(variables, rows))
    assert np.abs(found[0] - found[1]).max() > 1e-2


@pytest.mark.parametrize(
    ("fields", "tokens", "said"),
    [
        ({}, (1, 7), "the texts have 7 tokens, and the model has places for 6"),
        ({"reading": "lst"}, (1, 6), "reading='lst' does not exist. Did you mean 'last'"),
        ({"vocabulary": 0}, (1, 6), "vocabulary=0 must be at least 1"),
    ],
)
def test_a_text_encoder_that_cannot_be_says_why(fields, tokens, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(
            lambda t: WORDS(**fields).init(jax.random.key(0), t, train=False),
            jax.ShapeDtypeStruct(tokens, jnp.int32),
        )


def test_a_vector_of_zeros_has_a_finite_direction_and_gradient():
    assert np.all(np.asarray(unit(jnp.zeros((1, 3)))) == 0)
    assert np.all(np.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros((1, 3)))))
    chex.assert_trees_all_close(unit(jnp.array([3.0, 4.0])), jnp.array([0.6, 0.8]))
