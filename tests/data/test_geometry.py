"""Pictures, boxes and masks that move together, by properties and by numbers worked out by hand."""

import numpy as np
import pytest

from vit_jax.build import build
from vit_jax.data import geometry
from vit_jax.data.geometry import (
    Cut,
    Flipped,
    Pad,
    RandomFlip,
    Resize,
    ResizeOrCrop,
    ResizeShortSide,
    ScaleJitterCrop,
    boxes_of_masks,
    check_boxes,
    moved,
    picture_size,
    short_side,
)
from vit_jax.data.transforms import ColorJitter, Standardize
from vit_jax.errors import ConfigError, DataError

H, W = 61, 83


def rectangles(seed=0, count=5):
    """Full rectangles, so that a part of a box is the box of a part; classes by number."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, H, W), bool)
    for mask in masks:
        top, left = rng.integers(H - 8), rng.integers(W - 8)
        mask[top : top + rng.integers(4, 30), left : left + rng.integers(4, 30)] = True
    segmentation = np.full((H, W), 255, np.uint8)
    for number, mask in enumerate(masks):
        segmentation[mask] = number
    return {
        "image": rng.integers(0, 256, (H, W, 3), np.uint8),
        "boxes": boxes_of_masks(masks),
        "box_label": np.arange(count, dtype=np.int32),
        "crowd": np.arange(count) % 2 == 1,
        "masks": masks,
        "segmentation": segmentation,
    }


def same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], key)


TRANSFORMS = [
    Resize((40, 97)),
    ResizeShortSide((31, 48, 75), longest=120),
    ResizeOrCrop((48, 64), longest=100, first=(50, 70), part=(30, 60)),
    ScaleJitterCrop((40, 50)),
    RandomFlip(),
]


def test_a_flip_twice_changes_nothing():
    example = rectangles()
    once = moved(example, [Flipped()])
    assert (once["boxes"] != example["boxes"]).any()
    same(moved(once, [Flipped()]), example)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_boxes_agree_with_masks_and_masks_with_classes_after_any_move(transform):
    for seed in range(12):
        example = transform(rectangles(seed), np.random.default_rng(seed))
        h, w = example["image"].shape[:2]
        count = len(example["box_label"])
        assert example["masks"].shape == (count, h, w)
        assert example["segmentation"].shape == (h, w)
        assert len(example["boxes"]) == len(example["crowd"]) == count
        np.testing.assert_array_equal(example["crowd"], example["box_label"] % 2 == 1)
        seen = example["masks"].any((1, 2))  # a sliver may be thinner than a pixel
        drawn = boxes_of_masks(example["masks"])[seen]
        # A second resize enlarges the half pixel that the first was wrong by.
        most = 1.6 if isinstance(transform, ResizeOrCrop) else 1
        assert np.abs(drawn - example["boxes"][seen]).max(initial=0) <= most
        assert (example["boxes"] >= 0).all()
        assert (example["boxes"][:, [0, 2]] <= w).all()
        assert (example["boxes"][:, [1, 3]] <= h).all()
        assert (example["boxes"][:, 2:] > example["boxes"][:, :2]).all()
        for label, mask in zip(example["box_label"], example["masks"]):
            assert not mask[example["segmentation"] == 255].any()
            assert mask[example["segmentation"] == label].all()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_the_size_is_known_without_the_picture_and_draws_the_same_numbers(transform):
    for seed in range(10):
        first, second = np.random.default_rng(seed), np.random.default_rng(seed)
        example = transform(rectangles(seed), first)
        assert transform.sized((H, W), second) == example["image"].shape[:2]
        assert first.random() == second.random()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_pictures_without_boxes_or_masks_are_moved_alike(transform):
    example = rectangles()
    alone = transform({"image": example["image"]}, np.random.default_rng(3))
    assert alone.keys() == {"image"}
    assert alone["image"].shape == transform(example, np.random.default_rng(3))["image"].shape
    none = {"image": example["image"], "boxes": np.zeros((0, 4), np.float32)}
    none |= {"box_label": np.zeros(0, np.int32), "masks": np.zeros((0, H, W), bool)}
    got = transform(none, np.random.default_rng(3))
    assert got["boxes"].shape == (0, 4)
    assert got["masks"].shape == (0, *alone["image"].shape[:2])


def test_a_cut_clips_what_reaches_out_and_drops_what_is_outside():
    boxes = np.float32([[0, 0, 10, 10], [20, 20, 30, 30], [5, 5, 8, 9], [25, 0, 26, 40]])
    example = {"image": np.zeros((50, 60, 3), np.uint8), "boxes": boxes}
    example["box_label"] = np.int32([3, 1, 2, 0])
    cut = moved(example, [Cut(8, 9, (20, 16))])
    assert cut["boxes"].tolist() == [[0, 0, 1, 2], [11, 12, 16, 20]]
    assert cut["box_label"].tolist() == [3, 1]  # the third is above it, the last is right of it
    assert cut["image"].shape == (20, 16, 3)


def test_the_short_side_is_rounded_as_in_detr():
    assert short_side((480, 640), 800, 1333) == (800, 1066)
    assert short_side((640, 480), 800, 1333) == (1066, 800)
    assert short_side((426, 640), 800, 1333) == (800, 1201)
    assert short_side((300, 900), 800, 1333) == (444, 1332)  # the long side is capped
    assert short_side((300, 400), 300, None) == (300, 400)


def test_detrs_numbers_are_the_default():
    assert ResizeOrCrop().sizes == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    sizes = [ResizeOrCrop().sized((480, 640), np.random.default_rng(s)) for s in range(60)]
    assert {min(size) for size in sizes} >= {480, 512, 544, 800}
    assert max(max(size) for size in sizes) <= 1333
    assert len({round(max(s) / min(s), 2) for s in sizes}) > 10  # parts of many shapes


def test_a_part_with_little_but_one_class_is_drawn_again():
    segmentation = np.zeros((60, 60), np.uint8)
    segmentation[:, 50:] = 1
    example = {"image": np.zeros((60, 60, 3), np.uint8), "segmentation": segmentation}
    shares = {}
    for most in (0.75, 1.0):
        crop = ScaleJitterCrop((20, 20), scale=(1, 1), most=most)
        got = [crop(example, np.random.default_rng(s))["segmentation"] for s in range(60)]
        shares[most] = np.mean([(part == 1).mean() for part in got])
    assert shares[0.75] > 2 * shares[1.0]


def test_colour_leaves_boxes_and_masks_alone():
    example = rectangles()
    got = ColorJitter(0.5, 0.5, 0.5, 0.1)(example, np.random.default_rng(0))
    assert (got["image"] != example["image"]).any()
    same(got | {"image": 0}, example | {"image": 0})


def test_boxes_that_an_annotator_left_are_clipped_dropped_or_refused():
    boxes, kept = check_boxes(
        np.array([[-2, 3, 5, 9], [1, 1, 1, 5], [90, 1, 95, 5], [2, 2, 84, 70]]), (61, 83)
    )
    assert kept.tolist() == [True, False, False, True]
    assert boxes[kept].tolist() == [[0, 3, 5, 9], [2, 2, 83, 61]]
    assert check_boxes(np.zeros((0, 4)), (5, 5))[0].shape == (0, 4)
    with pytest.raises(DataError, match=r"box 1 is inverted: .* = \(7, 3, 2, 9\)"):
        check_boxes(np.array([[1, 1, 2, 2], [7, 3, 2, 9]]), (20, 20))
    with pytest.raises(DataError, match=r"box 0 is not finite: .*nan"):
        check_boxes(np.array([[1, np.nan, 2, 2]]), (20, 20))


def test_the_size_of_what_is_no_picture_is_a_data_error():
    assert picture_size(np.zeros((3, 5, 3), np.uint8)) == (3, 5)
    with pytest.raises(DataError, match="no picture"):
        picture_size(b"I am text")


def test_padding_keeps_fractions_of_the_unpadded_picture():
    example = Standardize()(rectangles(), None)
    row = Pad(((64, 64), (96, 128)), boxes=4, masks=True)(example)
    kinds = {key: (value.shape, str(value.dtype)) for key, value in row.items()}
    assert kinds == {
        "image": ((96, 128, 3), "float32"),
        "image_mask": ((96, 128), "bool"),
        "boxes": ((4, 4), "float32"),
        "box_label": ((4,), "int32"),
        "masks": ((4, 96, 128), "bool"),
        "segmentation": ((96, 128), "int32"),
    }
    assert row["box_label"].tolist() == [0, 2, 4, -1]  # 1 and 3 are crowds
    cx, cy, w, h = row["boxes"][:3].T
    corners = np.stack([(cx - w / 2) * W, (cy - h / 2) * H, (cx + w / 2) * W, (cy + h / 2) * H], 1)
    np.testing.assert_allclose(corners, example["boxes"][[0, 2, 4]], atol=1e-4)
    assert row["boxes"][3].tolist() == [0, 0, 0, 0]
    assert row["image_mask"].sum() == H * W
    assert row["image_mask"][:H, :W].all()
    assert (row["image"][~row["image_mask"]] == 0).all()
    assert (row["segmentation"][~row["image_mask"]] == 255).all()
    np.testing.assert_array_equal(row["masks"][:3, :H, :W], example["masks"][[0, 2, 4]])


def test_padding_leaves_out_boxes_without_area_and_what_was_not_asked_for():
    example = {"image": np.zeros((4, 5, 3), np.float32), "captions": ("a red three",)}
    example |= {"boxes": np.float32([[1, 1, 1, 3], [0, 0, 2, 2]]), "box_label": np.int32([7, 8])}
    row = Pad(((8, 8),), boxes=3)(example)
    assert row["box_label"].tolist() == [8, -1, -1]
    assert row.keys() == {"image", "image_mask", "boxes", "box_label"}
    assert Pad(((8, 8),))(example).keys() == {"image", "image_mask"}


def test_a_batch_gets_the_smallest_shape_that_holds_it():
    pad = Pad(((64, 96), (96, 64), (96, 96)))
    assert pad.shape([(50, 90), (64, 20)]) == (64, 96)
    assert pad.shape([(50, 90), (65, 20)]) == (96, 96)
    assert pad.shape([(80, 60)]) == (96, 64)
    assert pad.shape([]) == (64, 96)


@pytest.mark.parametrize(
    ("pad", "example", "text"),
    [
        (Pad(((60, 90),)), {}, "the batch is 61 x 83 .*none of Pad's shapes 60 x 90"),
        (Pad(((64, 96),), boxes=2), {"crowd": [False] * 5}, "has 5 boxes, and Pad's boxes=2"),
        (Pad(((64, 96),)), {"segmentation": np.zeros((9, 9))}, "9 x 9 pixels .*data.geometry"),
        (Pad(((64, 96),)), {"image": np.zeros((H, W, 3), np.uint8)}, "must come after Standardize"),
    ],
)
def test_what_does_not_fit_says_why(pad, example, text):
    with pytest.raises(ConfigError, match=text):
        pad(Standardize()(rectangles(), None) | example)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (Resize, {"size": 5}, "size=5"),
        (ResizeShortSide, {"sizes": ()}, r"sizes=\(\)"),
        (ResizeShortSide, {"longest": 0}, "longest=0"),
        (ResizeShortSide, {"interpolation": "bilinaer"}, "'bilinear'"),
        (ResizeOrCrop, {"part": (3,)}, r"part=\(3,\)"),
        (ResizeOrCrop, {"p": 2}, "p=2"),
        (ScaleJitterCrop, {"size": (4, 4), "scale": (2, 1)}, "scale"),
        (ScaleJitterCrop, {"size": (4, 4), "most": -1}, "most=-1"),
        (RandomFlip, {"p": -1}, "p=-1"),
        (Pad, {"shapes": ()}, r"shapes=\(\)"),
        (Pad, {"shapes": (4, 4)}, "must be pairs"),
        (Pad, {"shapes": ((4, 8), (8, 4))}, r"must hold \(8, 8\) too"),
        (Pad, {"shapes": ((4, 8),), "masks": True}, "boxes=0"),
    ],
)
def test_values_that_cannot_be_are_refused(kind, options, text):
    with pytest.raises(ValueError, match=text):
        kind(**options)


def test_plain_data_builds_the_padding():
    spec = {"target": "data.geometry.Pad", "shapes": [[64, 96]], "boxes": 3}
    assert build(spec) == Pad(((64, 96),), boxes=3)


def test_every_public_step_is_tested_here():
    kinds = [v for v in vars(geometry).values() if isinstance(v, type) and hasattr(v, "sized")]
    public = {kind for kind in kinds if not kind.__name__.startswith("_")}
    assert public == {type(transform) for transform in TRANSFORMS}
