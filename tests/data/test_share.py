from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import digits, folder, pipeline
from vit_jax.data.share import Part, balanced
from vit_jax.errors import ConfigError, DataError

LABELS = np.repeat(np.arange(4), (5, 40, 30, 25))  # 100 examples, of 4 classes


def test_a_share_has_as_many_of_each_class_as_of_any_other():
    for share, each in ((0.01, 1), (0.1, 2), (0.2, 5)):
        np.testing.assert_array_equal(np.bincount(LABELS[balanced(LABELS, share)]), [each] * 4)
    np.testing.assert_array_equal(np.bincount(LABELS[balanced(LABELS, 0.6)]), [5, 15, 15, 15])


def test_a_larger_share_has_all_of_a_smaller_one_and_one_is_everything():
    shares = [set(balanced(LABELS, share)) for share in (0.04, 0.1, 0.5, 1.0)]
    assert all(small < large for small, large in pairwise(shares))
    assert shares[-1] == set(range(100))
    np.testing.assert_array_equal(balanced(LABELS, 0.1), balanced(LABELS, 0.1))


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_a_share_of_nothing_or_of_more_than_all_is_refused(share):
    with pytest.raises(ConfigError, match="above 0, and at most 1"):
        digits.open("train", share=share)


def test_a_share_of_the_digits_leaves_what_is_held_out_whole():
    part, whole = digits.open("train", share=0.1), digits.open("train")
    np.testing.assert_array_equal(np.bincount(part.labels), [14] * 10)
    assert set(part.places) < set(whole.places)
    assert len(digits.open("validation", share=0.1)) == 355


class Many:
    """Reads many at once, as TFDS does."""

    class_names = ("a", "b", "c", "d")

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        images = [np.full((2, 3, 3), index, np.uint8) for index in indices]
        return [{"image": x, "label": int(LABELS[i])} for x, i in zip(images, indices)]

    def name(self, index):
        return f"many {index}"

    def size(self, index):
        return 2, 3 + index


def test_a_part_of_a_dataset_says_of_each_example_what_the_whole_does():
    part = Part(Many(), np.array([7, 70]))
    assert (len(part), part.class_names) == (2, Many.class_names)
    assert (part.name(1), part.size(1)) == ("many 70", (2, 73))
    batch = next(iter(pipeline.eval_batches(part, (), batch_size=3)))
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], [7, 70, 0])
    np.testing.assert_array_equal(batch["label"], [1, 2, 0])


@pytest.fixture
def pictures(tmp_path):
    for place in ("a.png", "trip/b.png", "trip/day/c.png", "trip/d.png", "e.png"):
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(file)
    return tmp_path


def test_a_folder_without_labels_takes_all_pictures_below_it(pictures):
    splits = [folder.open(s, data_dir=str(pictures), labels=False) for s in ("train", "validation")]
    names = [{split.name(i) for i in range(len(split))} for split in splits]
    assert names[0] | names[1] == {"a.png", "e.png", "trip/b.png", "trip/d.png", "trip/day/c.png"}
    assert not names[0] & names[1]
    assert all(names)
    assert splits[0].class_names == ()
    assert set(splits[0][0]) == {"image"}


def test_a_folder_without_any_picture_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no picture in"):
        folder.open("train", data_dir=str(tmp_path), labels=False)


def test_a_share_of_a_folder_has_each_of_its_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    part = folder.open("train", data_dir=str(tmp_path), share=0.3)
    assert [label for _, label in part.files] == [0, 0, 1, 1]
