"""What `predict` says where there are places: objects, segments and classes of pixels."""

import csv
import dataclasses
import io
import json
from types import SimpleNamespace

import cv2
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import found, predict, stream
from vit_jax.errors import ConfigError, DataError
from vit_jax.pretrained import load, names
from vit_jax.pretrained.preprocess import HALF, Preprocessing, short_side, standardize, step
from vit_jax.pretrained.recipe import Recipe
from vit_jax.tasks.classification import Classification
from vit_jax.tasks.detection import Detection

LABELS = ("grass", "red", "blue")
SHORT = (short_side(40, 60), standardize(HALF, HALF))
SQUARE = (step("Resize", size=(32, 48)), standardize(HALF, HALF))
# (H, W), and the box of the thing on it, (x, y, width, height)
PICTURES = {
    "000000000007.png": ((80, 100), (20, 10, 40, 30)),
    "000000000003.png": ((60, 120), (90, 30, 30, 30)),
    "sub/000000000011.png": ((80, 100), (0, 0, 100, 40)),
    "sub/000000000012.png": ((120, 60), (30, 60, 15, 30)),
}
THING, GROUND = (250, 20, 20), (20, 90, 30)


class Model:
    """Sees what is red: its box, its pixels, or one segment for it and one for the rest.

    Stands where a `Loaded` would; `asked` are the shapes of its batches.
    """

    source, labels = "a test", LABELS

    def __init__(self, task, steps, reads=("image", "image_mask")):
        self.reads, self.preprocess = frozenset(reads), Preprocessing(steps)
        self.recipe = Recipe("ours", {}, names.Ours(), 3, task=task)
        self.asked, self.remarks = [], ()

    def __call__(self, image, image_mask=None):
        self.asked.append(image.shape)
        real = np.ones(image.shape[:3], bool) if image_mask is None else image_mask
        assert not image[~real].any()
        red = (image[..., 0] > 0.5) & real  # [B, H, W]
        if self.recipe.task["target"].endswith("Segmentation"):
            return np.stack([~red, red, ~real], -1).astype(np.float32)
        boxes, masks = [], []
        for thing, mask in zip(red, real, strict=True):
            rows, columns = np.flatnonzero(thing.any(1)), np.flatnonzero(thing.any(0))
            h, w = mask.any(1).sum(), mask.any(0).sum()
            y0, y1, x0, x1 = rows[0] / h, (rows[-1] + 1) / h, columns[0] / w, (columns[-1] + 1) / w
            box = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
            boxes.append([box, [0.5, 0.5, 1, 1], [0.5, 0.5, 1, 1]])
            masks.append([thing, mask & ~thing, thing])
        # Red with a probability of 90 %, grass with 86 %, blue with 20 %, else nothing.
        odds = np.log([[0.02, 0.9, 0.02, 0.06], [0.86, 0.02, 0.02, 0.1], [0.1, 0.1, 0.2, 0.6]])
        logits = np.broadcast_to(odds.astype(np.float32), (len(image), 3, 4))
        out = {"logits": logits, "boxes": np.array(boxes, np.float32)}
        if self.recipe.task["target"].endswith("Panoptic"):
            out["masks"] = np.where(masks, 9.0, -9.0).astype(np.float32)
        return out


def detector(**more):
    return Model({"target": "tasks.detection.Detection"}, SHORT, **more)


def segmenter():
    return Model({"target": "tasks.segmentation.Segmentation"}, SQUARE, reads=("image",))


def panoptic():
    return Model({"target": "tasks.panoptic.Panoptic", "stuff": (0,)}, SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    (place / "sub").mkdir()
    for name, ((H, W), (x, y, w, h)) in PICTURES.items():
        image = np.full((H, W, 3), GROUND, np.uint8)
        image[y : y + h, x : x + w] = THING
        cv2.imwrite(str(place / name), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    (place / "broken.jpg").write_text("no picture")
    return place


def run(model, monkeypatch, *argv):
    monkeypatch.setattr(load, "load", lambda ref, **_: model)
    return predict.main(["--checkpoint=x", *map(str, argv)])


def name_in(folder, path):
    return path.removeprefix(f"{folder}/")


def test_boxes_are_in_the_pixels_of_each_picture(folder):
    files = [folder / name for name in PICTURES]
    results = list(stream.predict(detector(), files, batch_size=2, threshold=0.5))
    assert [r["picture"] for r in results] == list(map(str, files))
    for result, (_, box) in zip(results, PICTURES.values(), strict=True):
        red, grass = result["predictions"]
        assert (red["label"], red["name"], grass["name"]) == (1, "red", "grass")
        assert red["probability"] == pytest.approx(0.9, abs=1e-5)
        np.testing.assert_allclose(red["bbox"], box, atol=2.5)  # resized there and back


def test_a_picture_is_padded_to_the_same_shape_whatever_is_beside_it(folder):
    files = [folder / name for name in PICTURES]
    together, alone = detector(), detector()
    results = list(stream.predict(together, files, batch_size=2))
    for file, result in zip(files, results, strict=True):
        assert list(stream.predict(alone, [file])) == [result]
    assert {shape[0] for shape in together.asked} == {2}  # one compilation for each size
    assert [s[1:3] for s in alone.asked] == [(64, 64), (64, 64), (64, 64), (64, 64)]
    wide = Model({"target": "tasks.detection.Detection"}, (short_side(40, None), SHORT[1]))
    assert list(stream.predict(wide, files[:2]))[1]["predictions"][0]["name"] == "red"
    assert sorted(wide.asked) == [(2, 64, 64, 3), (2, 64, 128, 3)]


def test_a_model_without_a_mask_gets_each_picture_in_its_own_shape(folder):
    model = detector(reads=("image",))
    list(stream.predict(model, [folder / name for name in PICTURES]))
    assert model.asked == [(1, 40, 50, 3), (1, 30, 60, 3), (1, 40, 50, 3), (1, 60, 30, 3)]


def test_pictures_go_into_the_shapes_of_the_run(folder):
    pad = {"target": "data.geometry.Pad", "shapes": [[40, 50], [60, 60]], "boxes": 4}
    model = Model({"target": "tasks.detection.Detection"}, (*SHORT, pad))
    assert [len(r["predictions"]) for r in stream.predict(model, [folder / n for n in PICTURES])]
    assert {s[1:3] for s in model.asked} == {(40, 50), (60, 60)}
    small = Model({"target": "tasks.detection.Detection"}, (*SHORT, pad | {"shapes": [[40, 50]]}))
    results = list(stream.predict(small, [folder / name for name in PICTURES]))
    assert ["error" in result for result in results] == [False, True, False, True]
    assert results[1]["error"] == (
        "it has 30 x 60 pixels (height x width) as the model gets it, which was trained on at most "
        "40 x 50"
    )


def test_json_of_a_detector_is_a_list_of_coco_results(folder, monkeypatch, capsys):
    from pycocotools.coco import COCO

    out = folder.parent / "out.json"
    argv = [f"--output={out}", "--threshold=0", "--top=2"]
    assert run(detector(), monkeypatch, folder, *argv) == 0
    entries = json.loads(out.read_text())
    assert len(entries) == 2 * len(PICTURES)
    assert set(entries[0]) == {"image_id", "image", "category_id", "name", "score", "bbox"}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(1, 6)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(LABELS)],
        "annotations": [],
    }
    truth.createIndex()
    assert len(truth.loadRes(str(out)).anns) == len(entries)
    assert "left out: " in capsys.readouterr().err
    # Without what cannot be read, the names of the files are the ids.
    files = [folder / name for name in PICTURES]
    assert run(detector(), monkeypatch, *files, "--format=json") == 0
    entries = json.loads(capsys.readouterr().out)
    assert {name_in(folder, e["image"]): e["image_id"] for e in entries} == {
        name: int(name[-6:-4]) for name in PICTURES
    }


def test_table_and_csv_of_a_detector_say_where(folder, monkeypatch, capsys):
    file = folder / "000000000007.png"
    assert run(detector(), monkeypatch, file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(file)
    assert lines[1] == "   90.00%  red    40 x 30 at (20, 10)"
    assert run(detector(), monkeypatch, file, "--threshold=0.95") == 0
    assert capsys.readouterr().out.splitlines()[1] == "  nothing found"
    assert run(detector(), monkeypatch, file, "--format=csv", "--threshold=0.87") == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["rank"], row["label"], row["name"], row["probability"]) == ("1", "1", "red", "0.9")
    assert [float(row[k]) for k in found.CORNERS] == [20, 10, 40, 30]


def test_shares_of_a_segmenter_are_those_of_the_picture(folder, monkeypatch, capsys):
    from pycocotools import mask as coding

    file = folder / "000000000003.png"
    assert run(segmenter(), monkeypatch, file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["grass", "red"]
    assert lines[2].startswith("   12.50% of pixels")
    assert run(segmenter(), monkeypatch, file, "--format=json") == 0
    grass, red = json.loads(capsys.readouterr().out)
    assert red["segmentation"]["size"] == [60, 120]
    assert coding.toBbox(red["segmentation"]).tolist() == [90, 30, 30, 30]
    assert grass["share"] == pytest.approx(0.875)


def test_segments_have_their_run_lengths_and_boxes(folder):
    from pycocotools import mask as coding

    (result,) = stream.predict(panoptic(), [folder / "000000000007.png"])
    red, grass = result["predictions"]  # blue is under the threshold
    assert (red["name"], grass["name"]) == ("red", "grass")
    assert red["bbox"] == coding.toBbox(red["segmentation"]).tolist() == [20, 10, 40, 30]
    assert red["share"] == pytest.approx(0.15)
    assert red["share"] + grass["share"] == 1


@pytest.mark.parametrize("model", [detector, segmenter, panoptic])
def test_each_picture_is_drawn_in_a_file_of_its_own(model, folder, monkeypatch, tmp_path):
    drawn, sheet = tmp_path / "drawn", tmp_path / "sheet.png"
    argv = [f"--draw={drawn}", f"--sheet={sheet}", "--batch_size=2"]
    assert run(model(), monkeypatch, folder, *argv) == 0
    assert {p.name for p in drawn.iterdir()} == {name.split("/")[-1] for name in PICTURES}
    for name, ((H, W), _) in PICTURES.items():
        picture = cv2.imread(str(drawn / name.split("/")[-1]))
        # Enlarged by a whole factor; a legend may lie below it.
        factor = picture.shape[1] // W
        assert picture.shape[1] == factor * W
        assert picture.shape[0] >= factor * H
        assert picture.shape[0] == factor * H or model is not detector
    assert cv2.imread(str(sheet)).shape[1] > 300


def test_drawings_of_pictures_with_one_name_do_not_meet(tmp_path):
    files = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.jpg", tmp_path / "b" / "y.jpg"]
    drawings = predict.Drawings(files, tmp_path, 2)
    for place in (2, 0, 1):
        drawings(files[place], np.full((4, 5, 3), place, np.uint8), str(place))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-2.png", "x.png", "y.png"]
    assert cv2.imread(str(tmp_path / "x-2.png"))[0, 0, 0] == 1
    assert [title for _, title in drawings.kept.values()] == ["0", "1"]  # the first two


@pytest.mark.parametrize(
    ("model", "argv", "said"),
    [
        (segmenter, ["--threshold=0.5"], "--threshold=0.5 has no meaning for segmentation"),
        (segmenter, ["--top=3"], "--top=3 has no meaning for segmentation"),
        (detector, ["--threshold=2"], "--threshold=2 must be in 0..1"),
        (detector, ["--draw={folder}/000000000007.png"], "is no folder"),
        (detector, ["--draw={folder}/a/b"], "is no folder: No such file or directory"),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence(model, argv, said, folder, monkeypatch, capsys):
    argv = [a.format(folder=folder) for a in argv]
    assert run(model(), monkeypatch, folder, *argv) == 2
    assert said in capsys.readouterr().err


def test_a_classifier_draws_sheets_only(folder, monkeypatch, capsys, tmp_path):
    task = {"target": "tasks.classification.Classification"}
    model = Model(task, SQUARE, reads=("image",))
    assert run(model, monkeypatch, folder, f"--draw={tmp_path}") == 2
    assert "--draw is for models that say where" in capsys.readouterr().err


def test_a_task_of_ones_own_says_itself_what_it_finds():
    counting = found.Kind(lambda task, prediction, size, names: [{"name": "7 birds"}], ("name",))
    task = SimpleNamespace(found=counting)
    assert found.kind_of(task) is counting
    assert found.kind_of(Detection()).columns[:2] == ("label", "name")
    assert not found.kind_of(Classification()).places
    results = [{"picture": "a.jpg", "predictions": counting.rows(None, {}, (1, 1), ())}]
    assert found.as_text(results, "table", counting) == "a.jpg\n  7 birds\n"
    assert found.as_text(results, "csv", counting) == "picture,rank,name\na.jpg,1,7 birds\n"
    with pytest.raises(ConfigError, match="SimpleNamespace does not say what it finds"):
        found.kind_of(SimpleNamespace())


def test_the_batch_shrinks_for_detectors_too(folder):
    class Small(Model):
        def __call__(self, image, image_mask=None):
            if len(image) > 2:
                raise MemoryError("no memory")
            return super().__call__(image, image_mask)

    said, model = [], Small({"target": "tasks.detection.Detection"}, SHORT)
    results = list(stream.predict(model, [folder / name for name in PICTURES], warn=said.append))
    assert [r["predictions"][0]["name"] for r in results] == ["red"] * 4
    assert said == ["no memory; going on with 2 pictures at once"]


def test_what_is_larger_than_the_run_knows_is_an_error_of_that_picture():
    pad = {"target": "data.geometry.Pad", "shapes": [[8, 8]]}
    with pytest.raises(DataError, match="which was trained on at most 8 x 8"):
        Preprocessing((SHORT[1], pad)).shape((9, 4))


class Halves(nn.Module):
    """A segmenter that sees "left" and "right" wherever it looks."""

    @nn.compact
    def __call__(self, image, *, train):
        H, W = image.shape[1:3]
        left = jnp.broadcast_to(jnp.arange(W) < W / 2, (len(image), H, W))
        return 5.0 * jnp.stack([left, ~left], -1)


def halves(**inference):
    task = {"target": "tasks.segmentation.Segmentation"}
    recipe = Recipe("ours", {}, names.Ours(), 2, task=task, inference=inference)
    return load.Loaded(Halves(), {}, Preprocessing(SQUARE), ("left", "right"), "a test", recipe)


def columns(loaded, width=48):
    """The classes of a row of pixels."""
    return np.asarray(loaded(image=np.zeros((1, 32, width, 3), np.float32))[0, 5].argmax(-1))


def test_a_segmenter_is_asked_by_windows_and_mirrored_as_its_run_was_or_as_it_is_told():
    windows = np.tile(np.repeat([0, 1], 8), 3)
    np.testing.assert_array_equal(columns(halves()), np.repeat([0, 1], 24))
    np.testing.assert_array_equal(columns(halves().averaged(window=16, stride=16)), windows)
    run = halves(target="tasks.inference.Averaged", window=16, stride=16)
    np.testing.assert_array_equal(columns(run.averaged()), windows)
    np.testing.assert_array_equal(columns(run.averaged(window=0, stride=0)), np.repeat([0, 1], 24))
    np.testing.assert_array_equal(columns(run.averaged(window=0)), np.repeat([0, 1], 24))
    assert run.averaged(window=9).module.stride == 0  # the run's would leave pixels out
    mirrored = halves().averaged(flip=True)(image=np.zeros((1, 32, 48, 3), np.float32))
    np.testing.assert_allclose(mirrored, np.log(0.5), rtol=1e-5)


def test_windows_of_the_command_line_and_of_the_run_reach_the_masks(folder, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(load.Loaded, "averaged", lambda self, **how: asked.append(how) or self)
    for model, argv in (
        (halves(), ()),
        (halves(), ("--window=16", "--flip", "--scales=0.5,1")),
        (halves(window=16), ("--no-flip",)),
        (halves(window=16), ()),
    ):
        assert run(model, monkeypatch, folder, f"--output={tmp_path}/out.csv", *argv) == 0
    assert asked == [{"window": 16, "flip": True, "scales": (0.5, 1.0)}, {"flip": False}, {}]


def test_what_is_no_segmenter_has_no_windows(folder, monkeypatch, capsys):
    loaded = halves()
    task = {"target": "tasks.detection.Detection"}
    loaded = dataclasses.replace(loaded, recipe=dataclasses.replace(loaded.recipe, task=task))
    assert run(loaded, monkeypatch, folder, "--window=16") == 2
    assert "a test is no segmenter: windows, mirrored" in capsys.readouterr().err
    assert run(halves(), monkeypatch, folder, "--window=-1") == 2
    assert "window=-1 and stride=0 must be at least 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(halves(), monkeypatch, folder, "--scales=large")
    assert "wanted numbers such as 0.75,1,1.25" in capsys.readouterr().err
