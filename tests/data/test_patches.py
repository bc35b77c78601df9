import numpy as np
import pytest

from vit_jax.build import build
from vit_jax.data import digits, pipeline
from vit_jax.data.patches import HidePatches
from vit_jax.data.transforms import Resize, Standardize
from vit_jax.errors import ConfigError

EXAMPLE = {"image": np.zeros((12, 20, 3), np.uint8)}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("ratio", "hidden"), [(0.75, 12), (0.6, 9), (0.01, 1), (14 / 15, 14), (0.2, 3)]
)
def test_as_many_patches_of_each_picture_are_hidden_rounded_up(ratio, hidden):
    for seed in range(5):
        found = HidePatches(patch=4, ratio=ratio)(EXAMPLE, rng(seed))
        assert found["patch_mask"].shape == (3, 5)
        assert found["patch_mask"].sum() == hidden


def test_every_patch_is_hidden_as_often_as_any_other():
    step = HidePatches(patch=4, ratio=0.4)
    masks = np.stack([step(EXAMPLE, rng(seed))["patch_mask"] for seed in range(2000)])
    np.testing.assert_allclose(masks.mean(0), 0.4, atol=0.05)


def test_larger_squares_are_hidden_as_a_whole():
    example = {"image": np.zeros((24, 40, 3), np.uint8)}
    found = HidePatches(patch=2, unit=8, ratio=0.6)(example, rng())["patch_mask"]
    assert found.shape == (12, 20)
    squares = found.reshape(3, 4, 5, 4).transpose(0, 2, 1, 3).reshape(15, 16)
    assert set(squares.sum(1)) == {0, 16}
    assert (squares.sum(1) == 16).sum() == 9


def test_a_hidden_patch_is_a_token_another_patch_or_itself_as_the_vit_paper_has_it():
    step, example = HidePatches(patch=1, ratio=0.5, way="mixed"), {"image": np.zeros((80, 100, 3))}
    found = step(example, rng())
    mask, source = found["patch_mask"].ravel(), found["patch_source"].ravel()
    own = np.arange(8000)
    np.testing.assert_array_equal(source[~mask], own[~mask])
    hidden = source[mask]
    shares = (hidden == -1).mean(), ((hidden >= 0) & (hidden != own[mask])).mean()
    np.testing.assert_allclose(shares, (0.8, 0.1), atol=0.02)
    assert (hidden == own[mask]).mean() == pytest.approx(0.1, abs=0.02)
    assert hidden.max() < 8000
    assert found["patch_source"].dtype == np.int32


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.2, 0.0])
def test_a_mask_ratio_that_hides_nothing_or_all_is_refused_in_one_sentence(ratio):
    with pytest.raises(ConfigError, match=f"a mask ratio of {ratio} .*between 0 and 1"):
        build({"target": "data.patches.HidePatches", "patch": 4, "ratio": ratio})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"patch": 4, "unit": 6}, "unit=6 must be a multiple of patch=4"),
        ({"patch": 0}, "patch=0"),
        ({"patch": 4, "way": "mixd"}, "Did you mean 'mixed'"),
    ],
)
def test_other_wrong_fields_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        HidePatches(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"patch": 8}, "squares of 8 pixels must divide the image, which has 12 x 20"),
        ({"patch": 4, "ratio": 0.99}, "hides all 15 squares of 4 pixels; at most 14/15"),
    ],
)
def test_a_picture_of_which_no_such_part_can_be_hidden_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        HidePatches(**fields)(EXAMPLE, rng())


def batches(kind, **arguments):
    steps = (Resize(size=(8, 8)), HidePatches(patch=2), Standardize())
    return kind(digits.open("train"), steps, batch_size=4, **arguments)


def test_masks_depend_on_the_place_in_the_stream_alone():
    stream = batches(pipeline.train_batches, seed=3)
    first = [next(stream) for _ in range(4)]
    again = next(batches(pipeline.train_batches, seed=3, start_step=3))
    np.testing.assert_array_equal(first[3]["patch_mask"], again["patch_mask"])
    host = next(batches(pipeline.train_batches, seed=3, process_index=1, process_count=2))
    np.testing.assert_array_equal(first[0]["patch_mask"][2:], host["patch_mask"])
    assert (first[0]["patch_mask"] != first[1]["patch_mask"]).any()
    other = next(batches(pipeline.train_batches, seed=4))
    assert (first[0]["patch_mask"] != other["patch_mask"]).any()


def test_evaluation_hides_the_same_patches_each_time():
    once, again = (next(batches(pipeline.eval_batches)) for _ in range(2))
    np.testing.assert_array_equal(once["patch_mask"], again["patch_mask"])
