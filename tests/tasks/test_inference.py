"""Windows, flips and scales of `tasks.inference`, with models small enough to know the answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import step
from vit_jax.build import build
from vit_jax.errors import ConfigError
from vit_jax.tasks.inference import Averaged
from vit_jax.tasks.segmentation import Segmentation


class Pixelwise:
    """Logits of each pixel from that pixel alone, counting how often it was asked."""

    def __init__(self):
        self.shapes = []

    def apply(self, variables, image, *, train):
        self.shapes.append(image.shape)
        return image * variables["scale"]


class Leaning(Pixelwise):
    """Sees each pixel's left neighbour too, which a mirrored picture has on its right."""

    def apply(self, variables, image, *, train):
        return super().apply(variables, image, train=train) + 2 * jnp.roll(image, 1, 2)


VARIABLES = {"scale": jnp.float32(3.0)}


def picture(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def real_part(shape, *sizes):
    row, column = (np.arange(n) for n in shape)
    return np.stack([(row < h)[:, None] & (column < w) for h, w in sizes])


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((11, 13), 4, 3), ((5, 17), 5, 0), ((8, 8), 4, 4), ((9, 4), 7, 5), ((3, 7), 3, 1)],
)
def test_windows_cover_every_pixel_alike_at_odd_sizes(size, window, stride):
    image = picture(2, *size, 3)
    model = Pixelwise()
    found = Averaged(model, window=window, stride=stride).apply(VARIABLES, image)
    np.testing.assert_allclose(found, 3 * image, rtol=1e-5)
    assert model.shapes[-1][1:3] == (min(window, size[0]), min(window, size[1]))


def test_a_window_that_covers_the_picture_is_the_plain_pass():
    image = picture(1, 6, 9, 3)
    plain = Leaning().apply(VARIABLES, image, train=False)
    for window in (0, 9, 50):
        found = Averaged(Leaning(), window=window).apply(VARIABLES, image)
        np.testing.assert_array_equal(found, plain)


def test_where_windows_overlap_their_logits_are_averaged():
    class Places:
        def apply(self, variables, image, *, train):
            # The mean of a window, at all of its pixels.
            return jnp.broadcast_to(image.mean((1, 2), keepdims=True), image.shape)

    image = jnp.arange(6.0).reshape(1, 1, 6, 1)  # windows 0..3 and, moved back, 2..5
    found = Averaged(Places(), window=4, stride=3).apply({}, jnp.repeat(image, 4, 1))
    np.testing.assert_allclose(found[0, 0, :, 0], [1.5, 1.5, 2.5, 2.5, 3.5, 3.5])


def test_a_pictures_windows_do_not_depend_on_its_padding():
    small = picture(1, 7, 9, 3)
    padded = jnp.pad(small, ((0, 0), (0, 6), (0, 11), (0, 0)))
    both = jnp.concatenate([padded, picture(1, 13, 20, 3, seed=1)])
    mask = real_part((13, 20), (7, 9), (13, 20))
    for options in ({"flip": True}, {"window": 4, "stride": 2, "flip": True}):
        averaged = Averaged(Leaning(), **options)
        alone = averaged.apply(VARIABLES, small)
        beside = averaged.apply(VARIABLES, both, mask)[:1, :7, :9]
        # The leaning model looks across the left edge, where there is the padding's or the other.
        inner = slice(2, -2)
        np.testing.assert_allclose(beside[:, :, inner], alone[:, :, inner], atol=1e-5)


def test_a_model_that_does_not_tell_left_from_right_gains_nothing_by_a_flip():
    image = picture(2, 5, 8, 3)
    found = Averaged(Pixelwise(), flip=True).apply(VARIABLES, image)
    plain = Pixelwise().apply(VARIABLES, image, train=False)
    np.testing.assert_allclose(jax.nn.log_softmax(found), jax.nn.log_softmax(plain), atol=1e-5)


def test_a_flip_is_the_mean_of_the_probabilities_of_both():
    image = picture(1, 4, 6, 3)
    leaning = lambda x: jax.nn.softmax(Leaning().apply(VARIABLES, x, train=False))  # noqa: E731
    wanted = (leaning(image) + leaning(image[:, :, ::-1])[:, :, ::-1]) / 2
    found = jax.nn.softmax(Averaged(Leaning(), flip=True).apply(VARIABLES, image))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_scales_of_an_even_picture_change_nothing_for_a_pixelwise_model():
    image = jnp.broadcast_to(jnp.array([0.5, -1.0, 2.0]), (1, 8, 12, 3))
    averaged = Averaged(Pixelwise(), scales=(0.5, 1.75), window=6)
    found = averaged.apply(VARIABLES, image)
    assert found.shape == image.shape
    np.testing.assert_allclose(jax.nn.softmax(found), jax.nn.softmax(3 * image), atol=1e-5)


def test_it_stands_in_the_models_place_in_the_step_of_evaluation():
    spec = {"target": "tasks.inference.Averaged", "window": 4, "flip": True}
    averaged = build(spec, model=Pixelwise())
    image = picture(2, 6, 7, 3)
    batch = {"image": image, "image_mask": np.ones(image.shape[:3], bool)}
    batch["segmentation"] = np.asarray(image.argmax(-1))
    evaluate = jax.jit(lambda v, b: step.eval_step(v, b, model=averaged, task=Segmentation()))
    sums, predictions = evaluate(VARIABLES, batch)
    assert float(sums["confusion"].trace()) == float(sums["count"]) == 2 * 6 * 7
    np.testing.assert_array_equal(predictions["segmentation"], image.argmax(-1))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": -1}, "window=-1"),
        ({"window": 4, "stride": 5}, "pixels would be left out"),
        ({"stride": 2}, "at most the window"),
        ({"scales": ()}, r"scales=\(\)"),
        ({"scales": (0.0,)}, "over 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        build({"target": "tasks.inference.Averaged", **options}, model=Pixelwise())
