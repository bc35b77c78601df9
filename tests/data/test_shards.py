"""Tar shards: what they hold, in which order it comes, and every way in which they are wrong."""

import io
import json
import logging
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vit_jax.contracts import Dataset
from vit_jax.data import headers, pipeline, shards
from vit_jax.data.text import captions_of
from vit_jax.data.transforms import Standardize
from vit_jax.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def no_cache_of_mine(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def picture(value=0):
    file = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), value % 256, np.uint8)).save(file, "png")
    return file.getvalue()


def pack(file, *members, form=tarfile.PAX_FORMAT):
    """A tar of (name, bytes)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def fill(folder, counts, first=0):
    """Shards of so many pictures, each with its number for a caption."""
    number = first
    for i, count in enumerate(counts):
        members = []
        for _ in range(count):
            members += [(f"{number:06d}.png", picture(number))]
            members += [(f"{number:06d}.txt", f"number {number}\n".encode())]
            number += 1
        pack(folder / f"cc-{i:06d}.tar", *members)


def said(dataset):
    return [dataset[i]["captions"][0] for i in range(len(dataset))]


def test_pictures_and_texts_of_one_stem_belong_together(tmp_path):
    long = "deep/" + "x" * 120
    members = [
        ("deep/", b""),
        ("b.txt", "zw\u00f6lf \u4f60\n".encode()),  # before its picture
        ("a.jpg", picture(1)),
        ("a.json", b'{"caption": "from json", "url": "x"}'),
        ("a.cls", b"3"),
        ("b.seg.png", picture(9)),  # another entry of b
        ("b.PNG", picture(2)),
        (f"{long}.webp", picture(3)),
        (f"{long}.json", b'{"captions": ["one", " two "]}'),
        (f"{long}.txt", b"the text comes first"),
        ("deep/a.png", picture(4)),
        ("deep/a.json", b'{"text": "another a"}'),
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        pack(tmp_path / "train/one.tar", *members, form=form)
        train = shards.open("train", data_dir=str(tmp_path))
        assert isinstance(train, Dataset)
        assert [train[i]["image"] for i in range(4)] == [picture(n) for n in (1, 2, 3, 4)]
        assert [train[i]["captions"] for i in range(4)] == [
            ("from json",),
            ("zw\u00f6lf \u4f60",),
            ("the text comes first",),
            ("another a",),
        ]
        names = [train.name(i) for i in range(4)]
        assert names[:2] == ["one.tar: a.jpg", "one.tar: b.PNG"]
        assert names[2].startswith("one.tar: ")
        assert captions_of(train)[1] == "zw\u00f6lf \u4f60"


def test_numbers_in_braces_name_the_shards(tmp_path):
    fill(tmp_path, [2, 3, 4, 5])
    pattern = str(tmp_path / "cc-{000001..000003}.tar")
    parts = [said(shards.open(split, data_dir=pattern)) for split in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(f"number {n}" for n in range(2, 14))
    assert all(parts)
    with pytest.raises(DataError, match=r"no shard .*cc-000004.tar, nor 1 others, which data_dir"):
        shards.open("train", data_dir=str(tmp_path / "cc-{000000..000005}.tar"))
    for wrong in ("cc-{a..b}.tar", "cc-{3..1}.tar", "{0..1}-{0..1}.tar", "cc-{0..1.tar"):
        with pytest.raises(DataError, match="wanted one range of numbers, such as FOLDER/cc-"):
            shards.open("train", data_dir=str(tmp_path / wrong))


def test_whole_shards_are_held_out_by_a_hash_of_their_names(tmp_path):
    fill(tmp_path, [3] * 12)
    parts = [set(said(shards.open(s, data_dir=str(tmp_path)))) for s in ("train", "validation")]
    assert len(parts[0] | parts[1]) == 36
    assert not parts[0] & parts[1]
    half = shards.open("validation", data_dir=str(tmp_path), validation_share=0.5)
    assert parts[1] < set(said(half))
    assert len({int(s.split()[1]) // 3 for s in parts[1]}) * 3 == len(parts[1])


def test_folders_for_the_splits_are_the_splits(tmp_path):
    fill(tmp_path / "train", [4])
    fill(tmp_path / "val", [2], first=50)
    assert len(shards.open("train", data_dir=str(tmp_path))) == 4
    held_out = pipeline.open_dataset("captions", "validation", str(tmp_path))
    assert said(held_out) == ["number 50", "number 51"]


def test_headers_are_read_once_and_again_where_a_shard_has_changed(tmp_path, monkeypatch):
    fill(tmp_path / "train", [3, 4, 5])
    read = []

    def reading(file):
        read.append(file.name)
        return original(file)

    original = headers.read_headers
    monkeypatch.setattr(headers, "read_headers", reading)
    first = shards.open("train", data_dir=str(tmp_path))
    assert sorted(read) == ["cc-000000.tar", "cc-000001.tar", "cc-000002.tar"]
    assert (tmp_path / "train" / headers.INDEX).is_file()
    read.clear()
    assert said(shards.open("train", data_dir=str(tmp_path))) == said(first)
    assert not read
    pack(tmp_path / "train/cc-000001.tar", ("x.png", picture()), ("x.txt", b"another"))
    later = shards.open("train", data_dir=str(tmp_path))
    assert read == ["cc-000001.tar"]
    assert said(later)[3:5] == ["another", "number 7"]
    os.utime(tmp_path / "train/cc-000002.tar", ns=(1, 1))
    shards.open("train", data_dir=str(tmp_path))
    assert read == ["cc-000001.tar", "cc-000002.tar"]
    with pytest.raises(DataError, match=r"cc-000001.tar has changed since its headers were read"):
        pickle.loads(pickle.dumps(first))[3]


def test_a_damaged_index_is_made_anew(tmp_path):
    fill(tmp_path / "train", [3])
    first = said(shards.open("train", data_dir=str(tmp_path)))
    place = tmp_path / "train" / headers.INDEX
    whole = place.read_bytes()
    for content in (b"", b"nonsense", whole[:-50], whole[: len(whole) // 2]):
        place.write_bytes(content)
        assert said(shards.open("train", data_dir=str(tmp_path))) == first
        assert place.read_bytes() == whole


def test_where_the_folder_cannot_be_written_the_index_lies_in_the_cache(tmp_path, monkeypatch):
    fill(tmp_path / "train", [3])
    write = headers._save
    refused = tmp_path / "train" / headers.INDEX
    monkeypatch.setattr(
        headers, "_save", lambda place, indices: place != refused and write(place, indices)
    )
    first = said(shards.open("train", data_dir=str(tmp_path)))
    assert not refused.exists()
    monkeypatch.setattr(headers, "read_headers", None)  # would fail
    assert said(shards.open("train", data_dir=str(tmp_path))) == first


def test_an_epoch_is_every_example_once_and_few_shards_at_a_time(tmp_path):
    counts = [5, 7, 3, 6] * 10
    fill(tmp_path / "train", counts)
    train = shards.open("train", data_dir=str(tmp_path))
    orders = [train.order(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    assert sorted(orders[0]) == list(range(sum(counts)))
    of_shard = np.repeat(np.arange(len(counts)), counts)[orders[0]]
    seen = [set(of_shard[i : i + 16]) for i in range(0, len(of_shard), 16)]
    assert max(map(len, seen)) <= 2 * shards.WINDOW
    first = of_shard[: np.flatnonzero(np.isin(of_shard, of_shard[:1]))[-1] + 1]
    assert len(set(first)) > 4  # neighbours are mixed
    assert list(dict.fromkeys(of_shard)) != sorted(set(of_shard))
    last = [np.flatnonzero(of_shard == s)[[0, -1]] for s in range(len(counts))]
    assert max(b - a for a, b in last) < shards.WINDOW * 7


def test_training_goes_through_few_shards_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "WINDOW", 1)
    fill(tmp_path / "train", [4] * 9)
    train = shards.open("train", data_dir=str(tmp_path))
    batches = pipeline.train_batches(train, (Standardize(),), batch_size=4, seed=3)
    of_shard = [set(next(batches)["index"] // 4) for _ in range(9)]
    assert all(len(found) == 1 for found in of_shard)
    assert len(set.union(*of_shard)) == 9


def test_training_batches_are_the_same_from_any_step_on_any_host_and_in_any_thread(tmp_path):
    fill(tmp_path / "train", [5, 7, 3, 6])
    train = shards.open("train", data_dir=str(tmp_path))

    def batches(start=0, **more):
        return pipeline.train_batches(
            train, (Standardize(),), batch_size=4, seed=3, start_step=start, **more
        )

    whole = [batch for _, batch in zip(range(12), batches())]
    assert all(batch["valid"].all() for batch in whole)
    indices = np.concatenate([batch["index"] for batch in whole])
    assert sorted(indices[:21]) == sorted(indices[21:42]) == list(range(21))
    np.testing.assert_array_equal(next(batches(9))["image"], whole[9]["image"])
    halves = [next(batches(2, process_index=p, process_count=2))["index"] for p in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), whole[2]["index"])
    threaded = batches(threads=3)
    for batch in whole[:4]:
        np.testing.assert_array_equal(next(threaded)["image"], batch["image"])
    threaded.close()


def test_few_files_stay_open_whoever_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", 2)
    fill(tmp_path / "train", [2] * 12)
    train = pickle.loads(pickle.dumps(shards.open("train", data_dir=str(tmp_path))))
    before = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).integers(0, 24, 400)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: train[int(i)]["captions"][0], order))
    assert found == [f"number {i}" for i in order]
    assert len(train._open) == 2
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_what_has_no_partner_is_counted_said_and_left_out(tmp_path, caplog):
    members = [("a.jpg", picture()), ("a.txt", b"a"), ("b.jpg", picture()), ("c.txt", b"c")]
    pack(tmp_path / "train/one.tar", *members)
    with caplog.at_level(logging.WARNING):
        assert len(shards.open("train", data_dir=str(tmp_path))) == 1
    assert "pictures without a text are left out: 1 (in one.tar)" in caplog.text
    assert "texts without a picture are left out: 1 (in one.tar)" in caplog.text


def test_a_wrong_text_is_a_broken_example_that_is_named(tmp_path):
    texts = {
        "a.txt": (b"caf\xe9", "its text is no UTF-8"),
        "b.txt": (b" \n", "its caption is empty"),
        "c.json": (b'{"caption": ', "its text is no JSON"),
        "d.json": (b'{"captoin": "d"}', "its caption is empty"),
        "e.json": (b"[3]", "its caption is empty"),
        "f.json": (b'{"caption": null}', "its caption is empty"),
    }
    members = [("whole.png", picture()), ("whole.txt", b"a dog")]
    for name, (content, _) in texts.items():
        members += [(f"{name[0]}.png", picture()), (name, content)]
    pack(tmp_path / "train/one.tar", *members)
    train = shards.open("train", data_dir=str(tmp_path))
    (batch,) = pipeline.eval_batches(train, (Standardize(),), batch_size=7)
    assert batch["valid"].tolist() == [True] + [False] * 6
    for text, (name, (_, reason)) in zip(pipeline.broken(batch, train), texts.items()):
        assert text.startswith(f"one.tar: {name[0]}.png: {reason}")


def wrong_folders(root):
    """(folder, what its error says)."""
    yield "none", "data_dir .*none does not exist"
    (root / "empty").mkdir()
    yield "empty", r"empty holds no .tar files, nor do folders train and val in it"
    fill(root / "half/val", [1])
    yield "half", r"half has shards, but none in a folder 'train' or 'training' for train"
    fill(root / "alone", [5])
    yield "alone", r"cc-000000.tar is the only shard, so none can be held out for validation: put"
    members = [("a.png", picture()), ("a.txt", b"a" * 2000), ("b.png", picture())]
    pack(root / "whole/train/one.tar", *members)
    whole = (root / "whole/train/one.tar").read_bytes()
    for name, length in {
        "header": 700,
        "picture": 600,
        "text": 2200,
        "last": 4300,
        "next": 3700,
    }.items():
        (root / f"cut-{name}/train").mkdir(parents=True)
        (root / f"cut-{name}/train/one.tar").write_bytes(whole[:length])
        yield f"cut-{name}", "one.tar is cut short: copy it again"
    for name, content in {
        "zeros": bytes(10),
        "text": b"these are no shards" * 60,
        "html": b"<html>not found</html>",
    }.items():
        (root / f"not-{name}/train").mkdir(parents=True)
        (root / f"not-{name}/train/one.tar").write_bytes(content)
        yield f"not-{name}", "one.tar is no tar file that can be read"
    for name in ("one.tar.gz", "one.tgz", "one.tar"):
        (root / f"packed-{name}/train").mkdir(parents=True)
        with tarfile.open(root / f"packed-{name}/train" / name, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("a.png"))
        yield f"packed-{name}", f"{name} is compressed, so that nothing can be read by its place"
    for name, second in {"twice": "a.png", "two": "a.jpg"}.items():
        twice = [("a.png", picture()), (second, picture()), ("a.txt", b"a")]
        pack(root / f"{name}/train/one.tar", *twice)
    yield "twice", "one.tar has 'a.png' twice: nobody knows which"
    yield "two", "one.tar has two pictures of one stem, 'a.png' and 'a.jpg'"
    pack(root / "mute/train/one.tar", ("a.png", picture()), ("a.cls", b"3"))
    yield "mute", r"no picture in .*mute/train has a text: wanted members such as 000.jpg with"


def test_wrong_shards_are_one_sentence_that_names_them(tmp_path):
    for name, text in wrong_folders(tmp_path):
        with pytest.raises(DataError, match=text) as error:
            shards.open("train", data_dir=str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"no split 'trian'. Did you mean 'train'"):
        shards.open("trian", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="validation_share=1 must lie between 0 and 1"):
        shards.open("train", data_dir=str(tmp_path), validation_share=1)


def test_a_shard_without_an_end_mark_is_read_with_a_warning(tmp_path, caplog):
    fill(tmp_path / "train", [1])
    file = tmp_path / "train/cc-000000.tar"
    os.truncate(file, 4 * 512)
    with caplog.at_level(logging.WARNING):
        assert said(shards.open("train", data_dir=str(tmp_path))) == ["number 0"]
    assert "cc-000000.tar has no end mark, so that it may be cut short" in caplog.text


def test_a_shard_that_shrinks_or_goes_while_it_is_read_is_a_data_error(tmp_path):
    fill(tmp_path / "train", [3, 3])
    train = shards.open("train", data_dir=str(tmp_path))
    assert said(train)[2] == "number 2"
    file = tmp_path / "train/cc-000000.tar"
    os.truncate(file, 600)
    with pytest.raises(DataError, match=r"cc-000000.tar was cut short since its headers were read"):
        train[2]
    assert train.name(2).startswith("cc-000000.tar: number 2")
    (tmp_path / "train/cc-000001.tar").unlink()
    with pytest.raises(DataError, match=r"cc-000001.tar cannot be read: No such file"):
        pickle.loads(pickle.dumps(train))[4]


def test_an_index_speaks_json_that_others_can_read(tmp_path):
    fill(tmp_path / "train", [2])
    shards.open("train", data_dir=str(tmp_path))
    with np.load(tmp_path / "train" / headers.INDEX) as arrays:
        assert json.loads(arrays["names"].tobytes()) == ["cc-000000.tar"]
        block, length = arrays["places"][1, :2].tolist()
    whole = (tmp_path / "train/cc-000000.tar").read_bytes()
    assert whole[512 * block : 512 * block + length] == picture(1)
