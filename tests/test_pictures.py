import json

import numpy as np
import pytest
from PIL import Image

from vit_jax import pictures

RIGHT, WRONG = (0, 158, 115), (213, 94, 0)


def rows(steps=60, **changes):
    """A run that learns, as metrics.jsonl has it."""
    found = []
    for step in range(1, steps + 1):
        left = np.exp(-step / 20)
        row = {"step": step, "epoch": step / 10, "split": "train", "loss": 2 * left}
        row |= {"accuracy": 1 - left, "learning_rate": 1e-3 * left, "grad_norm": 3 * left}
        found.append(row | changes)
        if step % 10 == 0:
            for split in ("validation", "validation_ema"):
                row = {"step": step, "epoch": step / 10, "split": split, "loss": 2.1 * left}
                found.append(row | {"accuracy": 0.98 - 0.9 * left} | changes)
    return found


def draw(workdir, found):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return pixels_of(pictures.curves(workdir))


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def has(pixels, color):
    """How many pixels are of a colour, up to the smoothing of edges."""
    return int((np.abs(pixels - np.array(color)).max(-1) < 12).sum())


def test_curves_show_training_validation_and_the_mean_of_parameters(tmp_path):
    pixels = draw(tmp_path, rows())
    for color in ((0, 114, 178), WRONG, RIGHT):
        assert has(pixels, color) > 200, color
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["curves.png", "metrics.jsonl"]
    only_training = draw(tmp_path, [r for r in rows() if r["split"] == "train"])
    assert has(only_training, (0, 114, 178)) > 200
    assert has(only_training, WRONG) == has(only_training, RIGHT) == 0


@pytest.mark.parametrize(
    "found",
    [
        rows()[:1],
        [{"step": 0, "epoch": 0.0, "split": "validation", "accuracy": 1.0}],
        rows(3, loss="NaN", accuracy=0.0),
        rows(3, loss=0.0, grad_norm="Infinity", accuracy="NaN"),
        [{"step": 1, "epoch": 0.1, "split": "train", "bits": 3.0}],
    ],
    ids=["one row", "perfect at once", "loss not finite", "zeros", "no known number"],
)
def test_curves_of_a_strange_run_are_still_a_picture(tmp_path, found):
    assert draw(tmp_path, found).std() > 0


def test_without_rows_there_is_no_picture(tmp_path):
    assert pictures.curves(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_smoothing_keeps_lines_straight_and_skips_what_is_not_finite():
    line = np.arange(100.0)
    np.testing.assert_allclose(pictures.smooth(line)[5:-5], line[5:-5])
    constant = np.full(100, 3.0)
    constant[[0, 40, 99]] = np.nan
    smoothed = pictures.smooth(constant)
    np.testing.assert_array_equal(np.isnan(smoothed), np.isnan(constant))
    np.testing.assert_allclose(smoothed[~np.isnan(smoothed)], 3.0)
    noise = np.random.default_rng(0).normal(size=400)
    assert pictures.smooth(noise).std() < 0.4 * noise.std()
    np.testing.assert_array_equal(pictures.smooth(noise[:3]), noise[:3])


def test_the_last_values_of_curves_that_end_together_do_not_overlap():
    from matplotlib.figure import Figure

    for values in ([0.5, 0.5, 0.5], [0.0, 0.01, 1.0], [0.99, 1.0, 1.0]):
        axes = Figure().add_subplot()
        axes.set_ylim(0, 1)
        pictures._label_ends(axes, [(v, "text", "black") for v in values])
        heights = sorted(text.get_position()[1] for text in axes.texts)
        assert min(np.diff(heights)) > 0.049
        assert heights[-1] <= 1


def test_predictions_are_framed_by_whether_they_are_right(tmp_path):
    grey = np.full((8, 8, 3), 128, np.uint8)
    path = pictures.predictions(tmp_path, [(grey, "7 (98 %)", True)])
    pixels = pixels_of(path)
    assert path == tmp_path / "predictions.png"
    assert has(pixels, RIGHT) > 500
    assert has(pixels, WRONG) == 0
    path = pictures.predictions(tmp_path / "other.png", [(grey, "7 (51 %), is 1", False)])
    pixels = pixels_of(path)
    assert has(pixels, WRONG) > 500
    assert has(pixels, RIGHT) == 0


def test_pictures_of_all_sizes_and_names_fit_the_sheet(tmp_path):
    random = np.random.default_rng(0)
    sizes = [(1, 1), (8, 5), (32, 32), (1, 500), (300, 200), (129, 128)]
    names = [
        "$x^",
        "\u72ac",
        "caf\udce9",
        "an_extremely_long_class_name_of_a_dog (3 %), is x",
        "",
        "a\nb",
    ]
    shown = [
        (random.integers(0, 255, (*size, 3), dtype=np.uint8), name, True)
        for size, name in zip(sizes, names, strict=True)
    ]
    sizes = [pixels_of(pictures.predictions(tmp_path, shown[:n])).shape for n in (0, 1, 6)]
    assert sizes[2][1] > sizes[1][1]


def test_small_pictures_grow_by_a_whole_factor_and_large_ones_shrink_in_proportion():
    tiny = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    grown = pictures._fit(tiny)
    assert grown.shape == (128, 96, 3)
    np.testing.assert_array_equal(grown[::16, ::16], tiny)
    assert len(np.unique(grown)) == len(np.unique(tiny))  # no colour between two pixels
    assert pictures._fit(np.zeros((28, 28, 3), np.uint8)).shape == (112, 112, 3)
    assert pictures._fit(np.zeros((300, 150, 3), np.uint8)).shape == (128, 64, 3)


def test_a_long_title_loses_its_middle_and_keeps_its_number():
    assert pictures._wrap("7 (51 %), is 1") == "7 (51\u00a0%), is 1"
    lines = pictures._wrap("Staffordshire_bull_terrier_dog (51 %), is cat").split("\n")
    assert lines == ["Staffordsh…rrier_dog", "(51\u00a0%), is cat"]
    lines = pictures._wrap("one two " * 30).split("\n")
    assert len(lines) == 3
    assert max(map(len, lines)) <= pictures.LINE_LENGTH


def test_a_standardised_batch_gets_its_colours_back():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    color = np.array([200, 100, 50])
    images = np.broadcast_to((color / 255 - mean) / std, (2, 6, 8, 3)).astype(np.float32)
    assert (pictures.unstandardised(images, mean, std) == color).all()
    assert (pictures.unstandardised(images + 9, 0.0, 1.0) == 255).all()


def test_a_task_says_how_large_its_pictures_are_drawn(tmp_path):
    drawn, titles = [np.full((30, 40, 3), 90, np.uint8)] * 12, ["a"] * 12
    small = pixels_of(pictures.sheet(tmp_path / "a.png", drawn, titles, "small"))
    large = pixels_of(pictures.sheet(tmp_path / "b.png", drawn, titles, "large", cell=360))
    assert (small == 90).all(-1).sum() == 12 * 90 * 120
    assert (large == 90).all(-1).sum() == 12 * 270 * 360
    assert large.shape[1] < 1.1 * small.shape[1]
    assert [pictures.fitting(cell) for cell in (128, 360)] == [32, 12]


def test_a_large_cell_holds_a_legend_below_its_picture():
    assert pictures._fit(np.zeros((500, 400, 3), np.uint8), 360).shape == (450, 360, 3)
    assert pictures._fit(np.zeros((900, 400, 3), np.uint8), 360).shape == (540, 240, 3)
    assert pictures._fit(np.zeros((100, 100, 3), np.uint8), 360).shape == (300, 300, 3)


@pytest.mark.parametrize("headline", ["miou", "ap", "pq"])
def test_a_headline_of_another_task_is_drawn_as_a_share(headline, tmp_path, monkeypatch):
    found = [{(headline if k == "accuracy" else k): v for k, v in r.items()} for r in rows()]
    for row in found:
        row |= {"class_loss": 1.0, f"{headline}50": 0.5}
    drawn = []
    monkeypatch.setattr(
        pictures, "_large_panel", lambda a, r, n, percent: drawn.append((n, percent))
    )
    draw(tmp_path, found)
    assert drawn == [("loss", False), (headline, True)]
    drawn.clear()
    pictures.curves(tmp_path, "class_loss")
    assert drawn == [("loss", False)]
    monkeypatch.undo()
    assert has(draw(tmp_path, found), RIGHT) > 200


def test_a_detector_has_its_headline_in_evaluation_only_and_far_below_one(tmp_path):
    found = [{k: v for k, v in r.items() if k != "accuracy"} for r in rows()]
    for row in found:
        if row["split"] == "validation":
            row["ap"] = 0.002 * row["step"]
    assert has(draw(tmp_path, found), WRONG) > 200
