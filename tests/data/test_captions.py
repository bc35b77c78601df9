"""Pictures with captions: lists of one's own, COCO's form, TFDS's, and everything that is wrong."""

import io
import json
import logging

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.contracts import Dataset
from vit_jax.data import captions, pipeline
from vit_jax.data.text import captions_of
from vit_jax.data.transforms import Standardize
from vit_jax.errors import ConfigError, DataError


def png(value=0):
    file = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def write(root, *paths):
    for value, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(value))


def lines(file, *entries):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def contents(dataset):
    return {dataset.name(i): dataset[i]["captions"] for i in range(len(dataset))}


def test_a_list_of_json_lines_in_train_and_val(tmp_path):
    write(tmp_path, "train/a.png", "train/deep/er/b.JPG", "val/c.png")
    lines(
        tmp_path / "train/captions.jsonl",
        {"file": "deep/er/b.JPG", "captions": ["a dog", " two\u4f60 dogs "]},
        {"file": "a.png", "caption": "a cat"},
    )
    lines(tmp_path / "val/captions.jsonl", {"file": "./c.png", "caption": "a cow", "id": 3})
    train = captions.open("train", data_dir=str(tmp_path))
    assert isinstance(train, Dataset)
    assert contents(train) == {"deep/er/b.JPG": ("a dog", "two\u4f60 dogs"), "a.png": ("a cat",)}
    assert train[1]["image"] == png(0)
    assert train.size(0) == (3, 5)
    assert captions_of(train) == ["a dog", "two\u4f60 dogs", "a cat"]
    held_out = captions.open("validation", data_dir=str(tmp_path))
    assert contents(held_out) == {"c.png": ("a cow",)}


def test_a_list_with_tabs_may_have_several_lines_a_picture(tmp_path):
    write(tmp_path, "train/a b.png", "train/c.png", "val/d.png")
    text = "\ufeffa b.png\ta dog\r\n\nc.png\ta cat\r\na b.png\tit runs\tfast\n"
    (tmp_path / "train/captions.txt").write_bytes(text.encode())
    (tmp_path / "val/captions.txt").write_text("d.png\ta cow")
    train = captions.open("train", data_dir=str(tmp_path))
    assert contents(train) == {"a b.png": ("a dog", "it runs\tfast"), "c.png": ("a cat",)}
    (batch,) = pipeline.eval_batches(train, (Standardize(),), batch_size=2)
    assert batch["valid"].all()


def test_without_folders_for_the_splits_a_hash_holds_a_fifth_out(tmp_path):
    names = [f"{i}.png" for i in range(60)]
    write(tmp_path, *names)
    file = tmp_path / "captions.txt"
    file.write_text("".join(f"{name}\tnumber {name}\n" for name in names))
    parts = [set(contents(captions.open(s, data_dir=str(tmp_path)))) for s in captions.SPLITS]
    assert parts[0] | parts[1] == set(names)
    assert not parts[0] & parts[1]
    assert 4 < len(parts[1]) < 22
    write(tmp_path, "new.png")
    file.write_text(file.read_text() + "new.png\tanother\n" + "3.png\tonce more\n")
    later = [contents(captions.open(s, data_dir=str(tmp_path))) for s in captions.SPLITS]
    assert all(part <= set(now) for part, now in zip(parts, later))
    assert (later[0] | later[1])["3.png"] == ("number 3.png", "once more")
    half = captions.open("validation", data_dir=str(tmp_path), validation_share=0.5)
    assert parts[1] < set(contents(half))


def test_pictures_without_a_caption_are_counted_said_and_left_out(tmp_path, caplog):
    write(tmp_path, "train/a.png", "train/b.png", "train/deep/c.png", "val/d.png")
    (tmp_path / "train/notes.md").write_text("no picture")
    for split, name in (("train", "a"), ("val", "d")):
        (tmp_path / split / "captions.txt").write_text(f"{name}.png\ta dog\n")
    with caplog.at_level(logging.WARNING):
        train = captions.open("train", data_dir=str(tmp_path))
    assert len(train) == 1
    said = "pictures without a caption are left out: 2 of 3 (b.png, deep/c.png)"
    assert said in caplog.text


WRONG = {  # what is in captions.jsonl or captions.txt: what is said
    "captions.jsonl": {
        b'{"file": "a.png", "caption": "a dog"}\n{"file": "b.png", "caption": "caf\xe9"}\n': (
            r"line 2 of .*captions.jsonl is not UTF-8 \(the byte 0xe9\)"
        ),
        b'{"file": "a.png", "caption": " "}': "line 1 of .* has an empty caption",
        b'\n{"file": "a.png", "captions": ["a", ""]}': "line 2 of .* has an empty caption",
        b'{"file": "a.png", "captions": []}': r"line 1 of .* has captions=\[\]: wanted",
        b'{"file": "a.png", "captions": [3]}': "line 1 of .* has the caption 3, which is no text",
        b'{"file": "a.png", "captions": "a"}': "line 1 of .* has captions='a': wanted",
        b'{"file": "a.png", "caption": "\\ud83d"}': "line 1 of .* that is no Unicode",
        b'{"file": "a.png", "captoin": "a"}': "line 1 of .* has no 'caption': .* mean 'captoin'",
        b'{"flie": "a.png", "caption": "a"}': "line 1 of .* has no 'file': .* mean 'flie'",
        b'["a.png", "a dog"]': "line 1 of .*: wanted",
        b'{"file": "a.png", "caption": "a"': r"line 1 of .* is no JSON \(Expecting",
        b'{"file": "c.png", "caption": "a"}': (
            r"line 1 of .* is about 'c.png', and there is no such picture in .*'a.png'"
        ),
        b"": r"captions.jsonl is empty: it must hold a line",
    },
    "captions.txt": {
        b"a.png a dog": "line 1 of .* has no tab between the picture's name and its caption",
        b"a.png\ta dog\nb.png\t \n": "line 2 of .* has an empty caption",
        b"a.pgn\ta dog": r"about 'a.pgn', and there is no such picture in .*mean 'a.png'",
        b"\xff\xfea\x00": r"line 1 of .* is not UTF-8 \(the byte 0xff\)",
    },
}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [(name, content, said) for name, cases in WRONG.items() for content, said in cases.items()],
)
def test_a_wrong_list_is_one_sentence_that_names_the_line(tmp_path, name, content, said):
    write(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        captions.open("train", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def wrong_folders(root):
    """(folder, what its error says)."""
    yield "none", "data_dir .*none does not exist"
    (root / "empty").mkdir()
    yield (
        "empty",
        r"empty is empty: wanted captions.jsonl or captions.txt there or in train and val",
    )
    write(root, "bare/a.png", "bare/b.png")
    (root / "bare/table.csv").write_text("a.png,a dog")
    yield "bare", r"has 2 pictures and no captions \(table.csv is not read\): wanted captions.jsonl"
    write(root, "half/train/a.png")
    (root / "half/train/captions.txt").write_text("a.png\ta dog")
    yield "half", r"has train/captions.txt but nothing for validation: wanted a folder 'val' or"
    write(root, "both/a.png", "both/b.png")
    for name in captions.FILES:
        (root / "both" / name).write_text("")
    yield "both", r"has both captions.jsonl and captions.txt"
    write(root, "one/a.png")
    (root / "one/captions.txt").write_text("a.png\ta dog")
    yield "one", "one picture alone: none can be held out for validation"


def test_a_wrong_folder_says_what_was_looked_for(tmp_path):
    for name, said in wrong_folders(tmp_path):
        with pytest.raises(DataError, match=said) as error:
            captions.open("validation", data_dir=str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"needs --config.data.data_dir=FOLDER"):
        captions.open("train", data_dir="")
    with pytest.raises(ConfigError, match=r"no split 'vall'"):
        captions.open("vall", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="validation_share=0 must lie between 0 and 1"):
        captions.open("train", data_dir=str(tmp_path), validation_share=0)


def coco_json(*ids, captions_of_each=2):
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i:012d}.png", "height": 3, "width": 5} for i in ids],
        "annotations": [
            {"id": 10 * i + n, "image_id": i, "caption": f"{n} of {i}\n"}
            for n in range(captions_of_each)
            for i in ids
        ],
    }


def test_coco_captions_in_its_own_form(tmp_path):
    write(tmp_path, *(f"{s}2017/{i:012d}.png" for s, i in (("train", 7), ("train", 8), ("val", 9))))
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "captions_train2017.json").write_text(json.dumps(coco_json(8, 7)))
    (folder / "captions_val2017.json").write_text(json.dumps(coco_json(9)))
    (folder / "instances_train2017.json").write_text("{}")  # lies beside it in COCO's archive
    train = pipeline.open_dataset("captions", "train", str(tmp_path))
    assert contents(train) == {
        "000000000008.png": ("0 of 8", "1 of 8"),
        "000000000007.png": ("0 of 7", "1 of 7"),
    }
    assert train[1]["image"] == png(0)
    held_out = captions.open("validation", data_dir=str(tmp_path))
    assert list(contents(held_out)) == ["000000000009.png"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": []}, "has no captions"),
        ({"annotations": 3}, "has no list 'annotations'"),
        (
            {"annotations": [{"id": 5, "image_id": 4, "caption": "a"}]},
            "annotation 5 is of image_id",
        ),
        ({"annotations": [{"id": 5, "image_id": 1}]}, "the annotation 5 has no 'caption'"),
        (
            {"annotations": [{"id": 5, "image_id": 1, "caption": ""}]},
            "annotation 5 has an empty caption",
        ),
        ({"images": [{"id": 1}]}, "the image 1 has no 'file_name'"),
        ({"images": [{"id": 1, "file_name": "b.png"}]}, "annotates 'b.png', and there is no such"),
    ],
)
def test_wrong_captions_in_cocos_form_say_what_and_where(tmp_path, change, said):
    write(tmp_path, "train/000000000001.png")
    (tmp_path / "captions_train.json").write_text(json.dumps(coco_json(1) | change))
    with pytest.raises(DataError, match=said):
        captions.open("train", data_dir=str(tmp_path))


def prepare_tfds(root, splits, texts):
    """COCO's captions, as TFDS leaves them behind."""
    folder = root / "coco_captions" / "1.1.0"
    folder.mkdir(parents=True)
    kind = "tensorflow_datasets.core.features"

    def dictionary(features):
        return {
            "pythonClassName": f"{kind}.features_dict.FeaturesDict",
            "featuresDict": {"features": features},
        }

    words = {"pythonClassName": f"{kind}.text_feature.Text", "text": {}}
    whole = {"shape": {}, "dtype": "int64", "encoding": "none"}
    number = {"pythonClassName": f"{kind}.tensor_feature.Tensor", "tensor": whole}
    shape = {"dimensions": ["-1", "-1", "3"]}
    features = {
        "image": {
            "pythonClassName": f"{kind}.image_feature.Image",
            "image": {"shape": shape, "dtype": "uint8"},
        },
        "captions": {
            "pythonClassName": f"{kind}.sequence_feature.Sequence",
            "sequence": {"feature": dictionary({"text": words, "id": number}), "length": "-1"},
        },
    }
    (folder / "features.json").write_text(json.dumps(dictionary(features)))
    parts = [
        {
            "name": split,
            "shardLengths": [str(len(texts))],
            "numBytes": "1",
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split in splits
    ]
    info = {"name": "coco_captions", "version": "1.1.0", "fileFormat": "array_record"}
    (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": parts}))
    for split in splits:
        file = folder / f"coco_captions-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for own in texts:
            record = tf_example_pb2.Example()
            feature = record.features.feature
            feature["image"].bytes_list.value.append(png(7))
            feature["captions/text"].bytes_list.value.extend(own)
            feature["captions/id"].int64_list.value.extend(range(len(own)))
            writer.write(record.SerializeToString())
        writer.close()


def test_captions_that_tfds_prepared(tmp_path):
    texts = [["a dog \u4f60".encode(), b"two dogs"], [b"a cat"], [b" "], [b"caf\xe9"]]
    prepare_tfds(tmp_path, ("train", "val"), texts)
    for name in ("captions", "coco_captions"):
        train = pipeline.open_dataset(name, "train", str(tmp_path))
        assert train[0] == {"image": png(7), "captions": ("a dog \u4f60", "two dogs")}
        assert captions_of(train) == ["a dog \u4f60", "two dogs", "a cat"]  # without the broken
    held_out = pipeline.open_dataset("captions", "validation", str(tmp_path))
    assert held_out.split == "val"
    (batch,) = pipeline.eval_batches(held_out, (Standardize(),), batch_size=4)
    assert batch["valid"].tolist() == [True, True, False, False]
    said = pipeline.broken(batch, held_out)
    assert said[0] == "coco_captions val 2: its caption is empty"
    assert said[1].startswith("coco_captions val 3: a caption is not UTF-8")
