"""What published preprocessing configs say, and pictures of any kind through them."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.transforms import CenterCrop
from vit_jax.errors import CheckpointError, DataError
from vit_jax.pretrained import preprocess
from vit_jax.pretrained.preprocess import Preprocessing, short_side, standardize, step

LAST = standardize(preprocess.HALF, preprocess.HALF)
VIT = {"do_resize": True, "size": {"height": 24, "width": 32}, "resample": 2, "do_normalize": True}


def test_a_vit_processor_resizes_to_exactly_its_size():
    found = preprocess.from_hf(VIT | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert found.steps == (step("Resize", size=(24, 32), interpolation="bilinear"), LAST)
    assert found.size == (24, 32)


def test_an_old_feature_extractor_has_one_number_for_a_square():
    found = preprocess.from_hf({"feature_extractor_type": "ViTFeatureExtractor", "size": 224})
    assert found.steps[0] == step("Resize", size=(224, 224), interpolation="bilinear")


def test_deit_resizes_then_cuts_out_the_middle():
    config = VIT | {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3}
    found = preprocess.from_hf(config)
    assert [s["target"].split(".")[-1] for s in found.steps] == [
        "Resize",
        "CenterCrop",
        "Standardize",
    ]
    assert found.steps[0]["size"] == (256, 256)
    assert found.size == (224, 224)


@pytest.mark.parametrize(
    ("side", "steps"),
    [
        (224, [("Resize", 256), ("CenterCrop", (224, 224))]),  # the middle of the picture
        (384, [("Resize", (384, 384))]),  # the whole of it
    ],
)
def test_convnext_processors_crop_below_384_pixels(side, steps):
    config = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": side},
        "crop_pct": 0.875,
        "resample": 3,
    }
    found = preprocess.from_hf(config)
    assert [(s["target"].split(".")[-1], s["size"]) for s in found.steps[:-1]] == steps


def test_a_processor_may_leave_the_numbers_between_0_and_1():
    found = preprocess.from_hf(VIT | {"do_normalize": False})
    assert found.steps[-1] == standardize((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"resample": 9},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"size": {"longest_edge": 300}},
    ],
)
def test_a_setting_that_is_not_known_is_refused(wrong):
    with pytest.raises(CheckpointError, match=f"{next(iter(wrong))}"):
        preprocess.from_hf(VIT | wrong)


@pytest.mark.parametrize(
    "config",
    [
        VIT,
        VIT | {"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True},
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256},
         "do_center_crop": True, "crop_size": {"height": 224, "width": 200}, "resample": 3},
    ],
)  # fmt: skip
def test_what_is_written_for_transformers_is_read_back(config):
    found = preprocess.from_hf(config)
    assert preprocess.from_hf(preprocess.to_hf(found)) == found


def test_timm_resizes_by_a_share_of_the_short_side():
    found = preprocess.from_timm(
        {
            "input_size": [3, 224, 192],
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": [0.5] * 3,
        }
    )
    assert found.steps[0] == step(
        "ResizeCenterCrop", size=(224, 192), crop=0.9, interpolation="bicubic"
    )
    assert found.steps[-1]["mean"] == preprocess.HALF
    squashed = preprocess.from_timm({"crop_mode": "squash", "crop_pct": 1.0})
    assert squashed.steps[0]["size"] == (224, 224)
    with pytest.raises(CheckpointError, match="crop_mode='border'"):
        preprocess.from_timm({"crop_mode": "border"})


def test_another_size_keeps_the_proportions():
    found = Preprocessing((step("Resize", size=256), step("CenterCrop", size=(224, 224)), LAST))
    larger = found.resized((448, 448))
    assert (larger.steps[0]["size"], larger.size) == (512, (448, 448))
    exact = Preprocessing((step("Resize", size=(224, 224)), LAST)).resized((96, 128))
    assert exact.size == (96, 128)


@pytest.mark.parametrize("side", [60, 61, 7, 8])
def test_the_middle_is_cut_where_torchvision_cuts_it(side):
    image = np.arange(side * 5 * 3, dtype=np.uint8).reshape(side, 5, 3)
    cut = CenterCrop((8, 4))({"image": image}, None)["image"]
    assert cut.shape == (8, 4, 3)
    padded = np.pad(image, ((0, max(8 - side, 0)), (0, 0), (0, 0))) if side < 8 else image
    top = round((len(padded) - 8) / 2)  # of two middles torchvision takes the even one
    np.testing.assert_array_equal(cut, padded[top : top + 8, 0:4])


def test_pictures_of_any_kind_come_out_the_same(tmp_path):
    found = Preprocessing((step("Resize", size=(6, 9)), LAST))
    array = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue(), picture, array]
    whole = found(kinds)
    assert whole.shape == (5, 6, 9, 3)
    assert whole.dtype == np.float32
    for one in kinds:
        np.testing.assert_array_equal(found(one), whole[:1])
    np.testing.assert_array_equal(found(array[None] / 255), whole[:1])
    grey = found([array[..., 0], array[..., :1], Image.fromarray(array[..., 0])])
    np.testing.assert_array_equal(grey[0], grey[1])
    np.testing.assert_array_equal(grey[0], grey[2])
    assert np.ptp(grey, axis=-1).max() == 0


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (np.zeros((4, 5, 7), np.uint8), r"\(4, 5, 7\)"),
        (np.full((4, 5, 3), 2.0), "between 0 and 1"),
        (np.zeros((4, 5, 3), np.int64), "int64"),
        (b"hello", "starts with 'hello'"),
        ("no_such_file.jpg", "no_such_file.jpg: No such file"),
        ([], "no picture"),
    ],
)
def test_what_is_no_picture_is_refused(picture, said):
    with pytest.raises(DataError, match=said):
        Preprocessing((LAST,))(picture)


def test_pictures_that_keep_their_shapes_cannot_be_stacked():
    found = Preprocessing((step("Resize", size=6), LAST))
    assert found.size is None
    pictures = [np.zeros((6, 8, 3), np.uint8), np.zeros((6, 9, 3), np.uint8)]
    assert found(pictures[0]).shape == (1, 6, 8, 3)
    with pytest.raises(DataError, match="several sizes"):
        found(pictures)


def test_a_person_can_read_it():
    found = Preprocessing(
        (step("Resize", size=256, interpolation="bicubic"), step("CenterCrop", size=224), LAST)
    )
    assert str(found) == (
        "resize the short side to 256, bicubic; cut out the middle 224; mean (0.5, 0.5, 0.5), std "
        "(0.5, 0.5, 0.5)"
    )


OLD_DETR = {
    "feature_extractor_type": "DetrFeatureExtractor",
    "format": "coco_detection",
    "do_resize": True,
    "size": 800,
    "max_size": 1333,
    "image_mean": list(preprocess.IMAGENET[0]),
    "image_std": list(preprocess.IMAGENET[1]),
}
NEW_DETR = {k: v for k, v in OLD_DETR.items() if k not in ("max_size", "feature_extractor_type")}
NEW_DETR |= {"image_processor_type": "DetrImageProcessor", "do_pad": True, "resample": 2}
NEW_DETR |= {"size": {"shortest_edge": 800, "longest_edge": 1333}}


@pytest.mark.parametrize("config", [OLD_DETR, NEW_DETR], ids=["old", "new"])
def test_detr_resizes_the_short_side_with_a_cap_on_the_long_one(config):
    found = preprocess.from_hf(config)
    assert found.steps == (short_side(800, 1333), standardize(*preprocess.IMAGENET))
    assert found.size is None
    assert found.typical == (832, 1088)  # 800 x 1066, in steps of 64
    assert found.one(np.zeros((48, 64, 3), np.uint8)).shape == (800, 1066, 3)
    assert found.one(np.zeros((50, 20, 3), np.uint8)).shape == (1332, 533, 3)
    written = preprocess.to_hf(found, "DetrImageProcessor")
    assert preprocess.from_hf(written) == found
    assert written["size"] == NEW_DETR["size"]
    assert written["do_pad"]


def test_a_segmenters_one_number_is_a_square():
    found = preprocess.from_hf({"feature_extractor_type": "SegformerFeatureExtractor", "size": 512})
    assert found.steps[0] == step("Resize", size=(512, 512), interpolation="bilinear")
    written = preprocess.to_hf(found, "SegformerImageProcessor")
    assert written["image_processor_type"] == "SegformerImageProcessor"
    assert preprocess.from_hf(written) == found


def test_a_batch_is_padded_to_its_largest_picture_and_says_where():
    found = Preprocessing((short_side(8, 20), LAST))
    batch = found.batch([np.full((4, 6, 3), 255, np.uint8), np.zeros((10, 5, 3), np.uint8)])
    assert batch["image"].shape == (2, 16, 12, 3)
    assert batch["image_mask"].sum((1, 2)).tolist() == [8 * 12, 16 * 8]
    assert (batch["image"][0, :8, :12] == 1).all()
    assert not batch["image"][~batch["image_mask"]].any()
    with pytest.raises(DataError, match=r"(?s)several sizes.*preprocess.batch"):
        found([np.zeros((4, 6, 3), np.uint8), np.zeros((10, 5, 3), np.uint8)])


def test_another_size_moves_both_sides_of_a_cap():
    found = Preprocessing((short_side(800, 1333), LAST)).resized((400, 400))
    assert found.steps[0] == short_side(400, 666)
