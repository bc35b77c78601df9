"""Each operation on a picture against Pillow's, or a number found by hand."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.data import operations
from vit_jax.data.transforms import RandAugment

H, W = 31, 44
FILL = (128, 128, 128)


def picture(seed=0, low=20, high=230):
    """[H, W, 3]: smooth, so that a quarter of a pixel matters little; not of full range."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(low, high, (5, 7, 3), np.uint8))
    return np.asarray(small.resize((W, H), Image.Resampling.BICUBIC))


def differ(a, b):
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


@pytest.mark.parametrize("name", operations.INTERPOLATIONS)
@pytest.mark.parametrize("size", [(9, 17), (50, 61), (20, 70)])
def test_resizing_is_pillows(name, size):
    image = picture()
    got = operations.resize(image, size, name)
    method = Image.Resampling[{"area": "BOX"}.get(name, name.upper())]
    np.testing.assert_array_equal(got, Image.fromarray(image).resize(size[::-1], method))


@pytest.mark.parametrize("box", [None, (3, 2, 40, 29), (3.3, 1.7, 40.2, 29.1)])
@pytest.mark.parametrize("name", operations.INTERPOLATIONS)
@pytest.mark.parametrize("size", [(9, 17), (50, 61), (40, 20), (31, 44)])
def test_the_fast_form_is_within_two_levels_of_pillows(name, size, box):
    # Noise of all levels is the worst: where its sums are cut off at 0 and 255 the order matters.
    for image in (picture(), np.random.default_rng(1).integers(0, 256, (H, W, 3), np.uint8)):
        got = operations.resample(image, size, name, box)
        expected = operations.resize(image, size, name, box)
        assert got.dtype == np.uint8
        assert got.shape == (*size, 3)
        assert differ(got, expected) <= (2 if name in ("bilinear", "bicubic") else 0)
        assert np.abs(got.astype(int) - expected).mean() < 0.1


def test_the_fast_form_is_pillows_where_its_library_is_missing(monkeypatch):
    image, box = picture(), (3.3, 1.7, 40.2, 29.1)
    monkeypatch.setattr(operations, "simd", None)
    got = operations.resample(image, (9, 17), "bicubic", box)
    np.testing.assert_array_equal(got, operations.resize(image, (9, 17), "bicubic", box))


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "area"])
def test_shrinking_averages_what_it_leaves_out(name):
    stripes = np.zeros((32, 48, 3), np.uint8)
    stripes[:, ::2] = 200  # single columns, which sampling alone would hit or miss
    got = operations.resize(stripes, (4, 6), name)
    assert differ(got, np.full_like(got, 100)) <= 20  # 100 without averaging


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 1.0, 1.3, 1.9])
@pytest.mark.parametrize(
    ("name", "enhance", "tolerance"),
    [
        ("brightness", ImageEnhance.Brightness, 0),
        ("contrast", ImageEnhance.Contrast, 0),
        ("saturation", ImageEnhance.Color, 2),
        ("sharpness", ImageEnhance.Sharpness, 2),
    ],
)
def test_enhancing_is_pillows(name, enhance, tolerance, factor):
    image = picture()
    got = getattr(operations, name)(image, factor)
    assert differ(got, enhance(Image.fromarray(image)).enhance(factor)) <= tolerance


def test_contrast_moves_away_from_the_mean_of_the_grey_picture():
    image = np.zeros((2, 3, 3), np.uint8)
    image[0] = (200, 100, 50)  # grey 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2; 0 below
    np.testing.assert_array_equal(operations.contrast(image, 0.0), np.full_like(image, 62))
    assert operations.contrast(image, 2.0)[0, 0].tolist() == [255, 138, 38]  # 62 + 2 (v - 62)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["autocontrast", "equalize", "invert"])
def test_operations_without_a_strength_are_pillows(name, seed):
    image = picture(seed, low=40, high=100 + 50 * seed)
    expected = getattr(ImageOps, name)(Image.fromarray(image))
    np.testing.assert_array_equal(getattr(operations, name)(image), expected)


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_a_picture_of_one_colour_stays(name):
    image = np.full((3, 5, 3), 77, np.uint8)
    np.testing.assert_array_equal(getattr(operations, name)(image), image)


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterizing_is_pillows(bits):
    expected = ImageOps.posterize(Image.fromarray(picture()), bits)
    np.testing.assert_array_equal(operations.posterize(picture(), bits), expected)


def test_posterizing_to_no_bits_is_black():
    assert operations.posterize(picture(), 0).max() == 0


@pytest.mark.parametrize("threshold", [0, 1, 100, 255, 256])
def test_solarizing_is_pillows(threshold):
    expected = ImageOps.solarize(Image.fromarray(picture()), threshold)
    np.testing.assert_array_equal(operations.solarize(picture(), threshold), expected)


def test_solarize_add_brightens_the_dark_half():
    image = np.array([[[0, 100, 127], [128, 200, 255]]], np.uint8)
    got = operations.solarize_add(image, 140)
    assert got.tolist() == [[[140, 240, 255], [128, 200, 255]]]


@pytest.mark.parametrize("amount", [-0.3, 0.17])
def test_moving_is_pillows_away_from_the_rim(amount):
    image, degrees = picture(), amount * 100
    pillow = Image.fromarray(image)

    def affine(*matrix):
        return pillow.transform(
            pillow.size,
            Image.Transform.AFFINE,
            matrix,
            resample=Image.Resampling.BILINEAR,
            fillcolor=FILL,
        )

    rotated = pillow.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=FILL)
    for got, expected in (
        (operations.shear_x(image, amount, FILL), affine(1, amount, 0, 0, 1, 0)),
        (operations.shear_y(image, amount, FILL), affine(1, 0, 0, amount, 1, 0)),
        (operations.translate_x(image, amount, FILL), affine(1, 0, amount * W, 0, 1, 0)),
        (operations.translate_y(image, amount, FILL), affine(1, 0, 0, 0, 1, amount * H)),
        (operations.rotate(image, degrees, FILL), rotated),
    ):
        gap = np.abs(got.astype(int) - np.asarray(expected)).max(-1)  # [H, W]
        rim = (np.asarray(expected) == 128).all(-1)
        rim = np.asarray(Image.fromarray(rim).resize((W, H))).astype(np.uint8)
        near = np.pad(rim, 1, constant_values=1)
        near = sum(near[i : i + H, j : j + W] for i in range(3) for j in range(3)) > 0
        assert not near.all()
        assert gap[~near].max() <= 2
        assert (got == 128).all(-1).sum() > 5  # the fill is seen


def test_moving_by_whole_pixels_copies_them():
    image = picture()
    got = operations.translate_x(image, 5 / W, FILL)
    np.testing.assert_array_equal(got[:, :-5], image[:, 5:])
    assert (got[:, -5:] == 128).all()


def test_a_quarter_turn_of_a_square_is_exact():
    square = picture()[:31, :31]
    got = operations.rotate(square, 90, FILL)
    np.testing.assert_array_equal(got, np.rot90(square))  # counter-clockwise


def test_the_hue_turns_red_to_green_to_blue():
    red = np.full((1, 1, 3), (255, 0, 0), np.uint8)
    assert differ(operations.hue(red, 1 / 3), [[[0, 255, 0]]]) <= 6  # 1 part in 256 is 6 levels
    assert differ(operations.hue(red, -1 / 3), [[[0, 0, 255]]]) <= 6
    np.testing.assert_array_equal(operations.hue(red, 0.0), red)


@pytest.mark.parametrize("name", RandAugment.OPERATIONS)
def test_each_operation_of_randaugment_changes_the_picture_and_not_its_source(name):
    image = picture()
    before = image.copy()
    got = RandAugment().apply(name, image, 0.9, 1)
    assert got.shape == image.shape
    assert got.dtype == np.uint8
    assert differ(got, image) > 4
    np.testing.assert_array_equal(image, before)


def test_randaugments_strengths_are_timms():
    image, augment = picture(), RandAugment()
    for name, expected in {
        "rotate": operations.rotate(image, -27, FILL),  # 0.9 * 30 degrees
        "shear_x": operations.shear_x(image, -0.27, FILL),
        "translate_y": operations.translate_y(image, -0.405, FILL),
        "posterize": operations.posterize(image, 1),  # 4 - int(3.6)
        "solarize": operations.solarize(image, 26),  # 256 - int(230.4)
        "solarize_add": operations.solarize_add(image, 99),
        "contrast": operations.contrast(image, 1 - 0.81),
    }.items():
        np.testing.assert_array_equal(augment.apply(name, image, 0.9, -1), expected, name)
    expected = operations.brightness(image, 1.81)
    np.testing.assert_array_equal(augment.apply("brightness", image, 0.9, 1), expected)
    expected = operations.brightness(image, 0.1)
    np.testing.assert_array_equal(augment.apply("brightness", image, 1.0, -1), expected)
