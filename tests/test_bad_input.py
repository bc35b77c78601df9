"""What people's boxes and masks get wrong: one sentence each, with the picture and the value."""

import json
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from PIL import Image

from vit_jax import main
from vit_jax.data import pipeline
from vit_jax.data.geometry import Pad, RandomFlip, ResizeShortSide
from vit_jax.data.transforms import Standardize
from vit_jax.errors import ConfigError, DataError

NAMES = ("cat", "dog")


@dataclass
class Given:
    """A dataset of given examples."""

    examples: list
    class_names: tuple = NAMES

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def name(self, index):
        return f"photo_{index}.jpg"


def example(boxes=((1, 1, 5, 6),), labels=None, size=(12, 16), **more):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), np.int32) if labels is None else np.array(labels, np.int32)
    image = np.full((*size, 3), 100, np.uint8)
    return {"image": image, "boxes": boxes, "box_label": labels} | more


def batch_of(*examples, pad=None, threads=0, steps=()):
    steps = [*steps, RandomFlip(), Standardize(), pad or Pad(((12, 16),), boxes=3, masks=False)]
    data = Given(list(examples))
    found = pipeline.eval_batches(data, steps, batch_size=len(data), threads=threads)
    return next(found)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (example(labels=[2]), "an object has the class id 2, and the data says that there are 2"),
        (example(labels=[-1]), "an object has the class id -1"),
        (example([(5, 1, 1, 6)]), r"box 0 is inverted: .* = \(5, 1, 1, 6\)"),
        (example([(1, 1, 3, 3), (1, 1, np.nan, 6)]), "box 1 is not finite: .*nan"),
        (example(labels=[0, 1]), "1 boxes, 2 box_label"),
        (example(segmentation=np.full((12, 16), 2, np.uint8)), "a pixel has the class id 2"),
        (example(segmentation=np.zeros((12, 15), np.uint8)), "segmentation have 12 x 15 pixels"),
        (example(masks=np.zeros((1, 16, 12), bool)), r"its masks have 16 x 12 pixels .* 12 x 16"),
    ],
)
def test_a_picture_whose_annotation_cannot_be_stops_the_run_with_its_name(wrong, text, threads):
    with pytest.raises(DataError, match=rf"^photo_1\.jpg: .*{text}"):
        batch_of(example(), wrong, threads=threads)


def test_boxes_that_reach_out_of_the_picture_are_cut_and_those_outside_are_dropped():
    boxes = [(-3, 2, 8, 6), (20, 2, 30, 6), (3, 3, 3, 9)]
    batch = batch_of(example(boxes, labels=[1, 0, 0]), steps=[ResizeShortSide((12,), None)])
    assert batch["box_label"][0].tolist() == [1, -1, -1]
    left, right = batch["boxes"][0, 0, 0] - batch["boxes"][0, 0, 2] / 2, batch["boxes"][0, 0, 2]
    assert min(left, 1 - left - right) == pytest.approx(0)
    assert right == pytest.approx(8 / 16)


def test_more_boxes_than_there_is_room_for_are_counted():
    with pytest.raises(ConfigError, match=r"photo_1\.jpg has 4 boxes, .*boxes=3.* set it to 4"):
        batch_of(example(), example([(1, 1, 5, 6)] * 4))


def test_a_picture_larger_than_the_largest_shape_is_named():
    for shapes in (((12, 16),), ((12, 16), (16, 12), (16, 16))):
        pad = Pad(shapes, boxes=3)
        with pytest.raises(ConfigError, match=r"photo_1\.jpg is 12 x 20 pixels .* fits none of"):
            batch_of(example(), example(size=(12, 20)), pad=pad)


def test_a_picture_without_objects_is_an_example_like_others():
    batch = batch_of(example([]), example())
    assert batch["valid"].all()
    assert (batch["box_label"] >= 0).sum(1).tolist() == [0, 1]


def picture(path, size=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), 100, np.uint8))


def coco_folder(root, count=3, **changes):
    """A folder in COCO's form; `changes` are made to the first annotation."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for i in range(count):
        picture(root / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": 12, "width": 16})
        box = {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16}
        content["annotations"].append(box)
    content["annotations"][0] |= changes
    for name in ("train", "val"):
        (root / f"instances_{name}.json").write_text(json.dumps(content))
    return root


def said(capsys, root, recipe, *arguments, status=3):
    """What the command line says of a folder, as one line."""
    workdir = root.parent / "run"
    argv = [f"--config=configs/{recipe}", f"--config.data.data_dir={root}", *arguments]
    assert main.main([*argv, f"--workdir={workdir}"]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert not workdir.exists()
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bbox": [5, 5, -2, 3]}, "bbox=[5, 5, -2, 3]: width and height must not be negative"),
        ({"bbox": [5, 5, float("nan"), 3]}, "0.png: box 0 is not finite"),
        ({"category_id": 7}, "category_id=7, which is none of the 1 categories (1 cat)"),
        ({"image_id": 9}, "is of image_id=9, and there is no such image"),
    ],
)
def test_a_wrong_annotation_ends_the_command_with_one_sentence(changes, text, tmp_path, capsys):
    root = coco_folder(tmp_path / "data", **changes)
    assert text in said(capsys, root, "detr.py:folder")


def test_an_annotation_of_a_missing_picture_ends_the_command(tmp_path, capsys):
    root = coco_folder(tmp_path / "data")
    (root / "1.png").unlink()
    assert "annotates '1.png', missing in" in said(capsys, root, "detr.py:folder")


def test_a_head_for_fewer_classes_than_the_data_has_is_named_with_both_numbers(tmp_path, capsys):
    root = tmp_path / "data"
    for part in ("images", "masks"):
        for i in range(4):
            picture(root / part / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(map(str, range(101))))
    text = said(capsys, root, "setr.py:folder", "--config.model.num_classes=2")
    assert "masks has 101 classes and the head only 2" in text


@pytest.mark.parametrize("kind", ["16 bits", "palette"])
def test_masks_of_16_bits_and_of_palettes_hold_their_numbers(kind, tmp_path):
    values = np.zeros((12, 16), np.uint16)
    values[3:5] = 1
    for i in range(4):
        picture(tmp_path / f"images/{i}.png")
        path = tmp_path / f"masks/{i}.png"
        path.parent.mkdir(exist_ok=True)
        if kind == "palette":
            mask = Image.fromarray(values.astype(np.uint8), "L").convert("P")
            mask.putdata(values.ravel().tolist())
            mask.putpalette([200, 10, 10, 10, 200, 10] + [0] * 762)
            mask.save(path)
        else:
            cv2.imwrite(str(path), values)
    data = pipeline.open_dataset("masks", "train", str(tmp_path), class_names=("sky", "sea"))
    np.testing.assert_array_equal(data[0]["segmentation"], values)


def test_a_mask_of_another_size_or_value_leaves_its_picture_out_and_says_why(tmp_path):
    for i, (size, value) in enumerate([((12, 16), 1), ((12, 15), 1), ((12, 16), 9), ((12, 16), 0)]):
        picture(tmp_path / f"train/images/{i}.png")
        path = tmp_path / f"train/masks/{i}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full(size, value, np.uint8))
    data = pipeline.open_dataset("masks", "train", str(tmp_path), class_names=("sky", "sea"))
    batch = next(pipeline.eval_batches(data, [Standardize(), Pad(((12, 16),))], batch_size=4))
    assert batch["valid"].tolist() == [True, False, False, True]
    first, second = pipeline.broken(batch, data)
    assert "1.png: its mask is 12 x 15 pixels" in first
    assert "2.png: its mask has the value 9 at 192 pixels" in second


@pytest.mark.parametrize("part", ["train", "val"])
def test_more_objects_than_queries_end_the_command_before_anything_is_trained(
    part, tmp_path, capsys
):
    root = coco_folder(tmp_path / "data")
    content = json.loads((root / f"instances_{part}.json").read_text())
    content["annotations"] = [content["annotations"][0] | {"id": i} for i in range(5)]
    (root / f"instances_{part}.json").write_text(json.dumps(content))
    text = said(capsys, root, "detr.py:folder", "--config.model.queries=4", status=2)
    assert "may have 5 boxes" in text
    assert "has 4 queries" in text
