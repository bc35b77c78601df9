"""The stream of batches: the same for any threads, processes and hosts, and for any start."""

import dataclasses
import io
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import geometry, pipeline, scenes
from vit_jax.data.geometry import Pad, ResizeShortSide, boxes_of_masks
from vit_jax.data.transforms import (
    ColorJitter,
    MixUpCutMix,
    RandAugment,
    RandomCrop,
    RandomFlip,
    RandomResizedCrop,
    Resize,
    Standardize,
)
from vit_jax.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent.parent
TRANSFORMS = (RandomResizedCrop((6, 7)), RandomFlip(), RandAugment(), Standardize())


@dataclasses.dataclass
class Pictures:
    """`count` noisy pictures of 9x12, some of them broken in one way or the other."""

    count: int = 23
    broken: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ("a", "b", "c")

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(1, 256, (9, 12, 3), np.uint8)
        if index in self.broken:
            if index % 2:
                raise DataError("cannot be read: it rained")
            return {"image": b"I am text", "label": index % 3}
        return {"image": image, "label": index % 3}

    def name(self, index):
        return f"picture {index}"


class ManyAtOnce(Pictures):
    """The same, which also reads many at once, or none."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def train(dataset=None, transforms=TRANSFORMS, batch_size=8, steps=6, **options):
    options = {"seed": 4} | options
    batches = pipeline.train_batches(
        Pictures() if dataset is None else dataset, transforms, batch_size=batch_size, **options
    )
    got = list(itertools.islice(batches, steps))
    batches.close()
    return got


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], key)


def test_a_batch_holds_what_the_contract_says():
    (batch,) = train(steps=1, mix=MixUpCutMix(3))
    kinds = {key: (value.shape, str(value.dtype)) for key, value in batch.items()}
    assert kinds == {
        "image": ((8, 6, 7, 3), "float32"),
        "label": ((8,), "int32"),
        "label_probs": ((8, 3), "float32"),
        "valid": ((8,), "bool"),
        "index": ((8,), "int64"),
    }
    assert batch["valid"].all()
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)


class Photos(Pictures):
    """JPEG files of 120 x 90, larger than what is cut out of them; some are broken."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        if isinstance(example["image"], bytes):
            return example
        file = io.BytesIO()
        large = Image.fromarray(example["image"]).resize((120, 90), Image.Resampling.BICUBIC)
        large.save(file, "jpeg", quality=95)
        data = file.getvalue()
        return example | {"image": data[:-200] if index == 5 else data}


def test_a_crop_reads_large_files_itself_and_changes_little():
    photos = Photos(broken=(3, 10))
    got = train(photos)
    whole = (RandomResizedCrop((6, 7), reducing_gap=None), *TRANSFORMS[1:])
    expected = train(photos, whole)
    for a, b in zip(got, expected, strict=True):
        for key in ("label", "valid", "index"):
            np.testing.assert_array_equal(a[key], b[key])
        np.testing.assert_array_equal(a["valid"], ~np.isin(a["index"], (3, 5, 10)))
        assert not a["image"][~a["valid"]].any()
    difference = np.abs(np.stack([b["image"] for b in got]) - [b["image"] for b in expected])
    assert 0 < difference.mean() < 0.03  # in standard deviations
    # Of arrays all pixels are there, and are resized a little differently.
    got, expected = ([b["image"] for b in train(Pictures(), t)] for t in (TRANSFORMS, whole))
    difference = np.abs(np.stack(got) - expected)
    assert difference.mean() < 0.002  # one level in 3 % of the values


@pytest.mark.parametrize("mix", [None, MixUpCutMix(3)])
def test_threads_change_nothing(mix):
    expected = train(batch_size=70, mix=mix)
    for threads in (1, 4):
        assert_same(train(batch_size=70, mix=mix, threads=threads), expected)


@pytest.mark.parametrize("mix", [None, MixUpCutMix(3)])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_each_batch(hosts, mix):
    dataset = Pictures(broken=(3, 10))
    parts = [train(dataset, mix=mix, process_index=p, process_count=hosts) for p in range(hosts)]
    joined = [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts)
    ]
    assert_same(joined, train(dataset, mix=mix))


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_stream_that_starts_later_goes_on_as_if_never_stopped(start):
    mix = MixUpCutMix(3)
    assert_same(
        train(mix=mix, start_step=start, steps=6 - start, threads=2), train(mix=mix)[start:]
    )


def test_any_start_costs_the_same():
    began = time.monotonic()
    train(steps=1, start_step=10**9)
    assert time.monotonic() - began < 2


def test_each_epoch_sees_each_example_once_in_an_order_of_its_own():
    for count in (1, 2, 23):
        batches = train(Pictures(count), (Standardize(),), batch_size=count, steps=4)
        orders = [tuple(b["index"]) for b in batches]
        assert all(sorted(order) == list(range(count)) for order in orders)
    assert len(set(orders)) == 4
    # An epoch that does not fill whole batches goes on in the middle of one.
    indices = np.concatenate([b["index"] for b in train(batch_size=10, steps=23)])
    assert (np.bincount(indices) == 10).all()


def test_seeds_give_other_orders_and_other_chances():
    first, second = train(steps=1)[0], train(steps=1, seed=5)[0]
    assert (first["index"] != second["index"]).any()
    again = train(Pictures(1), batch_size=2, steps=3)  # one picture, time and again
    assert len({image.tobytes() for batch in again for image in batch["image"]}) > 3


@pytest.mark.parametrize(("count", "batch_size"), [(23, 8), (24, 8), (3, 8), (1, 1)])
@pytest.mark.parametrize("threads", [0, 2])
def test_evaluation_counts_each_example_once_and_pads_the_last_batch(count, batch_size, threads):
    batches = list(
        pipeline.eval_batches(
            Pictures(count), (Standardize(),), batch_size=batch_size, threads=threads
        )
    )
    assert len(batches) == -(-count // batch_size)
    assert {b["image"].shape for b in batches} == {(batch_size, 9, 12, 3)}
    index = np.concatenate([b["index"] for b in batches])
    valid = np.concatenate([b["valid"] for b in batches])
    np.testing.assert_array_equal(index[valid], np.arange(count))
    assert (index[~valid] == -1).all()
    assert (batches[-1]["image"][~batches[-1]["valid"]] == 0).all()


def test_hosts_evaluate_the_same_number_of_batches():
    whole = list(pipeline.eval_batches(Pictures(9), TRANSFORMS, batch_size=4))
    parts = [
        list(
            pipeline.eval_batches(
                Pictures(9), TRANSFORMS, batch_size=4, process_index=p, process_count=2
            )
        )
        for p in range(2)
    ]
    assert [len(part) for part in parts] == [3, 3]
    joined = [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("kind", [Pictures, ManyAtOnce])
def test_broken_pictures_are_rows_of_zeros_that_are_not_valid(kind):
    dataset = kind(broken=(0, 5, 8))
    batches = list(pipeline.eval_batches(dataset, TRANSFORMS, batch_size=8, threads=1))
    clean = list(pipeline.eval_batches(Pictures(), TRANSFORMS, batch_size=8))
    for batch, expected in zip(batches, clean, strict=True):
        bad = np.isin(batch["index"], dataset.broken)
        np.testing.assert_array_equal(batch["valid"], expected["valid"] & ~bad)
        np.testing.assert_array_equal(batch["index"], expected["index"])
        assert (batch["image"][bad] == 0).all()
        assert (batch["label"][bad] == 0).all()
        np.testing.assert_array_equal(batch["image"][~bad], expected["image"][~bad])
    assert [pipeline.broken(batch, dataset) for batch in batches] == [
        [
            "picture 0: no picture: it starts with 'I am text' (9 bytes)",
            "picture 5: cannot be read: it rained",
        ],
        ["picture 8: no picture: it starts with 'I am text' (9 bytes)"],
        [],
    ]


def test_pairs_with_a_broken_picture_are_not_mixed():
    dataset = Pictures(broken=(1, 4, 9))
    for batch in train(dataset, (Standardize(),), mix=MixUpCutMix(3)):
        mixed = (batch["label_probs"] > 0).sum(1) == 2
        pairs = batch["valid"].reshape(-1, 2).all(1).repeat(2)
        assert not mixed[~pairs].any()
        row = np.flatnonzero(batch["valid"] & ~pairs)
        for r in row:
            own = Standardize()(dataset[int(batch["index"][r])], None)["image"]
            np.testing.assert_array_equal(batch["image"][r], own)


def test_where_every_picture_is_broken_batches_still_have_their_shape():
    batch = next(pipeline.eval_batches(Pictures(3, broken=(0, 1, 2)), TRANSFORMS, batch_size=4))
    assert batch["image"].shape == (4, 6, 7, 3)
    assert not batch["valid"].any()


def test_a_picture_over_max_pixels_is_broken():
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "png")

    class Files(Pictures):
        def __getitem__(self, index):
            return super().__getitem__(index) | ({"image": file.getvalue()} if index == 2 else {})

    (batch,) = pipeline.eval_batches(Files(4), TRANSFORMS, batch_size=4, max_pixels=1199)
    assert batch["valid"].tolist() == [True, True, False, True]
    (text,) = pipeline.broken(batch, Files(4), max_pixels=1199)
    assert text == "picture 2: 40 x 30 are 1,200 pixels, more than max_pixels=1,199"
    (batch,) = pipeline.eval_batches(Files(4), TRANSFORMS, batch_size=4)
    assert batch["valid"].all()


@pytest.mark.parametrize("threads", [0, 2])
def test_pictures_of_different_sizes_say_that_the_transforms_must_end_in_one(threads):
    class Sizes(Pictures):
        def __getitem__(self, index):
            return {"image": np.zeros((9, 12 + (index == 5), 3), np.uint8), "label": 0}

    batches = pipeline.eval_batches(Sizes(), (Resize(9),), batch_size=8, threads=threads)
    text = r"image of picture 5 has shape \[9, 13, 3\] and others \[9, 12, 3\].*fixed size"
    with pytest.raises(ConfigError, match=text):
        list(batches)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 7, "mix": MixUpCutMix(3)}, "batch_size=7 .* even number: try 8"),
        ({"batch_size": 6, "mix": MixUpCutMix(3), "process_count": 2}, "3 rows each.*try 8"),
        ({"batch_size": 7, "process_count": 2}, "batch_size=7 must be a multiple of the 2 hosts"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_sizes_that_do_not_fit_are_config_errors(options, text):
    with pytest.raises(ConfigError, match=text):
        train(**options)


def test_an_empty_dataset_is_a_data_error():
    with pytest.raises(DataError, match="no examples"):
        train(Pictures(0))


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    batches = pipeline.train_batches(Pictures(), TRANSFORMS, batch_size=80, seed=0, threads=3)
    next(batches)
    assert len(set(threading.enumerate()) - before) >= 2
    batches.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_digits_come_through():
    dataset = pipeline.open_dataset("digits", "train")
    transforms = (RandomCrop(8, padding=1), Resize((16, 16)), Standardize())
    (batch,) = train(dataset, transforms, batch_size=16, steps=1)
    assert batch["image"].shape == (16, 16, 16, 3)
    np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])


PROGRAM = """
import itertools, os, signal, sys
import numpy as np
from vit_jax.data import pipeline
from vit_jax.data.transforms import MixUpCutMix, RandAugment, RandomFlip, Resize, Standardize

def stream(**options):
    dataset = pipeline.open_dataset("digits", "train")
    transforms = (Resize((9, 8)), RandomFlip(), RandAugment(), Standardize())
    return pipeline.train_batches(
        dataset, transforms, batch_size=6, seed=1, start_step=3, mix=MixUpCutMix(10), **options
    )

if __name__ == "__main__":
    batches = stream(workers=2, threads=2)
    for a, b in itertools.islice(zip(batches, stream()), 5):
        assert all(np.array_equal(a[k], b[k]) for k in b) and a.keys() == b.keys()
    print("equal", flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["closed", "killed"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_change_nothing_and_end_with_their_parent(tmp_path, end):
    (tmp_path / "program.py").write_text(PROGRAM)
    mark = f"vit-jax-test-{os.getpid()}-{end}"
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), end],
        env=os.environ | {"PYTHONPATH": str(ROOT), "MARK": mark},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "equal\n", done.stderr
    assert done.returncode == (0 if end == "closed" else -9)

    def left():
        return [
            process.name
            for process in Path("/proc").iterdir()
            if process.name.isdigit() and mark in _environment(process)
        ]

    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []


def _environment(process):
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:
        return ""


@dataclasses.dataclass
class Objects(Pictures):
    """Noisy pictures of many sizes, with boxes, masks and classes, and without labels."""

    def __getitem__(self, index):
        if index in self.broken:
            return {"image": b"I am text", "boxes": np.zeros((0, 4)), "box_label": np.zeros(0)}
        height, width = self.size(index)
        rng = np.random.default_rng(index)
        masks = np.zeros((index % 4, height, width), bool)
        for mask in masks:
            top, left = rng.integers(height - 3), rng.integers(width - 3)
            mask[top : top + rng.integers(2, 9), left : left + rng.integers(2, 9)] = True
        return {
            "image": rng.integers(1, 256, (height, width, 3), np.uint8),
            "boxes": boxes_of_masks(masks),
            "box_label": np.arange(len(masks), dtype=np.int32),
            "masks": masks,
            "segmentation": masks.any(0).astype(np.uint8),
        }

    def size(self, index):
        if index in self.broken:
            raise DataError("no picture")
        return 12 + index % 5, 12 + 3 * (index % 4)


@dataclasses.dataclass
class Sizeless(Pictures):
    """The same, whose sizes only the pictures tell."""

    def __getitem__(self, index):
        return Objects(self.count, self.broken)[index]


DENSE = (
    ResizeShortSide((12, 16), longest=30),
    geometry.RandomFlip(),
    ColorJitter(brightness=0.3),
    Standardize(),
    Pad(((16, 20), (16, 24), (24, 32)), boxes=3, masks=True),
)


def test_a_padded_batch_holds_what_the_contract_says():
    batches = train(Objects(), DENSE, batch_size=3, steps=12)
    for batch in batches:
        H, W = batch["image"].shape[1:3]
        kinds = {key: (value.shape, str(value.dtype)) for key, value in batch.items()}
        assert kinds == {
            "image": ((3, H, W, 3), "float32"),
            "image_mask": ((3, H, W), "bool"),
            "boxes": ((3, 3, 4), "float32"),
            "box_label": ((3, 3), "int32"),
            "masks": ((3, 3, H, W), "bool"),
            "segmentation": ((3, H, W), "int32"),
            "valid": ((3,), "bool"),
            "index": ((3,), "int64"),
        }
        used = [np.flatnonzero(batch["image_mask"].any((0, 2 - axis)))[-1] + 1 for axis in (0, 1)]
        smaller = [s for s in DENSE[-1].shapes if s[0] * s[1] < H * W]
        assert not any(s[0] >= used[0] and s[1] >= used[1] for s in smaller)
        for row, index in enumerate(batch["index"]):
            assert (batch["box_label"][row] >= 0).sum() == index % 4
    assert len({batch["image"].shape for batch in batches}) > 1


@pytest.mark.parametrize("kind", [Objects, Sizeless])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_choose_the_same_shape_and_share_each_batch(hosts, kind):
    dataset = kind(broken=(3, 10))
    whole = train(Objects(broken=(3, 10)), DENSE, steps=8)
    parts = [
        train(dataset, DENSE, steps=8, process_index=p, process_count=hosts) for p in range(hosts)
    ]
    joined = [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts)
    ]
    assert_same(joined, whole)
    assert not all(batch["valid"].all() for batch in whole)


def test_padded_streams_resume_and_do_not_depend_on_threads():
    whole = train(Objects(), DENSE, batch_size=40)
    assert_same(train(Objects(), DENSE, batch_size=40, threads=3), whole)
    assert_same(train(Objects(), DENSE, batch_size=40, start_step=4, steps=2), whole[4:])


def test_rows_of_a_padded_batch_that_hold_nothing_have_no_boxes_and_no_classes():
    dataset = Objects(6, broken=(1, 4))
    batches = list(pipeline.eval_batches(dataset, DENSE, batch_size=4))
    assert [batch["valid"].tolist() for batch in batches] == [
        [True, False, True, True],
        [False, True, False, False],
    ]
    for batch in batches:
        empty = ~batch["valid"]
        assert (batch["box_label"][empty] == -1).all()
        assert (batch["segmentation"][empty] == 255).all()
        assert not batch["image_mask"][empty].any()
    assert pipeline.broken(batches[0], dataset) == [
        "picture 1: no picture: it starts with 'I am text' (9 bytes)"
    ]


def test_examples_without_labels_need_no_padding():
    dataset = scenes.open("validation")
    (batch,) = train(_Keys(dataset, ("image", "segmentation")), (Standardize(),), steps=1)
    assert batch.keys() == {"image", "segmentation", "valid", "index"}


class _Keys:
    def __init__(self, dataset, keys):
        self.dataset, self.keys = dataset, keys
        self.class_names = dataset.class_names

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return {key: self.dataset[index][key] for key in self.keys}


@pytest.mark.parametrize("threads", [0, 2])
def test_pictures_that_do_not_fit_the_padding_are_named(threads):
    last = DENSE[:-1]
    for pad, text in {
        Pad(((16, 20), (16, 22)), boxes=3): r"picture \d+ is \d+ x 2\d pixels.*16 x 20, 16 x 22",
        Pad(((16, 20),), boxes=3): r"picture \d+ is \d+ x 2\d pixels.*none of Pad's shapes",
        Pad(((24, 32),), boxes=2): r"picture \d+ has 3 boxes, and Pad's boxes=2",
    }.items():
        with pytest.raises(ConfigError, match=text):
            train(Objects(), (*last, pad), threads=threads)


def test_steps_that_leave_boxes_behind_are_refused():
    for step in (RandomFlip(), Resize(9), RandAugment()):
        name = type(step).__name__
        with pytest.raises(ConfigError, match=f"{name} moves the picture and not its boxes"):
            train(Objects(), (step, *DENSE))
    with pytest.raises(ConfigError, match="Pad's boxes=3, and the dataset has no boxes"):
        train(Pictures(), DENSE)
    with pytest.raises(ConfigError, match="Pad must be the last"):
        train(Objects(), DENSE[::-1])
    with pytest.raises(ConfigError, match="ResizeShortSide must come before ColorJitter"):
        train(Objects(), (ColorJitter(), *DENSE))
    with pytest.raises(ConfigError, match="MixUpCutMix cannot mix pictures of different sizes"):
        train(Objects(), DENSE, mix=MixUpCutMix(3))
    with pytest.raises(DataError, match=r"none of the first 3 pictures.* picture 0: no picture"):
        train(Objects(3, broken=(0, 1, 2)), DENSE)
