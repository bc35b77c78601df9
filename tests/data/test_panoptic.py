"""`data.panoptic`: segments from COCO's PNGs and JSON."""

import json

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import pipeline
from vit_jax.data.geometry import Pad, RandomFlip
from vit_jax.data.panoptic import read_ids
from vit_jax.data.transforms import Standardize
from vit_jax.errors import ConfigError, DataError

# Ids beyond a byte, and beyond two.
GRASS, COW, FAR, HERD = 7, 300, 70_000, 9_000_000
CATEGORIES = [
    {"id": 5, "name": "cow", "isthing": 1},
    {"id": 90, "name": "grass", "isthing": 0},
]


def ids_of():
    ids = np.full((10, 14), GRASS)
    ids[2:6, 3:8] = COW
    ids[7:9, 10:13] = FAR
    ids[0, :4] = HERD
    ids[9] = 0
    return ids


def folder(root, change=lambda content: None):
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    ids = ids_of()
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1).astype(np.uint8)
    (root / "val2017").mkdir(parents=True)
    (root / "annotations/panoptic_val2017").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (14, 10), (90, 100, 110)).save(root / f"val2017/{i}.jpg")
        Image.fromarray(colours).save(root / f"annotations/panoptic_val2017/{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.jpg", "height": 10, "width": 14})
        segments = [
            {"id": GRASS, "category_id": 90, "iscrowd": 0},
            {"id": COW, "category_id": 5, "iscrowd": 0},
            {"id": FAR, "category_id": 5, "iscrowd": 0},
            {"id": HERD, "category_id": 5, "iscrowd": 1},
        ]
        annotation = {"image_id": i, "file_name": f"{i}.png", "segments_info": segments}
        content["annotations"].append(annotation)
    change(content)
    (root / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
    return root


def opened(root, **options):
    return pipeline.open_dataset("panoptic", "validation", str(root), **options)


def test_segments_are_read_with_their_boxes_masks_and_classes(tmp_path):
    data = opened(folder(tmp_path))
    assert (len(data), data.class_names, data.things) == (2, ("cow", "grass"), (0,))
    assert (data.name(1), data.size(1), data.fullest()) == ("1.jpg", (10, 14), (0, 3))
    example = data[0]
    assert example["box_label"].tolist() == [1, 0, 0, 0]
    assert example["crowd"].tolist() == [False, False, False, True]
    assert example["boxes"][1:3].tolist() == [[3, 2, 8, 6], [10, 7, 13, 9]]
    for mask, number in zip(example["masks"], (GRASS, COW, FAR, HERD), strict=True):
        np.testing.assert_array_equal(mask, ids_of() == number)
    np.testing.assert_array_equal(example["area"], [126 - 20 - 6 - 4, 20, 6, 4])


def test_they_make_batches_with_masks_and_without_crowds(tmp_path):
    steps = [RandomFlip(), Standardize(), Pad(((12, 16),), boxes=-1, masks=True)]
    batch = next(pipeline.eval_batches(opened(folder(tmp_path)), steps, batch_size=2))
    assert batch["masks"].shape == (2, 3, 12, 16)
    assert batch["masks"].sum((2, 3)).tolist() == [[96, 20, 6]] * 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c["annotations"].pop(), "no annotation for the image 1"),
        (lambda c: c["annotations"][0].update(file_name="x.png"), r"names 'x\.png', missing in"),
        (lambda c: c["annotations"][1]["segments_info"][0].update(category_id=3), "category_id=3"),
        (lambda c: c["images"][0].update(file_name="y.jpg"), r"'y\.jpg'"),
    ],
)
def test_a_wrong_json_is_named(change, text, tmp_path):
    with pytest.raises(DataError, match=text):
        opened(folder(tmp_path, change))


def test_a_json_and_a_png_that_disagree_are_named_with_the_id(tmp_path):
    data = opened(folder(tmp_path, lambda c: c["annotations"][0]["segments_info"].pop()))
    with pytest.raises(DataError, match="id 9000000 is only in its PNG"):
        data[0]
    more = {"id": 12, "category_id": 5}
    other = folder(tmp_path / "b", lambda c: c["annotations"][0]["segments_info"].append(more))
    with pytest.raises(DataError, match="id 12 is only in the JSON"):
        opened(other)[0]


def test_what_is_no_folder_of_that_form_is_said(tmp_path):
    with pytest.raises(DataError, match=r"no JSON called panoptic_\.\.\. for validation"):
        opened(tmp_path)
    root = folder(tmp_path / "a")
    with pytest.raises(DataError, match=r"no folder .*nowhere; say where"):
        opened(root, segments="nowhere")
    with pytest.raises(ConfigError, match=r"has no split 'tset'"):
        pipeline.open_dataset("panoptic", "tset", str(root))
    grey = root / "annotations/panoptic_val2017/0.png"
    Image.new("L", (14, 10)).save(grey)
    with pytest.raises(DataError, match="a PNG of mode L"):
        read_ids(grey.read_bytes())
    with pytest.raises(DataError, match="damaged"):
        read_ids(b"nothing")
