"""Folders of pictures with masks, right and wrong."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from vit_jax.contracts import Dataset
from vit_jax.data import masks, pipeline
from vit_jax.data.geometry import Pad
from vit_jax.data.masks import Classes, read_mask
from vit_jax.data.transforms import Standardize
from vit_jax.errors import ConfigError, DataError

VALUES = np.array([[0, 1, 2, 255, 1], [2, 2, 0, 0, 1], [1, 1, 1, 1, 0]], np.uint8)


def packed(array, kind="png", palette=False):
    picture = Image.fromarray(array)
    if palette:
        picture.putpalette([7 * n % 256 for n in range(768)])  # grey becomes a palette
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def write(root, files):
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def picture(height=3, width=5):
    return packed(np.full((height, width, 3), 90, np.uint8))


def pairs(root, *stems, pictures="images", drawn="masks", values=VALUES):
    for stem in stems:
        write(root, {f"{pictures}/{stem}.png": picture(), f"{drawn}/{stem}.png": packed(values)})
    (root / "classes.txt").write_text("sky\nroad\n\ntree\n")


def names(dataset):
    return [dataset.name(i) for i in range(len(dataset))]


def test_pictures_and_masks_of_the_same_stem_belong_together(tmp_path):
    pairs(tmp_path, "train/b", "train/deep/a", "val/c")
    train = masks.open("train", data_dir=str(tmp_path))
    assert isinstance(train, Dataset)
    assert train.class_names == ("sky", "road", "tree")
    assert names(train) == ["images/train/b.png", "images/train/deep/a.png"]
    assert train.size(0) == (3, 5)
    np.testing.assert_array_equal(train[1]["segmentation"], VALUES)
    assert train[1]["segmentation"].dtype == np.uint8
    assert names(masks.open("validation", data_dir=str(tmp_path))) == ["images/val/c.png"]


@pytest.mark.parametrize(
    ("pictures", "drawn"),
    [("train/images", "train/masks"), ("images/training", "annotations/training")],
)
def test_splits_may_be_arranged_both_ways(tmp_path, pictures, drawn):
    pairs(tmp_path, "a", pictures=pictures, drawn=drawn)
    other = [
        path.replace("training", "validation").replace("train", "val") for path in (pictures, drawn)
    ]
    pairs(tmp_path, "b", pictures=other[0], drawn=other[1])
    for split, stem in {"train": "a", "validation": "b"}.items():
        assert names(masks.open(split, data_dir=str(tmp_path)))[0].endswith(f"/{stem}.png")


def test_without_folders_for_splits_a_hash_holds_some_out(tmp_path):
    pairs(tmp_path, *(f"{i}" for i in range(60)))
    parts = [names(masks.open(s, data_dir=str(tmp_path))) for s in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(f"images/{i}.png" for i in range(60))
    assert 4 < len(parts[1]) < 22
    pairs(tmp_path, "new")
    assert set(parts[1]) <= set(names(masks.open("validation", data_dir=str(tmp_path)))) | {
        "images/new.png"
    }


def test_palettes_and_sixteen_bits_and_grey_spelt_out_are_values():
    np.testing.assert_array_equal(read_mask(packed(VALUES)), VALUES)
    np.testing.assert_array_equal(read_mask(packed(VALUES, palette=True)), VALUES)
    np.testing.assert_array_equal(read_mask(packed(VALUES, "tiff")), VALUES)
    wide = VALUES.astype(np.uint16) * 256 + 1
    np.testing.assert_array_equal(read_mask(packed(wide)), wide)
    np.testing.assert_array_equal(read_mask(packed(np.repeat(VALUES[..., None], 3, 2))), VALUES)
    np.testing.assert_array_equal(read_mask(packed(VALUES > 0)), VALUES > 0)  # one bit


def test_values_become_classes():
    values = np.array([[0, 1, 3], [2, 255, 65535]])
    classes = Classes(("a", "b", "c"), first=1, ignored=(0,))
    assert classes.labels(values).tolist() == [[255, 0, 2], [1, 255, 255]]
    with pytest.raises(DataError, match="the value 3 at 1 pixels, but the 2 classes are 1 to 2"):
        Classes(("a", "b"), first=1, ignored=(0,)).labels(values)
    with pytest.raises(ConfigError, match="0 classes"):
        Classes(())


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (packed(VALUES[:2]), r"its mask is 2 x 5 pixels .*, and the picture 3 x 5"),
        (packed(VALUES + 1), r"the value 3 at .* the 3 classes are 0 to 2"),
        (packed(np.random.default_rng(0).integers(0, 9, (3, 5, 3), np.uint8)), "coloured"),
        (packed(VALUES, "jpeg"), "its mask is a JPEG"),
        (b"I am text", "its mask is no picture"),
        (packed(VALUES)[:50], "its mask is damaged"),
        (b"", "its mask is no picture"),
    ],
    ids=["size", "value", "colour", "jpeg", "text", "cut", "empty"],
)
def test_a_wrong_mask_makes_a_broken_picture_that_is_named(tmp_path, mask, text):
    pairs(tmp_path, "train/a", "train/b", "val/c")
    write(tmp_path, {"masks/train/b.png": mask})
    train = masks.open("train", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=text):
        train[1]
    transforms = (Standardize(), Pad(((4, 8),)))
    (batch,) = pipeline.eval_batches(train, transforms, batch_size=2)
    assert batch["valid"].tolist() == [True, False]
    (said,) = pipeline.broken(batch, train)
    assert said.startswith("images/train/b.png: ")


def test_pictures_without_a_mask_are_counted_and_left_out(tmp_path, caplog):
    pairs(tmp_path, "train/a", "val/c")
    write(tmp_path, {"images/train/x.png": picture(), "images/train/y.png": picture()})
    with caplog.at_level(logging.WARNING):
        assert len(masks.open("train", data_dir=str(tmp_path))) == 1
    assert "pictures without a mask are left out: 2 (x, y)" in caplog.text


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "must hold a folder of pictures"),
        ({"images/a.png": b""}, "and one of masks"),
        ({"images/t.txt": b"", "masks/a.png": b""}, "images is empty"),
        ({"images/a.png": b"", "masks/b.png": b""}, r"mask .*b.png has no picture 'b'"),
        ({"images/a.png": b"", "masks/a.jpg": b""}, "must be a PNG, TIFF or BMP"),
        ({"images/a.png": b"", "masks/a.png": b""}, "one picture alone"),
        ({"images/train/a.png": b"", "masks/train/a.png": b""}, "nothing for validation"),
    ],
)
def test_folders_that_are_arranged_otherwise_say_why(tmp_path, files, text):
    write(tmp_path, files)
    (tmp_path / "classes.txt").write_text("sky\n")
    with pytest.raises(DataError, match=text):
        masks.open("validation", data_dir=str(tmp_path))


def test_classes_need_names(tmp_path):
    pairs(tmp_path, "train/a", "val/b")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"nothing says what the values .*classes.txt"):
        masks.open("train", data_dir=str(tmp_path))
    named = masks.open(
        "train", data_dir=str(tmp_path), class_names=("b", "c"), ignored=(0,), first=1
    )
    assert named.class_names == ("b", "c")
    assert named[0]["segmentation"].tolist()[0] == [255, 0, 1, 255, 0]
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(DataError, match=r"classes.txt is empty"):
        masks.open("train", data_dir=str(tmp_path))


def test_options_that_cannot_be_say_so(tmp_path):
    with pytest.raises(ConfigError, match="no split 'tset'"):
        masks.open("tset", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="validation_share=2"):
        masks.open("train", data_dir=str(tmp_path), validation_share=2)
    with pytest.raises(DataError, match=r"needs --config.data.data_dir"):
        masks.open("train", data_dir="")
    with pytest.raises(DataError, match="does not exist"):
        masks.open("train", data_dir=str(tmp_path / "no"))
