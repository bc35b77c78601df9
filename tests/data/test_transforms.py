import io
import math

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import transforms
from vit_jax.data.decode import decode
from vit_jax.data.transforms import (
    ColorJitter,
    MixUpCutMix,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    Resize,
    ResizeCenterCrop,
    Standardize,
)
from vit_jax.errors import DataError

H, W = 37, 52


def example(height=H, width=W):
    """An example whose pixel (y, x) is (4 y, 4 x, 7)."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([4 * y, 4 * x, np.full_like(x, 7)], -1).astype(np.uint8)
    return {"image": image, "label": 3}


def rng(seed=0):
    return np.random.default_rng(seed)


TRANSFORMS = [
    Resize((20, 30)),
    ResizeCenterCrop(24),
    RandomResizedCrop((20, 30)),
    RandomCrop(32, padding=3),
    RandomFlip(),
    ColorJitter(0.4, 0.4, 0.4, 0.1),
    RandAugment(),
    Standardize(),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_the_same_rng_gives_the_same_picture_and_the_source_stays(transform):
    source = example()
    image = source["image"].copy()
    first, second = transform(source, rng(5)), transform(source, rng(5))
    np.testing.assert_array_equal(first["image"], second["image"])
    np.testing.assert_array_equal(source["image"], image)
    assert first["label"] == 3
    assert first["image"].dtype == (np.float32 if isinstance(transform, Standardize) else np.uint8)


@pytest.mark.parametrize("transform", TRANSFORMS[2:7], ids=lambda t: type(t).__name__)
def test_chance_comes_from_the_rng(transform):
    results = {transform(example(), rng(seed))["image"].tobytes() for seed in range(12)}
    assert len(results) > 1


def test_resize_takes_a_size_or_a_short_side():
    assert Resize((10, 33))(example(), rng())["image"].shape == (10, 33, 3)
    assert Resize(74)(example(), rng())["image"].shape == (74, 104, 3)
    assert Resize(74)(example(W, H), rng())["image"].shape == (104, 74, 3)


@pytest.mark.parametrize(("height", "width"), [(37, 52), (52, 37), (40, 40), (300, 21), (9, 9)])
@pytest.mark.parametrize("size", [24, 28])
def test_resize_and_centre_crop_are_torchvisions(height, width, size):
    source = example(height, width)
    short = math.floor(size / 0.875)
    h, w = (short, short * width // height) if height < width else (short * height // width, short)
    resized = Image.fromarray(source["image"]).resize((w, h), Image.Resampling.BICUBIC)
    top, left = round((h - size) / 2), round((w - size) / 2)
    expected = np.asarray(resized)[top : top + size, left : left + size]
    got = ResizeCenterCrop(size, interpolation="bicubic")(source, rng())["image"]
    np.testing.assert_array_equal(got, expected)


def test_a_centre_crop_may_be_of_another_shape_than_the_picture():
    for size in ((10, 40), (40, 10), (24, 25)):
        assert ResizeCenterCrop(size)(example(), rng())["image"].shape == (*size, 3)
        assert ResizeCenterCrop(size, crop=1.0)(example(), rng())["image"].shape == (*size, 3)


def test_random_resized_crops_lie_inside_and_have_the_area_and_ratio_asked_for():
    crop = RandomResizedCrop(8, scale=(0.2, 0.5), ratio=(0.5, 2.0))
    chance = rng()
    boxes = np.array([crop._box(100, 140, chance) for _ in range(400)])  # [400, 4]
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 100).all()
    assert (left + width <= 140).all()
    area, ratio = height * width / 14_000, width / height
    assert 0.19 < area.min() < 0.23
    assert 0.47 < area.max() < 0.51
    assert 0.48 < ratio.min() < 0.6
    assert 1.6 < ratio.max() < 2.1
    assert len(set(top)) > 30


def test_where_no_crop_fits_the_largest_in_the_middle_is_taken():
    crop = RandomResizedCrop(8, scale=(1.0, 1.0))
    assert crop._box(10, 100, rng()) == (0, 43, 10, 13)  # 13 = round(10 * 4/3)
    assert crop._box(100, 9, rng()) == (44, 0, 12, 9)  # 12 = round(9 / (3/4))


def photo(height=403, width=611, suffix="jpeg", **options):
    """A picture file of slopes with a grain of 8 pixels."""
    y, x = np.mgrid[:height, :width]
    grain = np.random.default_rng(0).integers(0, 40, (height // 8 + 1, width // 8 + 1))
    grain = np.kron(grain, np.ones((8, 8), int))[:height, :width]
    image = np.stack([y % 200 + grain, x % 190 + grain, 200 - grain], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, suffix, **options)
    return file.getvalue()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_of_a_large_jpeg_is_nearly_the_same_from_fewer_pixels(interpolation):
    data, seen = photo(quality=95), set()
    crop = RandomResizedCrop((23, 31), interpolation=interpolation)
    whole = RandomResizedCrop((23, 31), interpolation=interpolation, reducing_gap=None)
    for seed in range(12):
        reduced = crop._reduced(*crop._box(403, 611, rng(seed))[2:])
        seen.add(reduced)
        got, expected = crop.from_file(data, rng(seed)), whole.from_file(data, rng(seed))
        np.testing.assert_array_equal(expected, whole({"image": decode(data)}, rng(seed))["image"])
        assert got.dtype == np.uint8
        assert got.shape == (23, 31, 3)
        difference = np.abs(got.astype(float) - expected)
        # A shift by a pixel of the reduced picture makes 2.6 levels and more.
        assert difference.mean() < 0.6
    assert {2, 4} <= seen


def test_a_jpeg_that_is_not_as_its_header_says_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(transforms, "jpeg_size", lambda data: (4000, 3000))
    got = RandomResizedCrop((23, 31)).from_file(photo(suffix="png"), rng())
    assert got.shape == (23, 31, 3)
    assert got.std() > 10


def test_a_part_keeps_the_gap_over_its_size():
    for gap in (1.0, 2.0, 3.0):
        crop = RandomResizedCrop((100, 200), reducing_gap=gap)
        shapes = {1: (99, 500), 2: (250, 401), 4: (400, 4000), 8: (3000, 1600)}
        for reduced, shape in shapes.items():
            assert crop._reduced(*(math.ceil(gap * side) for side in shape)) == reduced
    assert RandomResizedCrop(8, reducing_gap=None)._reduced(4000, 3000) == 1


def test_a_crop_of_any_other_file_is_that_of_its_picture():
    crop = RandomResizedCrop(20)
    for data in (photo(suffix="png"), photo(37, 52), photo(suffix="jpeg", progressive=True)):
        expected = crop({"image": decode(data)}, rng(3))["image"].astype(float)
        np.testing.assert_allclose(crop.from_file(data, rng(3)), expected, atol=6)
    small = photo(37, 52)
    expected = crop({"image": decode(small)}, rng(3))["image"]
    np.testing.assert_array_equal(crop.from_file(small, rng(3)), expected)
    with pytest.raises(DataError, match="more than max_pixels"):
        crop.from_file(photo(), rng(), max_pixels=1000)
    with pytest.raises(DataError):
        crop.from_file(photo()[:-100], rng())


def test_random_crops_reach_every_place_and_pad_with_black():
    crop = RandomCrop((H, W), padding=2)
    seen = set()
    for seed in range(300):
        image = crop(example(), rng(seed))["image"]
        assert image.shape == (H, W, 3)
        inside = image[..., 2] == 7  # the picture's own pixels
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert (image[~inside] == 0).all()
        corner = image[rows[0], columns[0]] // 4
        seen.add((int(rows[0]) - int(corner[0]), int(columns[0]) - int(corner[1])))
    assert seen == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_a_picture_smaller_than_the_crop_is_padded_until_it_fits():
    image = RandomCrop((40, 20))(example(9, 30), rng())["image"]
    assert image.shape == (40, 20, 3)
    assert (image[..., 2] == 7).sum() == 9 * 20


def test_a_flip_swaps_left_and_right():
    got = RandomFlip(p=1.0)(example(), rng())["image"]
    np.testing.assert_array_equal(got, example()["image"][:, ::-1])
    got = RandomFlip(p=0.0)(example(), rng())["image"]
    np.testing.assert_array_equal(got, example()["image"])
    flips = [RandomFlip()(example(), rng(s))["image"][0, 0, 1] != 0 for s in range(200)]
    assert 70 < sum(flips) < 130


def test_colour_jitter_stays_within_its_strengths():
    grey = {"image": np.full((3, 4, 3), 100, np.uint8)}
    jitter = ColorJitter(brightness=0.3)
    levels = [int(jitter(grey, rng(s))["image"][0, 0, 0]) for s in range(300)]
    assert 70 <= min(levels) < 75
    assert 125 < max(levels) <= 130


def test_standardizing_is_arithmetic():
    transform = Standardize(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    image = np.array([[[0, 255, 51]]], np.uint8)
    got = transform({"image": image}, rng())["image"]
    np.testing.assert_allclose(got, [[[-1.0, 3.0, 0.1]]], rtol=1e-6)


def test_erasing_covers_one_rectangle_of_the_area_asked_for():
    image = np.full((40, 60, 3), 9, np.float32)
    erase = RandomErasing(probability=1.0, scale=(0.1, 0.2), mode="const")
    for seed in range(50):
        hole = (erase({"image": image}, rng(seed))["image"] == 0).all(-1)  # [H, W]
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == len(rows) * len(columns)
        assert rows[-1] - rows[0] == len(rows) - 1
        assert 0.085 < hole.mean() < 0.22
    noise = RandomErasing(probability=1.0)({"image": image}, rng())["image"]
    values = noise[noise != 9]
    assert abs(values.mean()) < 0.2
    assert 0.85 < values.std() < 1.15
    np.testing.assert_array_equal(image, 9)


def test_erasing_before_standardizing_is_an_error():
    with pytest.raises(ValueError, match="after Standardize"):
        RandomErasing()(example(), rng())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Resize(0), "size=0"),
        (lambda: Resize((1, 2, 3)), "size="),
        (lambda: Resize(8, "bilinar"), "Did you mean 'bilinear'"),
        (lambda: ResizeCenterCrop(8, crop=1.5), "crop=1.5"),
        (lambda: RandomResizedCrop(8, scale=(0.5, 0.1)), "scale="),
        (lambda: RandomResizedCrop(8, reducing_gap=0.5), "reducing_gap=0.5"),
        (lambda: RandomCrop(8, padding=-1), "padding=-1"),
        (lambda: RandomFlip(2.0), "p=2.0"),
        (lambda: ColorJitter(hue=0.7), "hue=0.7"),
        (lambda: RandAugment(magnitude=11), "magnitude=11"),
        (lambda: Standardize(std=(1.0, 0.0, 1.0)), "std="),
        (lambda: RandomErasing(mode="noise"), "mode='noise'"),
        (lambda: MixUpCutMix(3, mixup=0.0, cutmix=0.0), "both 0"),
        (lambda: MixUpCutMix(0), "num_classes=0"),
    ],
)
def test_a_wrong_argument_is_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def batch(rows=6):
    """Row i is filled with i, and of class i."""
    image = np.broadcast_to(np.arange(rows)[:, None, None, None], (rows, 9, 14, 3))
    return {
        "image": image.astype(np.float32),
        "label": np.arange(rows, dtype=np.int32),
        "valid": np.ones(rows, bool),
    }


@pytest.mark.parametrize("mix", [MixUpCutMix(6, cutmix=0.0), MixUpCutMix(6, mixup=0.0)])
def test_the_targets_are_the_shares_of_the_pixels(mix):
    for seed in range(20):
        got = mix(batch(), rng(seed))
        probs = got["label_probs"]
        assert probs.dtype == np.float32
        np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
        # Row i's pixels are i and those of its neighbour: their mean is the mean of the targets.
        np.testing.assert_allclose(
            got["image"].mean((1, 2, 3)), probs @ np.arange(6), rtol=1e-5, atol=1e-5
        )
        for row in range(6):
            neighbour = row ^ 1
            assert probs[row, row] == pytest.approx(1 - probs[row, neighbour], abs=1e-6)
            assert probs[row, row] == probs[neighbour, neighbour]


def test_mixup_draws_a_share_for_each_pair():
    probs = MixUpCutMix(6, cutmix=0.0)(batch(), rng(1))["label_probs"]
    assert len(set(probs.diagonal()[::2].tolist())) == 3


def test_cutmix_moves_one_rectangle():
    got = MixUpCutMix(6, mixup=0.0)(batch(), rng(2))["image"]
    for row in range(6):
        patch = (got[row] == row ^ 1).all(-1)
        rows, columns = patch.any(1).sum(), patch.any(0).sum()
        assert patch.sum() == rows * columns
        assert ((got[row] == row).all(-1) | patch).all()


def test_switch_and_probability_are_obeyed():
    mix = MixUpCutMix(6, probability=0.5, switch=0.25)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for seed in range(300):
        image = mix(batch(), rng(seed))["image"][4]
        kinds["none" if (image == 4).all() else "cutmix" if 5 in image else "mixup"] += 1
    assert 120 < kinds["none"] < 185  # a patch of nothing counts here too
    assert kinds["mixup"] > 2 * kinds["cutmix"] > 20


def test_a_pair_with_a_broken_row_is_left_alone_and_the_source_too():
    source = batch()
    source["valid"][3] = False
    got = MixUpCutMix(6)(source, rng(3))
    np.testing.assert_array_equal(got["image"][2:4], batch()["image"][2:4])
    np.testing.assert_array_equal(got["label_probs"][2:4], np.eye(6)[2:4])
    assert not np.array_equal(got["image"], source["image"])
    np.testing.assert_array_equal(source["image"], batch()["image"])
