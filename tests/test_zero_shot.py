"""Classes, captions and searches by words alone, with a model that knows three colours."""

import csv
import io
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from vit_jax import predict, zero_shot
from vit_jax.build import build
from vit_jax.pretrained import load, names
from vit_jax.pretrained.load import Loaded
from vit_jax.pretrained.preprocess import HALF, Preprocessing, standardize, step
from vit_jax.pretrained.recipe import Recipe

COLOURS = ("red", "green", "blue")
LENGTH, WORDS = 7, 6
SCALE = 20.0


def tokenizer(folder):
    """A tokenizer.json of three colours; all other words are one that says nothing."""
    vocabulary = {"<other>": 0, "<start>": 1, "<end>": 2} | {
        c: 3 + i for i, c in enumerate(COLOURS)
    }
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<start>", 1), ("<end>", 2)]
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=marks
    )
    backend.add_special_tokens(["<start>", "<end>"])
    backend.save(str(folder / "tokenizer.json"))


def colourful(folder, loss="softmax"):
    """A model of pictures by their mean colour, and of texts by the mean of the colours in them.

    The text's one block attends evenly to all tokens so far, and passes on what they are.
    """
    size = {"width": 8, "heads": 1}
    backbone = {"target": "models.vit.ViT", "patch": 8, "depth": 0, **size}
    backbone |= {"pooling": "mean", "image_size": 8}
    text = {"target": "models.clip.TextTransformer", "length": LENGTH, "depth": 1, **size}
    text |= {"vocabulary": WORDS, "end": 2}
    classifier = {"target": "models.clip.CLIP", "features": 3, "text": text}
    classifier |= {"bias": -10.0} if loss == "sigmoid" else {}
    module = build(classifier | {"backbone": backbone})
    batch = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, LENGTH), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *batch, train=False))
    flat = {k: np.zeros(v.shape, np.float32) for k, v in names.flat(shapes).items()}
    for c in range(3):
        flat["params/backbone/embed/proj/kernel"][..., c, c] = 1 / 64
        flat["params/text/embed/embedding"][3 + c, c] = 1
        for side in ("image", "text"):
            flat[f"params/{side}_projection/kernel"][c, c] = 1
    for part in ("value", "out"):
        flat[f"params/text/block_0/attention/{part}/kernel"][:] = np.eye(8)
    for norm in ("backbone/norm", "text/norm", "text/block_0/norm1"):
        flat[f"params/{norm}/scale"][:] = 1
    flat["params/logit_scale"] = np.log(np.float32(SCALE))
    if loss == "sigmoid":
        flat["params/logit_bias"] = np.float32(-10)
    return Loaded(
        module=module,
        variables=names.nested({k: jnp.asarray(v) for k, v in flat.items()}),
        preprocess=Preprocessing((step("Resize", size=(8, 8)), standardize(HALF, HALF))),
        labels=(),
        source="a test",
        recipe=Recipe(
            "ours",
            backbone,
            names.Ours(),
            None,
            classifier=classifier,
            task={"target": "tasks.contrastive.Contrastive", "loss": loss},
            inputs={"tokens": ((LENGTH,), "int32")},
        ),
        words=folder,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tokenizer(folder)
    return {loss: colourful(folder, loss) for loss in ("softmax", "sigmoid")}


@pytest.fixture
def opened(made, monkeypatch):
    """The commands open it by its loss."""
    monkeypatch.setattr(load, "load", lambda ref, **options: made[ref])


@pytest.fixture
def folder(tmp_path):
    """Five pictures of each colour in a folder of its name, the later the paler."""
    for c, colour in enumerate(COLOURS):
        place = tmp_path / "pictures" / colour
        place.mkdir(parents=True)
        for i in range(5):
            image = np.full((20, 31, 3), 30 * i, np.uint8)
            image[..., 2 - c] = 255  # OpenCV has blue first
            cv2.imwrite(str(place / f"{colour}{i}.png"), image)
    return tmp_path / "pictures"


def table(text):
    return [line.split(maxsplit=1) for line in text.splitlines() if "%" in line]


def test_captions_are_told_with_their_probabilities_likeliest_first(opened, folder, capsys):
    picture = str(folder / "green" / "green0.png")
    argv = ["--checkpoint=softmax", picture, "--captions", "something Red", "a green thing", "blue"]
    assert predict.main(argv) == 0
    found = table(capsys.readouterr().out)
    assert found[0][1] == "a green thing"
    shares = [float(share.rstrip("%")) for share, _ in found]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    assert shares[0] > 99


def test_captions_come_as_json_and_csv(opened, folder, tmp_path, capsys):
    captions = ["--captions", "red", "blue"]
    file = tmp_path / "found.json"
    argv = ["--checkpoint=softmax", str(folder / "blue"), f"--output={file}", *captions]
    assert predict.main(argv) == 0
    rows = json.loads(file.read_text())
    assert len(rows) == 5
    for row in rows:
        assert [p["name"] for p in row["predictions"]] == ["blue", "red"]
        assert sum(p["probability"] for p in row["predictions"]) == pytest.approx(1)
    assert predict.main(["--checkpoint=softmax", str(folder), "--format=csv", *captions]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 30
    assert rows[0]["name"] == "blue"
    assert rows[0]["rank"] == "1"


def test_a_model_of_pairs_tells_each_caption_by_itself(opened, made, folder, capsys):
    picture = str(folder / "red" / "red0.png")
    argv = ["--checkpoint=sigmoid", picture, "--captions", "red", "some red", "blue", "--top=2"]
    assert predict.main(argv) == 0
    found = table(capsys.readouterr().out)
    assert [text for _, text in found] == ["red", "some red"]
    assert all(float(share.rstrip("%")) > 99 for share, _ in found)


def test_a_search_ranks_a_folder_and_draws_the_nearest(opened, folder, tmp_path, capsys):
    (folder / "broken.png").write_text("no picture")
    sheet, file = tmp_path / "sheet.png", tmp_path / "ranks.csv"
    argv = ["--checkpoint=softmax", str(folder), "--search", "green stuff", f"--sheet={sheet}"]
    assert predict.main([*argv, "--top=7"]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert len(lines) == 7
    assert [path[-10:-5] for _, path in lines[:5]] == ["green"] * 5
    values = [float(value) for value, _ in lines]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.99 > values[5]
    assert "left out" in err
    assert "broken.png" in err
    assert "the nearest 7 of 15 pictures" in err
    height, width = cv2.imread(str(sheet)).shape[:2]
    assert width > 400
    assert height > 128
    assert predict.main([*argv, f"--output={file}"]) == 0
    assert len(list(csv.DictReader(file.open()))) == 15


def test_a_search_draws_a_sheet_unasked(opened, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert predict.main(["--checkpoint=sigmoid", str(folder), "--search", "blue"]) == 0
    assert (tmp_path / "search.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], 'needs texts to compare pictures with: --captions "a cat" "a dog", or --search'),
        (["--captions", "red", "--search", "blue"], "--captions and --search: wanted one of them"),
        (["--captions", "red", " "], "a text is empty"),
        (["--search", " "], "a text is empty"),
        (["--captions", "red", "--draw=drawn"], "--draw is for models that say where"),
        (["--search", "red", "--threshold=0.5"], "--threshold=0.5 has no meaning"),
        (["--search", "red", "--sheet=no/such/sheet.png"], "cannot be written"),
    ],
)
def test_a_wrong_line_is_one_sentence(opened, folder, arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert predict.main(["--checkpoint=softmax", str(folder), *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_what_a_text_is_too_long_for_is_said(opened, folder, capsys):
    picture = str(folder / "red" / "red0.png")
    argv = ["--checkpoint=softmax", picture, "--captions", "red", "a " * 9]
    assert predict.main(argv) == 0
    assert "1 of 2 texts are longer than 7 tokens and are cut" in capsys.readouterr().err
    assert predict.main([*argv[:2], "--captions", "red"]) == 0
    assert "a single one always has 100 %" in capsys.readouterr().err


def test_a_class_is_the_normalised_mean_of_its_sentences(made):
    model = made["softmax"]
    templates = ("a {} one", "{} and blue", "{}")
    found = zero_shot.described(model, COLOURS, templates=templates)
    for c, colour in enumerate(COLOURS):
        each = np.asarray(
            model(tokens=model.tokenize([t.replace("{}", colour) for t in templates]))[
                "text_embedding"
            ]
        )
        mean = each.mean(0)
        wanted = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(found.embeddings[c], wanted, atol=1e-6)
    assert (found.scale, found.bias) == (pytest.approx(SCALE), 0.0)


def test_more_texts_than_fit_at_once_have_the_same_embeddings(made, monkeypatch):
    texts = ["red", "green blue", "blue", "red red green", "no colour at all, blue"]
    wanted = zero_shot.embedded(made["softmax"], texts)
    monkeypatch.setattr(zero_shot, "TEXTS", 2)
    np.testing.assert_allclose(zero_shot.embedded(made["softmax"], texts), wanted, atol=1e-6)


def run(*arguments):
    return zero_shot.main(["--checkpoint=softmax", "--data=folder", *arguments])


def test_a_folder_is_classified_by_the_names_of_its_folders(opened, folder, tmp_path, capsys):
    file, templates = tmp_path / "found.json", tmp_path / "templates.txt"
    templates.write_text("a {} thing\n\nmuch {}\n")
    (folder / "red" / "broken.png").write_text("no picture")
    where = [f"--data_dir={folder}", "--split=train", f"--output={file}"]
    assert run(*where, f"--templates={templates}", "--batch_size=4") == 0
    out, _err = capsys.readouterr()
    assert "top-1 100.00% (by chance 33.33%)" in out
    numbers = json.loads(file.read_text())
    assert numbers["accuracy"] == 1.0
    assert numbers["templates"] == ["a {} thing", "much {}"]
    assert numbers["examples"] + numbers["left_out"] > 10
    # In the order of the classes: blue, green, red.
    wrong = tmp_path / "names.txt"
    wrong.write_text("green\nblue\nred\n")
    assert run(*where, f"--names={wrong}") == 0
    assert json.loads(file.read_text())["accuracy"] == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("content", "arguments", "status", "said"),
    [
        ("no place", ["--templates=FILE"], 2, "'no place' has no place for a name"),
        ("", ["--templates=FILE"], 2, "holds nothing"),
        ("red\n", ["--names=FILE"], 2, "has 1 names, and folder has 3 classes"),
        (b"\xff\xfe\xff", ["--names=FILE"], 2, "is not UTF-8"),
        ("", ["--templates=nowhere.txt"], 2, "cannot be read: No such file"),
        ("", ["--batch_size=0"], 2, "--batch_size=0 must be at least 1"),
        ("", ["--data=foldr"], 2, "Did you mean 'folder'"),
        ("", ["--data=scenes"], 2, "no label"),
        ("", ["--data_dir=/no/such/folder"], 3, "/no/such/folder"),
    ],
)
def test_a_wrong_line_of_the_command_is_one_sentence(
    opened, folder, tmp_path, content, arguments, status, said, capsys
):
    file = tmp_path / "file.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [argument.replace("FILE", str(file)) for argument in arguments]
    assert run(f"--data_dir={folder}", *arguments) == status
    assert said in capsys.readouterr().err


def test_a_model_that_reads_no_texts_is_refused(made):
    other = made["softmax"]
    classifier = Loaded(
        other.module,
        other.variables,
        other.preprocess,
        (),
        "a classifier",
        Recipe("ours", {}, names.Ours(), 3),
    )
    with pytest.raises(ValueError, match="a classifier reads no texts: wanted CLIP, SigLIP"):
        zero_shot.described(classifier, COLOURS)
