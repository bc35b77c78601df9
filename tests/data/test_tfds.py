"""TFDS without TensorFlow: real CIFAR-10 where it lies beside the project, and sets made here."""

import io
import json
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.contracts import Dataset
from vit_jax.data import pipeline, tfds
from vit_jax.data.geometry import Pad, RandomFlip, ResizeOrCrop, ScaleJitterCrop
from vit_jax.data.transforms import Standardize
from vit_jax.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent.parent
SHARED = ROOT.parent / "shared" / "tfds"

needs_cifar10 = pytest.mark.skipif(
    not (SHARED / "cifar10").is_dir(), reason="no prepared cifar10 in ../shared/tfds"
)


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def prepare(root, name, splits, label="label", version="1.0.0"):
    """A prepared dataset of {split: number of pictures}, written as TFDS leaves it behind."""
    folder = root / name / version
    folder.mkdir(parents=True)
    kind = "tensorflow_datasets.core.features"
    features = {
        "image": {
            "pythonClassName": f"{kind}.image_feature.Image",
            "image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"},
        },
        label: {
            "pythonClassName": f"{kind}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "2"},
        },
    }
    dictionary = f"{kind}.features_dict.FeaturesDict"
    (folder / "features.json").write_text(
        json.dumps({"pythonClassName": dictionary, "featuresDict": {"features": features}})
    )
    (folder / f"{label}.labels.txt").write_text("cat\ndog\n")
    info = {
        "name": name,
        "version": version,
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(count)],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, count in splits.items()
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for split, count in splits.items():
        file = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for i in range(count):
            record = tf_example_pb2.Example()
            record.features.feature["image"].bytes_list.value.append(png(i))
            record.features.feature[label].int64_list.value.append(i % 2)
            writer.write(record.SerializeToString())
        writer.close()
    return folder


def test_a_copy_whose_builder_nobody_has_opens(tmp_path):
    prepare(tmp_path, "my_pets", {"train": 5, "validation": 3, "test": 2})
    train = pipeline.open_dataset("my_pets", "train", str(tmp_path))
    assert isinstance(train, Dataset)
    assert len(train) == 5
    assert train.class_names == ("cat", "dog")
    example = train[3]
    assert example == {"image": png(3), "label": 1}
    assert train.name(3) == "my_pets train 3"
    assert [e["label"] for e in train.__getitems__([4, 1, 1])] == [0, 1, 1]
    held_out = tfds.open("validation", name="my_pets", data_dir=str(tmp_path))
    assert (held_out.split, len(held_out)) == ("validation", 3)


def test_the_newest_version_is_taken_unless_one_is_named(tmp_path):
    prepare(tmp_path, "pets", {"train": 2}, version="2.0.0")
    prepare(tmp_path, "pets", {"train": 3}, version="10.0.0")
    assert len(tfds.open("train", name="pets", data_dir=str(tmp_path))) == 3
    assert len(tfds.open("train", name="pets:2.0.0", data_dir=str(tmp_path))) == 2


def test_test_stands_in_for_validation(tmp_path):
    prepare(tmp_path, "pets", {"train": 2, "test": 4})
    held_out = tfds.open("validation", name="pets", data_dir=str(tmp_path))
    assert (held_out.split, len(held_out), held_out.name(1)) == ("test", 4, "pets test 1")


def test_an_open_one_can_be_pickled(tmp_path):
    prepare(tmp_path, "pets", {"train": 4})
    train = tfds.open("train", name="pets", data_dir=str(tmp_path))
    assert train[2]["label"] == 0  # its files are open now
    assert pickle.loads(pickle.dumps(train))[3] == train[3]


def test_a_damaged_record_is_a_data_error(tmp_path):
    folder = prepare(tmp_path, "pets", {"train": 6})
    train = tfds.open("train", name="pets", data_dir=str(tmp_path))
    (file,) = folder.glob("*array_record*")
    data = bytearray(file.read_bytes())
    place = data.find(png(3)[-40:])  # the records are not compressed below any size of their own
    place = place if place >= 0 else len(data) // 4
    data[place : place + 200] = bytes(200)
    file.write_bytes(data)
    (batch,) = pipeline.eval_batches(train, (), batch_size=6)
    assert 0 < batch["valid"].sum() < 6  # the others are still read
    assert all("damaged record" in text for text in pipeline.broken(batch, train))


@pytest.mark.parametrize(
    ("splits", "label", "text"),
    [
        ({"test": 2}, "label", "has no train split, only .*'test'"),
        ({"train": 2}, "kind", "has no 'label' of the kind .*ClassLabel.*'kind'"),
    ],
)
def test_what_cannot_be_classified_says_why(tmp_path, splits, label, text):
    prepare(tmp_path, "pets", splits, label=label)
    with pytest.raises(DataError, match=text):
        tfds.open("train", name="pets", data_dir=str(tmp_path))


def test_a_misspelt_dataset_is_named_with_the_nearest(tmp_path, capfd):
    prepare(tmp_path, "my_pets", {"train": 1})
    for name, right in {"cifr10": "cifar10", "digitss": "digits", "my_pet": "my_pets"}.items():
        with pytest.raises(ConfigError, match=f"data.name='{name}'.*'{right}'"):
            pipeline.open_dataset(name, "train", str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_dataset_that_cannot_be_fetched_is_one_sentence(tmp_path, monkeypatch, capfd):
    import tensorflow_datasets

    def fails(*_, **__):
        raise OSError("Network is unreachable\nand more lines")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", fails)
    with pytest.raises(
        DataError, match=r"imagenet2012 is not prepared in data_dir=.*\(Network is"
    ) as e:
        pipeline.open_dataset("imagenet2012", "train", str(tmp_path))
    assert "\n" not in str(e.value)
    assert "tfds build imagenet2012" in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_without_a_network_nothing_is_tried_for_minutes(tmp_path, monkeypatch):
    def fails(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(DataError, match=r"not prepared in .*\(Name or service not known\)"):
        pipeline.open_dataset("cifar10", "train", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_options_of_another_dataset_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"folder has no option 'validation'.*validation_share"):
        pipeline.open_dataset("folder", "train", str(tmp_path), validation=0.1)
    with pytest.raises(ConfigError, match=r"digits has no option 'size'\. Valid: share\."):
        pipeline.open_dataset("digits", "train", size=8)


@needs_cifar10
def test_cifar10_is_all_there_without_tensorflow():
    code = f"""
import sys
from vit_jax.data import pipeline
a, b = (pipeline.open_dataset("cifar10", s, {str(SHARED)!r}) for s in ("train", "validation"))
image = pipeline.decoded(a[7])["image"]
print(len(a), len(b), b.split, a.class_names[9], image.shape)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("50000 10000 test truck (32, 32, 3)")


@needs_cifar10
def test_cifar10_evaluates_each_picture_once():
    held_out = pipeline.open_dataset("cifar10", "validation", str(SHARED))
    labels = np.zeros(10, int)
    for start in range(0, 10_000, 1000):
        examples = held_out.__getitems__(range(start, start + 1000))
        labels += np.bincount([e["label"] for e in examples], minlength=10)
    assert labels.tolist() == [1000] * 10


OBJECTS = {"bbox": [[0.0, 0.25, 0.5, 1.0], [0.5, 0.0, 0.5, 0.5]], "label": [2, 0]}


def prepare_dense(root, name, records, mask=None):
    """A prepared dataset with objects of three classes, or with a picture of classes."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    kind = "tensorflow_datasets.core.features"

    def image(channels):
        shape = {"dimensions": ["-1", "-1", channels]}
        return {
            "pythonClassName": f"{kind}.image_feature.Image",
            "image": {"shape": shape, "dtype": "uint8"},
        }

    def dictionary(features):
        return {
            "pythonClassName": f"{kind}.features_dict.FeaturesDict",
            "featuresDict": {"features": features},
        }

    box = {"shape": {"dimensions": ["4"]}, "dtype": "float32", "bboxFormat": "REL_YXYX"}
    one = {
        "bbox": {"pythonClassName": f"{kind}.bounding_boxes.BBoxFeature", "boundingBox": box},
        "label": {
            "pythonClassName": f"{kind}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "3"},
        },
    }
    many = {
        "pythonClassName": f"{kind}.sequence_feature.Sequence",
        "sequence": {"feature": dictionary(one), "length": "-1"},
    }
    features = {"image": image("3"), **({mask: image("1")} if mask else {"objects": many})}
    (folder / "features.json").write_text(json.dumps(dictionary(features)))
    (folder / "objects-label.labels.txt").write_text("cat\ndog\ncow\n")
    split = {
        "name": "train",
        "shardLengths": [str(len(records))],
        "numBytes": "1",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    file = folder / f"{name}-train.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for content in records:
        record = tf_example_pb2.Example()
        feature = record.features.feature
        feature["image"].bytes_list.value.append(png(7))
        if mask:
            feature[mask].bytes_list.value.append(content)
        else:
            boxes = np.ravel(content["bbox"]).tolist()
            feature["objects/bbox"].float_list.value.extend(boxes)
            feature["objects/label"].int64_list.value.extend(content["label"])
        writer.write(record.SerializeToString())
    writer.close()


def mask_png(values):
    file = io.BytesIO()
    Image.fromarray(np.array(values, np.uint8)).save(file, "png")
    return file.getvalue()


def test_objects_become_boxes_in_pixels(tmp_path):
    prepare_dense(tmp_path, "farm", [OBJECTS, {"bbox": [], "label": []}])
    train = pipeline.open_dataset("farm", "train", str(tmp_path))
    assert train.class_names == ("cat", "dog", "cow")
    example = train[0]
    assert example["boxes"].tolist() == [[1.25, 0, 5, 1.5]]  # of 5 x 3; the other has no area
    assert example["box_label"].tolist() == [2]
    assert train[1]["boxes"].shape == (0, 4)
    assert train.size(1) == (3, 5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"label": [2, 3]}, "a box has the class 3, but the 3 classes are 0 to 2"),
        ({"bbox": [[0.5, 0, 0, 1], [0, 0, 1, 1]]}, "box 0 is inverted"),
        ({"bbox": [[0, 0, 1, 1], [0, float("nan"), 1, 1]]}, "box 1 is not finite"),
    ],
)
def test_wrong_objects_make_a_broken_picture_that_is_named(tmp_path, change, text):
    prepare_dense(tmp_path, "farm", [OBJECTS, OBJECTS | change])
    train = tfds.open("train", name="farm", data_dir=str(tmp_path))
    steps = (Standardize(), Pad(((4, 8), (8, 8)), boxes=2))
    (batch,) = pipeline.eval_batches(train, steps, batch_size=2)
    assert batch["valid"].tolist() == [True, False]
    (said,) = pipeline.broken(batch, train)
    assert said.startswith(f"farm train 1: {text}")


def test_pictures_of_classes_need_names_which_some_have(tmp_path):
    whole = mask_png([[0, 1, 2, 1, 1], [150, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    prepare_dense(tmp_path, "scene_parse150", [whole, mask_png([[151]])], mask="annotation")
    train = tfds.open("train", name="scene_parse150", data_dir=str(tmp_path))
    assert len(train.class_names) == 150
    assert (train.class_names[0], train.class_names[149]) == ("wall", "flag")
    assert train[0]["segmentation"][:2].tolist() == [[255, 0, 1, 0, 0], [149, *[255] * 4]]
    with pytest.raises(DataError, match=r"its mask is 1 x 1 pixels .*, and the picture 3 x 5"):
        train[1]
    prepare_dense(tmp_path, "streets", [whole], mask="segmentation_mask")
    with pytest.raises(DataError, match=r"nothing says .* streets's masks .*options.class_names"):
        tfds.open("train", name="streets", data_dir=str(tmp_path))
    named = pipeline.open_dataset(
        "streets", "train", str(tmp_path), class_names=("a", "b", "c"), ignored=(150,)
    )
    assert named[0]["segmentation"][:2].tolist() == [[0, 1, 2, 1, 1], [255, 0, 0, 0, 0]]
    two = tfds.open("train", name="streets", data_dir=str(tmp_path), class_names=("a", "b"))
    with pytest.raises(DataError, match=r"the value 2 at 1 pixels, but the 2 classes are 0 to 1"):
        two[0]


def test_names_for_a_dataset_that_has_its_own_are_refused(tmp_path):
    prepare(tmp_path, "pets", {"train": 2})
    with pytest.raises(ConfigError, match=r"pets has names of its own"):
        tfds.open("train", name="pets", data_dir=str(tmp_path), class_names=("a",))


def test_coco_and_voc_open_their_prepared_copies(tmp_path):
    prepare_dense(tmp_path / "coco", "2017", [OBJECTS])
    prepare_dense(tmp_path / "voc", "2007", [OBJECTS])
    for name in ("coco", "voc"):
        train = pipeline.open_dataset(name, "train", str(tmp_path))
        assert train[0]["box_label"].tolist() == [2]


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason="no prepared bccd in ../shared/tfds")
def test_bccd_is_all_there():
    train = pipeline.open_dataset("bccd", "train", str(SHARED))
    held_out = pipeline.open_dataset("bccd", "validation", str(SHARED))
    assert (len(train), len(held_out)) == (205, 87)
    assert train.class_names == ("RBC", "WBC", "Platelets")
    examples = train.__getitems__(range(205))
    assert max(len(e["boxes"]) for e in examples) == 28
    assert {train.size(i) for i in range(9)} == {(480, 640)}
    steps = (
        RandomFlip(),
        ResizeOrCrop((96, 128), 200, (120,), (80, 110)),
        Standardize(),
        Pad(((128, 200), (200, 200)), boxes=28),
    )
    batches = pipeline.train_batches(train, steps, batch_size=4, seed=0)
    batch = next(batches)
    assert batch["valid"].all()
    assert (batch["boxes"][batch["box_label"] >= 0] > 0).all()


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="no prepared camvid in ../shared/tfds")
def test_camvid_is_all_there():
    train = pipeline.open_dataset("camvid", "train", str(SHARED))
    held_out = pipeline.open_dataset("camvid", "validation", str(SHARED))
    assert (len(train), len(held_out), len(train.class_names)) == (367, 101, 11)
    steps = (ScaleJitterCrop((96, 128)), RandomFlip(), Standardize(), Pad(((96, 128),)))
    batch = next(pipeline.train_batches(train, steps, batch_size=4, seed=0))
    assert set(np.unique(batch["segmentation"])) <= {*range(11), 255}
    assert batch.keys() == {"image", "image_mask", "segmentation", "valid", "index"}
