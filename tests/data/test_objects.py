"""`data.objects`: a folder's form is found out, or what it lacks is said."""

import json

import cv2
import numpy as np
import pytest

from vit_jax.data import coco, objects, pipeline, voc
from vit_jax.data.geometry import Pad
from vit_jax.data.transforms import Standardize
from vit_jax.errors import ConfigError, DataError

BOXES = {"a": [[1, 2, 6, 8]], "b": [], "c": [[0, 0, 4, 4], [3, 1, 9, 7], [5, 5, 8, 9]]}


def picture(path, size=(10, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), 100, np.uint8))


def coco_folder(root, name="_annotations.coco.json"):
    images = [
        {"id": i, "file_name": f"{k}.png", "height": 10, "width": 12} for i, k in enumerate(BOXES)
    ]
    content = {"images": images, "annotations": [], "categories": [{"id": 7, "name": "cell"}]}
    for i, (key, boxes) in enumerate(BOXES.items()):
        picture(root / f"{key}.png")
        for x0, y0, x1, y1 in boxes:
            entry = {"image_id": i, "category_id": 7, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            content["annotations"].append(entry | {"id": len(content["annotations"])})
    (root / name).write_text(json.dumps(content))
    return root


def voc_folder(root):
    for key, boxes in BOXES.items():
        picture(root / f"{key}.png")
        found = "".join(
            f"<object><name>cell</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for x0, y0, x1, y1 in boxes
        )
        (root / f"{key}.xml").write_text(f"<annotation>{found}</annotation>")
    return root


@pytest.mark.parametrize(("make", "kind"), [(coco_folder, coco.Coco), (voc_folder, voc.Voc)])
def test_a_folder_of_either_form_is_opened_by_one_name(make, kind, tmp_path):
    root = make(tmp_path)
    splits = [pipeline.open_dataset("objects", s, str(root)) for s in ("train", "validation")]
    assert all(isinstance(data, kind) and data.class_names == ("cell",) for data in splits)
    found = {data.name(i): data[i]["boxes"] for data in splits for i in range(len(data))}
    for key, boxes in BOXES.items():
        np.testing.assert_array_equal(found[f"{key}.png"], np.reshape(boxes, (-1, 4)))
    assert max(data.fullest()[1] for data in splits) == 3


@pytest.mark.parametrize("make", [coco_folder, voc_folder])
def test_a_batch_has_as_many_boxes_as_the_fullest_picture(make, tmp_path):
    root = str(make(tmp_path))
    splits = [objects.open(s, data_dir=root) for s in ("train", "validation")]
    fullest = next(d for d in splits if d.fullest()[1] == 3)
    steps = [Standardize(), Pad(shapes=((10, 12),), boxes=-1)]
    batch = next(pipeline.eval_batches(fullest, steps, batch_size=2))
    assert batch["boxes"].shape == (2, 3, 4)
    with pytest.raises(ConfigError, match=r"c\.png has 3 boxes, and Pad's boxes=2 is the most"):
        next(pipeline.eval_batches(fullest, [steps[0], Pad(((10, 12),), 2)], batch_size=2))


def test_what_a_folder_lacks_is_said(tmp_path):
    with pytest.raises(DataError, match="is empty: it needs COCO's form"):
        objects.open("train", data_dir=str(tmp_path))
    picture(tmp_path / "images/a.png")
    with pytest.raises(DataError, match="has 1 pictures and no annotations"):
        objects.open("train", data_dir=str(tmp_path))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(DataError, match="seem to be YOLO's"):
        objects.open("train", data_dir=str(tmp_path))
    (tmp_path / "notes.json").write_text('{"images": []}')
    with pytest.raises(DataError, match=r"no JSON of boxes \(notes.json has none\)"):
        objects.open("train", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        objects.open("train", data_dir=str(tmp_path / "nowhere"))


def test_without_a_dataset_that_knows_pad_must_be_told_how_many_boxes(tmp_path):
    with pytest.raises(ConfigError, match="say how many boxes a picture may have"):
        Pad(((10, 12),), boxes=-1).fitted(["no", "dataset"])
