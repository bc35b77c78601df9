"""Law 6: every command in README.md and docs/ is executed, shortened to a few steps."""

import importlib
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

import vit_jax
from tests.pretrained.families.test_clip import publish, words
from tests.pretrained.test_dense import model_of
from vit_jax.models import swin
from vit_jax.pretrained import hf

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "hf_vit_tiny"  # stands in for what the Hub holds
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A line's own values come first, so that they are executed too; what makes it short comes last.
SHORT = ["--config.steps=1", "--config.batch_size=4", "--config.eval_every=1"]
SMALL = {
    "vit": ["--config.model.backbone.width=16", "--config.model.backbone.depth=1"],
    "hybrid": ["--config.model.backbone.width=16", "--config.model.backbone.depth=1"],
    "swin": ["--config.model.backbone.width=8", "--config.model.backbone.depths=(1,1)"],
    "cvt": ["--config.model.backbone.widths=(8,8,16)", "--config.model.backbone.depths=(1,1,1)"],
    "detr": [
        *("--config.model.width=16", "--config.model.hidden=16", "--config.model.decoder_depth=1"),
        *("--config.model.backbone.width=16", "--config.model.backbone.depth=1"),
    ],
    "setr": [
        *("--config.model.features=8", "--config.model.backbone.width=16"),
        *("--config.model.backbone.depth=1", "--config.model.backbone.taps=(0,)"),
    ],
    "upernet": ["--config.model.features=8", "--config.model.backbone.width=8"],
    "masked": [
        *("--config.model.backbone.width=16", "--config.model.backbone.depth=1"),
        *("--config.model.decoder_width=16", "--config.model.decoder_depth=1"),
    ],
    "clip": [
        *("--config.model.backbone.width=12", "--config.model.backbone.depth=1"),
        *("--config.model.text.width=12", "--config.model.text.depth=1"),
        *("--config.model.features=8", "--config.image_size=32"),
    ],
    "captioner": [
        *("--config.model.width=16", "--config.model.depth=1", "--config.image_size=32"),
        "--config.model.backbone.width=8",
    ],
}


def blocks(language):
    for document in DOCUMENTS:
        text = document.read_text()
        yield from re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in dict.fromkeys(lines) if line]


PROGRAM = re.compile(r"python -m vit_jax\.(\w+) ")
# What some commands start from, and a word of the command that makes it.
STARTS = {
    "runs/vit-finetune": "configs/vit.py:finetune",
    "runs/detr-folder": "configs/detr.py:folder",
    "runs/masked": "configs/masked.py",
    "runs/clip-scenes": "configs/clip.py",
    "runs/captioner-scenes": "configs/captioner.py",
    "=tokenizer.json": "vit_jax.tokenizer",
}
# Half a minute each: much to compile.
SLOW = re.compile(
    r"configs/(detr|setr|upernet|clip|captioner|masked)|runs/(detr|clip|captioner|masked)|=input|"
    r"cvt\.py:cifar10|swin\.py:imagenet|optimizer\.name=lamb|cvt_13|vit_jax\.benchmark"
)


def test_every_command_is_of_a_kind_that_is_executed_here():
    known = (
        "python -m vit_jax.",
        "make ",
        "source .venv/bin/activate",
        "pip install -e",
        "git clone",
        "cd ",
    )
    assert commands()
    for line in commands():
        assert line.startswith(known), line


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("make ")])
def test_a_make_target_exists(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder to work in, with the pictures and datasets that the README speaks of."""
    place = tmp_path_factory.mktemp("readme")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (place / "my_pictures" / name).mkdir(parents=True)
        for i in range(10):
            image = random.integers(0, 256, (40, 50, 3), np.uint8)
            cv2.imwrite(str(place / "my_pictures" / name / f"{i}.jpg"), image)
    (place / "my_objects").mkdir()
    for i in range(10):
        image = random.integers(0, 256, (40, 50, 3), np.uint8)
        cv2.imwrite(str(place / "my_objects" / f"{i}.jpg"), image)
        (place / "my_objects" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename><object><name>cat</name><bndbox><xmin>5</xmin>"
            "<ymin>6</ymin><xmax>30</xmax><ymax>35</ymax></bndbox></object></annotation>"
        )
    (place / "my_captions").mkdir()
    for i in range(10):
        cv2.imwrite(str(place / "my_captions" / f"{i}.jpg"), image)
    lines = [f"{i}.jpg\t{['a cat sits', 'a dog runs'][i % 2]}\n" for i in range(10)]
    (place / "my_captions" / "captions.txt").write_text("".join(lines))
    return place


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Small models in the place of published ones."""
    clip = publish("clip_tiny", tmp_path_factory.mktemp("hub"))
    words(clip)
    detr = tmp_path_factory.mktemp("detr")
    hf.save(model_of("DETR"), detr)

    def download(repository, wanted=()):
        return next((at for n, at in {"clip": clip, "detr": detr}.items() if n in repository), TINY)

    return download


def shortened(line):
    """A command of the documents as the arguments of a run of seconds."""
    argv = shlex.split(PROGRAM.sub("", line))
    if "vit_jax.benchmark" in line:
        argv += ["--rounds=1", "--seconds=0.01"]
        if "--config" not in line:
            return [*argv, "--image_size=32", "--set", "depth=1"]
        return ["--config=configs/vit.py:tiny" if a.startswith("--config=") else a for a in argv]
    if "vit_jax.tokenizer" in line:
        return argv
    spec = next((a for a in argv if a.startswith("--config=")), "")
    if not spec:
        return argv
    name, _, recipe = Path(spec.removeprefix("--config=")).name.partition(":")
    small = SMALL[name.removesuffix(".py")]
    if recipe == "imagenet":
        small = []
    if recipe in ("finetune", "probe"):  # the model is the checkpoint's
        small = ["--config.image_size=32"]
    if recipe in ("cifar10", "imagenet"):  # real ones are downloaded: digits stand in for them
        argv = [a for a in argv if "data_dir" not in a]
        argv += ["--config.data.name=digits", "--config.image_size=32"]
    return [*argv, *SHORT, *small]


def marked(texts):
    return [pytest.param(t, marks=[pytest.mark.slow] * bool(SLOW.search(t))) for t in texts]


@pytest.mark.parametrize("line", marked(c for c in commands() if PROGRAM.match(c)))
def test_a_command_of_the_documents_runs(line, folder, hub, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(swin, "swin_t", partial(swin.Swin, width=8, depths=(1, 1), heads=(1, 2)))
    monkeypatch.setattr(hf, "download", hub)
    for start, made_by in STARTS.items():
        there = (Path(start) / "checkpoints").exists() or Path(start.removeprefix("=")).is_file()
        if start in line and made_by not in line and not there:
            first = next(c for c in commands() if made_by in c and "dry_run" not in c)
            assert run(first) == 0, capsys.readouterr().err
    if line.endswith(" --mode=eval"):  # of a run that another process's test may have made
        assert run(line.removesuffix(" --mode=eval")) == 0, capsys.readouterr().err
    for word in line.split():  # a test may be run twice
        if word.startswith("--output=") and Path(word[9:]).is_dir():
            shutil.rmtree(word[9:])
    assert run(line) == 0, capsys.readouterr().err


def run(line):
    """The exit status of a command of the documents."""
    return importlib.import_module(f"vit_jax.{PROGRAM.match(line)[1]}").main(shortened(line))


@pytest.mark.parametrize("block", marked(blocks("python")))
def test_the_python_of_the_documents_runs(block, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf, "download", hub)
    given = {"vit_jax": vit_jax, "picture": np.zeros((48, 64, 3), np.uint8)}
    exec(compile(block, "README.md", "exec"), given)


def test_every_picture_of_the_documents_exists():
    for document in DOCUMENTS:
        for link in re.findall(r"!?\[[^\]]*\]\(([^)#]+)\)", document.read_text()):
            if "://" not in link:
                assert (document.parent / link).exists(), (document.name, link)
