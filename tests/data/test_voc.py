"""Folders in PASCAL VOC's form, right and wrong."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from vit_jax.contracts import Dataset
from vit_jax.data import pipeline, voc
from vit_jax.errors import ConfigError, DataError

H, W = 20, 30
BOX = {"xmin": 3, "ymin": 4, "xmax": 12, "ymax": 9}


def picture(size=(H, W)):
    file = io.BytesIO()
    Image.new("RGB", size[::-1]).save(file, "jpeg")
    return file.getvalue()


def xml(*objects, filename="a.jpg", size=(H, W)):
    """An annotation of (class, box, difficult)."""
    size = f"<size><width>{size[1]}</width><height>{size[0]}</height></size>" if size else ""
    parts = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in box.items())
        + "</bndbox></object>"
        for name, box, difficult in objects
    ]
    return f"<annotation><filename>{filename}</filename>{size}{''.join(parts)}</annotation>"


def write(root, annotations, folder="Annotations", pictures="JPEGImages"):
    for stem, text in annotations.items():
        for path, data in {
            f"{folder}/{stem}.xml": text.encode(),
            f"{pictures}/{stem}.jpg": picture(),
        }.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
    return root


def two(root, *objects):
    """A folder of two pictures, of which the lists say that the second is held out."""
    write(root, {"a": xml(*objects), "b": xml(("dog", BOX, 0))})
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b  1\n")
    return root


def open_train(root, **options):
    return voc.open("train", data_dir=str(root), **options)


def names(dataset):
    return [dataset.name(i) for i in range(len(dataset))]


def test_a_year_of_the_devkit_opens_with_its_lists(tmp_path):
    two(tmp_path, ("person", BOX, 0), ("dog", BOX | {"xmin": 1}, 1))
    train = open_train(tmp_path)
    assert isinstance(train, Dataset)
    assert train.class_names == voc.CLASSES
    assert names(train) == ["JPEGImages/a.jpg"]
    assert names(voc.open("validation", data_dir=str(tmp_path))) == ["JPEGImages/b.jpg"]
    example = train[0]
    # Pixels 3 to 12, counted from 1 and both in the box, are those between the edges 2 and 12.
    assert example["boxes"].tolist() == [[2, 3, 12, 9], [0, 3, 12, 9]]
    assert example["box_label"].tolist() == [14, 11]
    assert example["crowd"].tolist() == [False, True]
    assert train.size(0) == (H, W)
    edges = open_train(tmp_path, one_based=False)[0]["boxes"]
    assert edges.tolist()[0] == [3, 4, 12, 9]


@pytest.mark.parametrize(
    ("folder", "pictures"),
    [
        ("train", "train"),
        ("train/annotations", "train/images"),
        ("annotations/train", "images/train"),
    ],
)
def test_folders_may_be_the_splits(tmp_path, folder, pictures):
    write(tmp_path, {"a": xml(("cell", BOX, 0))}, folder, pictures)
    other = [path.replace("train", "valid") for path in (folder, pictures)]
    write(tmp_path, {"b": xml(("virus", BOX, 0))}, *other)
    assert names(open_train(tmp_path)) == [f"{pictures}/a.jpg"]
    held_out = voc.open("validation", data_dir=str(tmp_path))
    assert names(held_out) == [f"{other[1]}/b.jpg"]
    assert held_out.class_names == ("cell", "virus")
    assert held_out[0]["box_label"].tolist() == [1]


def test_without_splits_a_hash_holds_some_out(tmp_path):
    write(tmp_path, {f"{i}": xml(("cell", BOX, 0)) for i in range(40)}, ".", ".")
    parts = [names(voc.open(s, data_dir=str(tmp_path))) for s in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(f"{i}.jpg" for i in range(40))
    assert 2 < len(parts[1]) < 16


def test_a_picture_may_have_no_objects_and_an_annotation_no_size(tmp_path):
    two(tmp_path)
    write(tmp_path, {"b": xml(("dog", BOX, 0), size=None)})
    assert open_train(tmp_path)[0]["boxes"].shape == (0, 4)
    held_out = voc.open("validation", data_dir=str(tmp_path))
    assert held_out.size(0) == (H, W)
    assert len(held_out[0]["boxes"]) == 1


def test_known_slips_are_dropped_or_cut_and_counted(tmp_path, caplog):
    far = {"xmin": 25, "ymin": 1, "xmax": 36, "ymax": 20}
    none = {"xmin": 40, "ymin": 1, "xmax": 44, "ymax": 9}
    two(tmp_path, ("dog", far, 0), ("dog", none, 0), ("cat", BOX, 0))
    with caplog.at_level(logging.WARNING):
        train = open_train(tmp_path)
    assert train[0]["boxes"].tolist() == [[24, 0, 30, 20], [2, 3, 12, 9]]
    assert train[0]["box_label"].tolist() == [11, 7]
    assert "1 of 3 boxes have no area inside their picture" in caplog.text
    assert "1 reach out of it and are cut" in caplog.text


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (("dog", BOX | {"xmax": 1}, 0), r"object 0 \(dog\) has an inverted box: xmin=3.*xmax=1"),
        (("dog", BOX | {"ymin": "nan"}, 0), "object 0 has <bndbox><ymin> 'nan': no number"),
        (("dog", {"xmin": 1}, 0), "object 0 has no <bndbox><ymin>"),
        (("", BOX, 0), "object 0 has no <name>"),
    ],
)
def test_what_is_wrong_names_the_file_and_the_value(tmp_path, entry, text):
    with pytest.raises(DataError, match=f"a.xml: {text}"):
        open_train(two(tmp_path, entry))


def test_classes_beyond_the_names_are_refused(tmp_path):
    two(tmp_path, ("dgo", BOX, 0))
    text = "a.xml has an object of class 'dgo', which is none of the 2 .*'dog'"
    with pytest.raises(DataError, match=text):
        open_train(tmp_path, class_names=("cat", "dog"))
    assert open_train(tmp_path).class_names == ("dgo", "dog")


def test_a_missing_picture_is_named(tmp_path):
    two(tmp_path)
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a.xml annotates 'a.jpg', and there is no .*JPEGImages"):
        open_train(tmp_path)


def test_pictures_without_an_annotation_are_counted_and_left_out(tmp_path, caplog):
    two(tmp_path, ("dog", BOX, 0))
    (tmp_path / "JPEGImages" / "x.jpg").write_bytes(picture())
    with caplog.at_level(logging.WARNING):
        assert len(open_train(tmp_path)) == 1
    assert "pictures without an XML are left out: 1 (JPEGImages/x.jpg)" in caplog.text


def test_a_picture_of_another_size_is_a_data_error(tmp_path):
    two(tmp_path)
    (tmp_path / "JPEGImages" / "a.jpg").write_bytes(picture((9, 9)))
    with pytest.raises(DataError, match=r"is 9 x 9 pixels .* its annotation is for 20 x 30"):
        open_train(tmp_path)[0]


def test_the_stem_goes_before_the_name_inside(tmp_path):
    two(tmp_path, ("dog", BOX, 0))
    write(tmp_path, {"a": xml(("dog", BOX, 0), filename="b.jpg")})
    assert names(open_train(tmp_path)) == ["JPEGImages/a.jpg"]
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "old name.jpg")
    write(tmp_path, {"b": xml(("dog", BOX, 0))})
    text = xml(("dog", BOX, 0), filename="old name.jpg")
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    assert names(open_train(tmp_path)) == ["JPEGImages/old name.jpg"]
    np.testing.assert_array_equal(open_train(tmp_path)[0]["boxes"], [[2, 3, 12, 9]])


def test_folders_that_hold_no_voc_say_so(tmp_path):
    with pytest.raises(DataError, match="has no XML file"):
        open_train(tmp_path)
    (tmp_path / "a.xml").write_text("<html>")
    with pytest.raises(DataError, match=r"a.xml is no XML"):
        open_train(tmp_path)
    (tmp_path / "a.xml").write_text("<html></html>")
    with pytest.raises(DataError, match="its root is <html>"):
        open_train(tmp_path)
    (tmp_path / "a.xml").unlink()
    write(tmp_path, {"a": xml(), "b": xml()})
    with pytest.raises(DataError, match=r"none of the 2 XML files .* has an object"):
        open_train(tmp_path)
    two(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nx\n")
    with pytest.raises(DataError, match=r"train.txt lists 'x', which has no XML"):
        open_train(tmp_path)
    with pytest.raises(ConfigError, match=r"voc has no option 'classes'.*'class_names'"):
        pipeline.open_dataset("voc", "train", str(tmp_path), classes=1)
