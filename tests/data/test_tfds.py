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
    with pytest.raises(ConfigError, match=r"digits has no option 'share'\. It has none"):
        pipeline.open_dataset("digits", "train", share=0.1)


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
