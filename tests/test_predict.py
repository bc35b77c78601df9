"""What `predict` says of pictures: complete, in order, and whatever is wrong with some of them."""

import csv
import io
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax import predict
from vit_jax.errors import OutOfMemoryError
from vit_jax.pretrained import load, names
from vit_jax.pretrained.load import Loaded
from vit_jax.pretrained.preprocess import HALF, Preprocessing, standardize, step
from vit_jax.pretrained.recipe import Recipe

LABELS = ("cat", "dog", "a long, quoted name")


@pytest.fixture(scope="module")
def loaded():
    """A classifier that answers by the mean colour: red, green or blue."""
    module = vit_jax.create(
        "vit_ti16", 3, patch=8, width=8, depth=0, heads=1, pooling="mean", image_size=8
    )
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    )
    flat = {k: np.zeros(v.shape, np.float32) for k, v in names.flat(shapes).items()}
    for c in range(3):
        flat["params/backbone/embed/proj/kernel"][..., c, c] = 1 / 64
        flat["params/head/kernel"][c, c] = 3
    flat["params/backbone/norm/scale"][:] = 1
    return Loaded(
        module=module,
        variables=names.nested({k: jnp.asarray(v) for k, v in flat.items()}),
        preprocess=Preprocessing((step("Resize", size=(8, 8)), standardize(HALF, HALF))),
        labels=LABELS,
        source="a test",
        recipe=Recipe("ours", {}, names.Ours(), 3),
    )


@pytest.fixture
def folder(tmp_path):
    """Eleven pictures in two folders, one of them broken, and a text."""
    (tmp_path / "sub").mkdir()
    for i in range(10):
        image = np.zeros((20 + i, 31, 3), np.uint8)
        image[..., 2 - i % 3] = 255  # OpenCV has blue first
        cv2.imwrite(str(tmp_path / ("sub" if i > 4 else "") / f"{i}.png"), image)
    (tmp_path / "broken.jpg").write_text("no picture")
    (tmp_path / "notes.txt").write_text("left alone")
    return tmp_path


def run(argv, monkeypatch, loaded):
    monkeypatch.setattr(load, "load", lambda ref, **_: loaded)
    return predict.main(["--checkpoint=x", *map(str, argv)])


def test_each_picture_gets_its_likeliest_classes_in_order(folder, loaded, monkeypatch, capsys):
    out = folder / "out.json"
    assert run([folder, "--output", out, "--batch_size=4", "--top=2"], monkeypatch, loaded) == 0
    results = json.loads(out.read_text())
    assert [r["picture"] for r in results] == [str(p) for p in predict.pictures_of([str(folder)])]
    good = [r for r in results if "predictions" in r]
    assert len(good) == 10
    for result in good:
        number = int(result["picture"][-5])
        best, second = result["predictions"]
        assert best["label"] == number % 3
        assert best["name"] == LABELS[number % 3]
        assert best["probability"] > second["probability"] > 0
    error = capsys.readouterr().err
    assert "broken.jpg: no picture: it starts with 'no picture'" in error
    assert "images/s" in error


def test_csv_and_table_say_the_same(folder, loaded, monkeypatch, capsys):
    argv = [folder / "0.png", folder / "2.png", "--top=1"]
    assert run([*argv, "--format=csv"], monkeypatch, loaded) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["rank"], r["label"], r["name"]) for r in rows] == [
        ("1", "0", "cat"),
        ("1", "2", "a long, quoted name"),
    ]
    assert run(argv, monkeypatch, loaded) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder / "0.png")
    assert lines[1].split(maxsplit=1)[1] == "cat"
    assert lines[1].split()[0] == f"{float(rows[0]['probability']):.2%}"


def test_the_batch_shrinks_until_memory_suffices(folder, loaded):
    asked = []

    class Small:
        """A device for two pictures."""

        def __getattr__(self, name):
            return getattr(loaded, name)

        def __call__(self, image):
            asked.append(len(image))
            if len(image) > 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return loaded(image=image)

    files, said = predict.pictures_of([str(folder / "sub")]), []
    found = list(predict.predict(Small(), files, batch_size=5, warn=said.append))
    assert [r["predictions"][0]["label"] for r in found] == [2, 0, 1, 2, 0]
    assert asked == [5, 2, 2, 2]
    assert "going on with 2 pictures" in said[0]

    class Full(Small):
        def __call__(self, image):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with pytest.raises(OutOfMemoryError):
        list(predict.predict(Full(), files, batch_size=2))


def test_a_sheet_shows_the_pictures(folder, loaded, monkeypatch):
    sheet = folder / "sheet.png"
    assert run([folder / "sub", f"--sheet={sheet}"], monkeypatch, loaded) == 0
    assert cv2.imread(str(sheet)).shape[1] > 5 * 100


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["{folder}/nowhere"], 3, "there is no picture or folder"),
        (["{folder}/notes.txt"], 3, "none of the 1 files is a picture"),
        (["{folder}/broken.jpg"], 3, "none of the 1 files"),
        (["{folder}", "--top=0"], 2, "--top=0 must be at least 1"),
        (["{folder}", "--output={folder}/no/out.csv"], 2, "cannot be written"),
        (["{folder}", "--output={folder}"], 2, "cannot be written"),
    ],
)
def test_what_is_wrong_is_one_sentence(argv, status, said, folder, loaded, monkeypatch, capsys):
    argv = [a.format(folder=folder) for a in argv]
    assert run(argv, monkeypatch, loaded) == status
    assert said in capsys.readouterr().err


def test_a_backbone_without_a_head_names_no_classes(folder, loaded, monkeypatch, capsys):
    class Headless:
        def __getattr__(self, name):
            return getattr(loaded, name)

        def __call__(self, image):
            return object()

    assert run([folder], monkeypatch, Headless()) == 2
    assert "has no head" in capsys.readouterr().err
