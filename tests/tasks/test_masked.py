import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import found
from vit_jax.errors import ConfigError, DataError
from vit_jax.tasks.masked import GREY, MaskedColours, MaskedPixels, beside, covered

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
STATISTICS = {"mean": MEAN, "std": STD}
MASK = np.array([[[True, False, False], [True, False, True]], [[False, False, True]] * 2])  # 2x3


def pictures(seed=0):
    """[2, 8, 12, 3]: patches of 4x4."""
    return np.random.default_rng(seed).normal(size=(2, 8, 12, 3)).astype(np.float32)


def batch_of(**more):
    return {"image": pictures(), "patch_mask": MASK} | more


def hidden_patches(image, mask=MASK):
    """[hidden, 48], in the order of the mask."""
    cut = image.reshape(2, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut[mask].reshape(-1, 48)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_loss_is_the_mean_difference_over_hidden_pixels(loss):
    outputs = pictures(1)
    difference = hidden_patches(outputs) - hidden_patches(pictures())
    wanted = np.abs(difference).mean() if loss == "l1" else np.square(difference).mean()
    value, sums = MaskedPixels(loss=loss).score(outputs, batch_of())
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert sums["count"] == MASK.sum() == 5
    assert MaskedPixels().summarize(sums) == {"loss": pytest.approx(wanted, rel=1e-5)}


def test_a_normalised_target_is_a_patch_over_its_deviation_as_a_sample():
    task, target = MaskedPixels(normalized=True), hidden_patches(pictures())
    mean = target.mean(1, keepdims=True)
    deviation = np.sqrt(((target - mean) ** 2).sum(1, keepdims=True) / 47 + 1e-6)
    wanted = np.square(hidden_patches(pictures(1)) - (target - mean) / deviation).mean()
    np.testing.assert_allclose(task.score(pictures(1), batch_of())[0], wanted, rtol=1e-5)


def tasks():
    logits = np.random.default_rng(2).normal(size=(2, 2, 3, 512)).astype(np.float32)
    return [
        (MaskedPixels(normalized=True, **STATISTICS), pictures(1)),
        (MaskedPixels(loss="l1", **STATISTICS), pictures(1)),
        (MaskedColours(**STATISTICS), logits),
    ]


@pytest.mark.parametrize(("task", "outputs"), tasks())
def test_only_what_is_hidden_of_valid_rows_counts_and_has_a_gradient(task, outputs):
    batch = batch_of(valid=np.array([True, False]))
    batch["image"][1] = 0  # a row that is no picture

    def loss(outputs):
        return task.score(outputs, batch)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(outputs))
    alone = {k: v[:1] for k, v in batch.items()}
    np.testing.assert_allclose(value, task.score(outputs[:1], alone)[0], rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not gradient[1].any()
    side = outputs.shape[1] // 2
    on = MASK[0].repeat(side, 0).repeat(side, 1)
    assert gradient[0][on].any(-1).all()
    assert not gradient[0][~on].any()


@pytest.mark.parametrize(("task", "outputs"), tasks())
def test_sums_of_parts_are_those_of_the_whole(task, outputs):
    whole = task.score(outputs, batch_of())[1]
    parts = [
        task.score(outputs[i : i + 1], {k: v[i : i + 1] for k, v in batch_of().items()})[1]
        for i in (0, 1)
    ]
    for key in whole:
        np.testing.assert_allclose(parts[0][key] + parts[1][key], whole[key], rtol=1e-6)


@pytest.mark.parametrize(("task", "outputs"), tasks())
def test_without_a_valid_row_the_loss_is_zero_and_nothing_can_be_summarised(task, outputs):
    value, sums = task.score(outputs, batch_of(valid=np.zeros(2, bool)))
    assert value == 0
    with pytest.raises(DataError, match="no hidden patch"):
        task.summarize(sums)


def levels_to_image(levels):
    return ((levels - np.array(MEAN)) / np.array(STD)).astype(np.float32)


def test_a_mean_colour_is_three_bits_of_each_channel():
    levels = np.zeros((1, 4, 8, 3))
    levels[0, :, :4] = (1.0, 0.3, 0.13)  # parts 7, 2 and 1
    levels[0, :, 4:] = (0.0, 0.124, 0.99)  # parts 0, 0 and 7
    levels[0, 0, 4:, 2] -= 0.2  # the mean is 0.94 still
    mask = np.array([[[True, True]]])
    logits = np.full((1, 1, 2, 512), -20.0, np.float32)
    logits[0, 0, 0, 7 * 64 + 2 * 8 + 1] = logits[0, 0, 1, 7] = 20
    batch = {"image": levels_to_image(levels), "patch_mask": mask}
    task = MaskedColours(**STATISTICS)
    loss, sums = task.score(logits, batch)
    assert loss < 1e-6
    assert task.summarize(sums)["accuracy"] == 1
    drawn = task.predict(logits, batch)["restored"][0]
    # The middle of each part: 7.5, 2.5 and 1.5 eighths.
    np.testing.assert_array_equal(drawn[0, 0], [239, 80, 48])
    np.testing.assert_array_equal(drawn[0, 7], [16, 16, 239])


def test_chance_is_the_logarithm_of_the_number_of_colours():
    loss, _ = MaskedColours(**STATISTICS).score(np.zeros((2, 2, 3, 512)), batch_of())
    np.testing.assert_allclose(loss, np.log(512), rtol=1e-6)


def test_what_is_drawn_is_the_picture_where_it_is_seen_and_what_was_restored_elsewhere():
    levels = np.random.default_rng(0).uniform(0.1, 0.9, (2, 8, 12, 3))
    image, task = levels_to_image(levels), MaskedPixels(normalized=True, **STATISTICS)
    true = hidden_patches(image)
    mean, deviation = true.mean(1, keepdims=True), true.std(1, ddof=1, keepdims=True)
    outputs = np.zeros((2, 2, 3, 4, 4, 3), np.float32)
    outputs[MASK] = ((true - mean) / deviation).reshape(-1, 4, 4, 3)  # all of it, perfectly
    outputs = outputs.transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 12, 3)
    got = task.predict(outputs, {"image": image, "patch_mask": MASK})
    wanted = np.round(255 * levels)
    np.testing.assert_array_equal(got["seen"], wanted)
    np.testing.assert_allclose(got["restored"].astype(int), wanted, atol=1)
    np.testing.assert_allclose(got["loss"], 0, atol=1e-4)
    wrong = task.predict(outputs + 1, {"image": image, "patch_mask": MASK})
    np.testing.assert_allclose(wrong["loss"], 1, atol=1e-3)
    on = MASK.repeat(4, 1).repeat(4, 2)
    np.testing.assert_array_equal(wrong["restored"][~on], wanted[~on])
    assert (wrong["restored"][on] > wanted[on]).all()


def test_three_pictures_stand_side_by_side_and_small_ones_are_enlarged():
    task, outputs = tasks()[1]
    prediction = {k: np.asarray(v)[0] for k, v in task.predict(outputs, batch_of()).items()}
    drawn, title, right = task.draw(None, {}, prediction, ())
    assert right is None
    assert title == f"50 % hidden, loss {float(prediction['loss']):.3g}"
    factor, gap = 8, 4  # 12 pixels become 96
    assert drawn.shape == (64, 3 * 96 + 2 * gap, 3)
    np.testing.assert_array_equal(drawn[::factor, :96:factor], prediction["seen"])
    np.testing.assert_array_equal(drawn[::factor, 200::factor], prediction["restored"])
    middle = drawn[::factor, 100:196:factor]
    np.testing.assert_array_equal(middle, covered(prediction["seen"], MASK[0]))
    assert (middle[:4, :4] == GREY).all()
    assert (drawn[:, 96:100] == 255).all()


def test_a_batch_s_picture_is_drawn_with_what_is_hidden():
    image = np.zeros((8, 12, 3), np.uint8)
    drawn, title = MaskedPixels().draw_target(image, {"patch_mask": MASK[0]}, ())
    assert title == "3 of 6 patches hidden"
    np.testing.assert_array_equal(drawn, beside([image, covered(image, MASK[0])]))


def test_a_row_of_a_table_tells_the_share_and_the_loss():
    task, outputs = tasks()[0]
    prediction = {k: np.asarray(v)[0] for k, v in task.predict(outputs, batch_of()).items()}
    kind = found.kind_of(task)
    (row,) = kind.rows(task, prediction, (8, 12), ())
    assert row["share"] == 0.5
    assert row["loss"] == pytest.approx(float(prediction["loss"]))
    results = [{"picture": "a.png", "predictions": [row]}]
    assert found.as_text(results, "csv", kind).splitlines()[0] == "picture,rank,share,loss"
    assert "50.00% of pixels  hidden, restored with a loss of" in found.as_text(
        results, "table", kind
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_mask": None}, "the batch has no patch_mask"),
        ({"patch_mask": np.ones((2, 3, 5), bool)}, "patch_mask of 3x5 .* picture of 8x12"),
    ],
)
@pytest.mark.parametrize(("task", "outputs"), tasks())
def test_a_batch_that_does_not_fit_is_refused(task, outputs, change, said):
    batch = {k: v for k, v in (batch_of() | change).items() if v is not None}
    with pytest.raises(ConfigError, match=said):
        task.score(outputs, batch)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MaskedPixels(loss="l3"), "there is no loss 'l3'"),
        (lambda: MaskedPixels(std=(0, 1, 1)), "three numbers each"),
        (lambda: MaskedColours(mean=(0.5,)), "three numbers each"),
        (lambda: MaskedColours(bits=9), "bits=9 must be 1 to 8"),
    ],
)
def test_wrong_numbers_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_classes_that_are_no_colours_are_refused():
    with pytest.raises(ConfigError, match=r"tells 8192 classes .* there are 512 colours of 3 bits"):
        MaskedColours().score(np.zeros((2, 2, 3, 8192)), batch_of())
