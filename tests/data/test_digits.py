import numpy as np
import pytest
from sklearn.datasets import load_digits

from vit_jax.contracts import Dataset
from vit_jax.data import digits
from vit_jax.errors import ConfigError


def test_the_splits_are_all_digits_once_and_a_fifth_of_each_class_is_held_out():
    train, held_out = digits.open("train"), digits.open("validation")
    assert (len(train), len(held_out)) == (1442, 355)
    places = np.concatenate([train.places, held_out.places])
    assert sorted(places) == list(range(1797))
    whole = np.bincount(load_digits().target)
    np.testing.assert_array_equal(np.bincount(held_out.labels), whole // 5)
    assert isinstance(train, Dataset)
    assert train.class_names == tuple("0123456789")


def test_pixels_are_stretched_to_the_full_range():
    train, source = digits.open("train"), load_digits()
    for index in (0, 700, 1441):
        example, place = train[index], train.places[index]
        assert example["image"].shape == (8, 8, 3)
        assert example["image"].dtype == np.uint8
        np.testing.assert_allclose(
            example["image"][..., 1], source.images[place] * 255 / 16, 0, 0.5
        )
        assert example["label"] == source.target[place]
        assert train.name(index) == f"digits {place}"
    assert train.images.max() == 255


def test_the_split_is_the_same_each_time():
    np.testing.assert_array_equal(digits.open("train").places, digits.open("train").places)


def test_a_misspelt_split_is_named():
    with pytest.raises(ConfigError, match="Did you mean 'validation'"):
        digits.open("validatoin")
