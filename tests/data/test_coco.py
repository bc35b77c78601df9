"""Folders in COCO's form, right and wrong."""

import copy
import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from vit_jax.contracts import Dataset
from vit_jax.data import coco, pipeline
from vit_jax.data.geometry import Pad
from vit_jax.data.transforms import Standardize
from vit_jax.errors import ConfigError, DataError

H, W = 20, 30
CONTENT = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "height": H, "width": W},
        {"id": 3, "file_name": "b.jpg", "height": H, "width": W},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [2, 3, 10, 6.5], "iscrowd": 0},
        {
            "id": 2,
            "image_id": 7,
            "category_id": 1,
            "bbox": [0, 0, 30, 20],
            "iscrowd": 1,
            "area": 512,
        },
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
}


def picture(size=(H, W)):
    file = io.BytesIO()
    Image.new("RGB", size[::-1]).save(file, "jpeg")
    return file.getvalue()


def write(root, content=CONTENT, file="annotations/instances_train2017.json", folder="train2017"):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content))
    (root / folder).mkdir(exist_ok=True, parents=True)
    for name in ("a.jpg", "b.jpg"):
        (root / folder / name).write_bytes(picture())
    return root


def edited(**changes):
    """The content with changes in its second annotation."""
    content = copy.deepcopy(CONTENT)
    content["annotations"][1].update(changes)
    return content


def open_train(root, **options):
    return coco.open("train", data_dir=str(root), **options)


def test_published_folders_open(tmp_path):
    train = open_train(write(tmp_path))
    assert isinstance(train, Dataset)
    assert train.class_names == ("person", "dog")
    assert train.category_ids == (1, 18)
    assert [train.name(i) for i in range(len(train))] == ["a.jpg", "b.jpg"]
    assert train.image_ids == (7, 3)
    assert train.size(1) == (H, W)
    example = train[0]
    assert example["boxes"].tolist() == [[2, 3, 12, 9.5], [0, 0, 30, 20]]
    assert example["box_label"].tolist() == [1, 0]
    assert example["crowd"].tolist() == [False, True]
    assert example["area"].tolist() == [65, 512]
    none = train[1]
    assert none["boxes"].shape == (0, 4)
    assert none["box_label"].dtype == np.int32


def test_published_ids_are_labels_with_gaps(tmp_path):
    train = open_train(write(tmp_path), published_ids=True)
    assert len(train.class_names) == 19
    assert train[0]["box_label"].tolist() == [18, 1]
    assert (train.class_names[18], train.class_names[2]) == ("dog", "no class 2")


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_train.json", "images"),
        ("train.json", "."),
        ("annotations/person_train2017.json", "images/train2017"),
    ],
)
def test_other_arrangements_open(tmp_path, file, folder):
    write(tmp_path, file=file, folder=folder)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations" / "instances_val2017.json").write_text("not looked at")
    assert open_train(tmp_path)[0]["box_label"].tolist() == [1, 0]


def test_one_json_is_split_by_a_hash(tmp_path):
    content = copy.deepcopy(CONTENT)
    content["images"] = [
        {"id": i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in range(40)
    ]
    write(tmp_path, content, "annotations/instances_default.json", "images")
    for i in range(40):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(b"")
    parts = [coco.open(s, data_dir=str(tmp_path)).files for s in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(f"{i}.jpg" for i in range(40))
    assert 2 < len(parts[1]) < 16


def test_known_slips_are_dropped_or_cut_and_counted(tmp_path, caplog):
    content = edited(bbox=[25, 10, 8, 10])
    for number, box in enumerate(([1, 1, 0, 4], [40, 1, 5, 5], [0, 0, 30.4, 20])):
        content["annotations"].append(content["annotations"][0] | {"id": number, "bbox": box})
    with caplog.at_level(logging.WARNING):
        train = open_train(write(tmp_path, content))
    assert train[0]["boxes"].tolist() == [[2, 3, 12, 9.5], [25, 10, 30, 20], [0, 0, 30, 20]]
    assert "2 of 5 boxes have no area inside their picture and are dropped; 1 reach" in caplog.text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (edited(bbox=[5, 5, -2, 4]), r"annotation 2 has bbox=\[5, 5, -2, 4\].*negative"),
        (edited(bbox=[5, float("nan"), 2, 4]), r"a.jpg: box 1 is not finite"),
        (edited(bbox=[5, 5, 2]), "annotation 2 has bbox=.*four numbers"),
        (edited(bbox="no"), "annotation 2 has bbox='no'"),
        (edited(category_id=99), r"annotation 2 has category_id=99.*2 categories \(1 person, 18"),
        (edited(image_id=12), "annotation 2 is of image_id=12, and there is no such image"),
        ([], "not in COCO's form"),
        ({"images": []}, "no list 'annotations'"),
        (CONTENT | {"images": []}, "has no images"),
        (CONTENT | {"images": CONTENT["images"][:1] * 2}, "has two images with id=7"),
        (CONTENT | {"images": [{"id": 1}]}, "the image 1 has no 'file_name'"),
        (
            CONTENT | {"images": [CONTENT["images"][0] | {"height": 0}]},
            r"the image 7 has height and width \(0, 30\)",
        ),
    ],
)
def test_what_is_wrong_names_the_file_and_the_value(tmp_path, content, text):
    write(tmp_path, content)
    with pytest.raises(DataError, match=f"instances_train2017.json.*{text}"):
        open_train(tmp_path)


def test_a_missing_picture_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "train2017" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"annotates 'b.jpg', missing in .*train2017"):
        open_train(tmp_path)
    (tmp_path / "train2017" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"annotates 'a.jpg', and there is no such .*train2017"):
        open_train(tmp_path)


def test_a_picture_of_another_size_is_broken(tmp_path):
    write(tmp_path)
    (tmp_path / "train2017" / "b.jpg").write_bytes(picture((W, H)))
    train = open_train(tmp_path)
    (batch,) = pipeline.eval_batches(train, (Standardize(), Pad(((H, W),), boxes=2)), batch_size=2)
    assert batch["valid"].tolist() == [True, False]
    assert batch["box_label"].tolist() == [[1, -1], [-1, -1]]  # without the crowd
    assert pipeline.broken(batch, train) == [
        "b.jpg: is 30 x 20 pixels (height x width), but its annotations are for 20 x 30"
    ]


def test_polygons_and_run_lengths_become_masks(tmp_path):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["segmentation"] = [
        [2, 3, 12, 3, 12, 9, 2, 9],
        [20, 10, 24, 10, 24, 14, 20, 14],
    ]
    # 45 pixels of nothing down the columns, then 20 of something: column 2 from row 5 on.
    content["annotations"][1]["segmentation"] = {"size": [H, W], "counts": [45, 20, 535]}
    masks = open_train(write(tmp_path, content), masks=True)[0]["masks"]
    expected = np.zeros((2, H, W), bool)
    expected[0, 3:9, 2:12] = expected[0, 10:14, 20:24] = True
    expected[1, 5:, 2] = expected[1, :5, 3] = True
    np.testing.assert_array_equal(masks, expected)
    assert open_train(tmp_path, masks=True)[1]["masks"].shape == (0, H, W)


def test_packed_run_lengths_are_unpacked():
    # Written down by hand from the rule: 6 -> "6"; 40 = 8 + 32 -> "X1"; 7 -> "7"; from the fourth
    # number on, the difference to two before: 20 - 40 = -20 -> bits 01100 and 11111 -> "\\O".
    counts = [6, 40, 7, 20]
    mask = coco.drawn({"size": [73, 1], "counts": "6X17\\O"}, (73, 1))
    np.testing.assert_array_equal(mask[:, 0], np.repeat([False, True, False, True], counts))


@pytest.mark.parametrize(
    ("outline", "text"),
    [
        ([[1, 2, 3]], "a polygon of 3 numbers"),
        ({"size": [3, 4], "counts": [12]}, r"a mask of \[3, 4\] .* on a picture of \[20, 30\]"),
        ({"size": [20, 30], "counts": [12]}, "a mask of 12 pixels on a picture of 600"),
    ],
)
def test_outlines_that_are_none_say_so(outline, text):
    with pytest.raises(DataError, match=text):
        coco.drawn(outline, (H, W))


def test_a_slanted_polygon_has_its_own_area():
    mask = coco.drawn([[1.5, 2, 28, 4.5, 14, 18.5]], (H, W))
    area = abs((28 - 1.5) * (18.5 - 2) - (14 - 1.5) * (4.5 - 2)) / 2
    assert abs(mask.sum() - area) < 4


def test_folders_that_hold_no_coco_say_so(tmp_path):
    with pytest.raises(DataError, match="has no JSON of annotations"):
        open_train(tmp_path)
    with pytest.raises(DataError, match=r"has no 'x.json', which data.options names"):
        open_train(tmp_path, train_json="x.json")
    write(tmp_path)
    with pytest.raises(DataError, match=r"for validation .*data.options.validation_json"):
        coco.open("validation", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"no split 'trian'.*'train'"):
        coco.open("trian", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"coco has no option 'mask'.*'masks'"):
        pipeline.open_dataset("coco", "train", str(tmp_path), mask=True)
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(DataError, match=r"instances_train2017.json cannot be read"):
        open_train(tmp_path)
