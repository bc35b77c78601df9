"""What is exported opens elsewhere with the same logits, or is not kept."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import vit_jax
from vit_jax import export
from vit_jax.errors import CheckpointError, ConfigError

TINY = Path(__file__).parent / "golden" / "hf_vit_tiny"


@pytest.fixture(scope="module")
def loaded():
    return vit_jax.load(TINY)


@pytest.fixture(scope="module")
def program(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "program"
    assert export.export(loaded, "stablehlo", folder) < 1e-6
    return folder


def test_the_program_runs_without_this_package_on_any_number_of_pictures(program, loaded, tmp_path):
    random = np.random.default_rng(0)
    files = []
    for i, shape in enumerate([(31, 57), (70, 20), (5, 5)]):
        files.append(str(tmp_path / f"{i}.png"))
        cv2.imwrite(files[-1], random.integers(0, 256, (*shape, 3), np.uint8))
    # A name that cannot be imported: the script would fail if it asked for it.
    (tmp_path / "vit_jax.py").write_text("raise ImportError('vit_jax must not be needed')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for count in (1, 3):
        done = subprocess.run(
            [sys.executable, program / "run.py", *files[:count]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[::4] == files[:count]
        logits = np.asarray(loaded(image=loaded.preprocess(files[:count])), np.float64)
        odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        for row, place in zip(odds, range(0, 4 * count, 4), strict=True):
            told = {line.split()[1]: float(line.split()[0][:-1]) for line in lines[place + 1 :][:3]}
            for label, share in zip(loaded.labels, row, strict=True):
                assert told[label] == pytest.approx(100 * share, abs=0.011)


@pytest.mark.parametrize(
    "steps",
    [
        [{"target": "data.transforms.Resize", "size": 40, "interpolation": "bicubic"},
         {"target": "data.transforms.CenterCrop", "size": [32, 48]}],
        [{"target": "data.transforms.ResizeCenterCrop", "size": [32, 48], "crop": 0.9}],
        [{"target": "data.transforms.ResizeCenterCrop", "size": 33, "crop": 1.0,
          "interpolation": "area"}],
        [{"target": "data.transforms.Resize", "size": [32, 48], "interpolation": "lanczos"}],
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(31, 57), (70, 20), (8, 9)])
def test_the_script_prepares_pictures_as_the_model_does(steps, shape, tmp_path, monkeypatch):
    from vit_jax.pretrained import standalone
    from vit_jax.pretrained.preprocess import Preprocessing

    steps = [*steps, {"target": "data.transforms.Standardize", "mean": [0.4] * 3, "std": [0.2] * 3}]
    (tmp_path / "preprocessing.json").write_text(json.dumps(steps))
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    monkeypatch.setattr(standalone, "HERE", tmp_path)
    np.testing.assert_array_equal(
        standalone.prepare(tmp_path / "a.png"), Preprocessing(tuple(steps)).one(tmp_path / "a.png")
    )


def test_weights_lie_outside_the_program(program):
    sizes = {name: (program / name).stat().st_size for name in (export.PROGRAM, export.WEIGHTS)}
    assert sizes[export.WEIGHTS] > 4 * 8000  # 8,000 numbers and more
    text = (program / export.PROGRAM).read_bytes()
    weights = np.asarray(vit_jax.load(TINY).variables["params"]["head"]["kernel"])
    assert weights.tobytes() not in text


def test_the_command_writes_what_it_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VIT_JAX_ATTENTION", "fused")  # which other platforms do not have
    out = tmp_path / "new" / "model"
    argv = [f"--checkpoint={TINY}", "--to=hf", f"--output={out}"]
    assert export.main(argv) == 0
    assert os.environ["VIT_JAX_ATTENTION"] == "plain"
    assert "the largest difference is 0.0e+00" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert export.main(argv) == 2
    assert "exists and is not empty: nothing was written" in capsys.readouterr().err


def test_what_gives_other_logits_is_not_kept(loaded, tmp_path, monkeypatch):
    def wrong(model, folder):
        (folder / "model").write_text("nonsense")
        return 0.1

    monkeypatch.setitem(export.FORMS, "hf", wrong)
    with pytest.raises(CheckpointError, match=r"other logits, by 1.0e-01"):
        export.export(loaded, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_nothing(loaded, tmp_path, monkeypatch):
    def full(model, folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export.FORMS, "hf", full)
    with pytest.raises(ConfigError, match="No space left"):
        export.export(loaded, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_backbone_without_a_head_is_no_program(loaded, tmp_path):
    headless = dataclasses.replace(loaded, module=loaded.module.backbone)
    with pytest.raises(ConfigError, match="has no head"):
        export.export(headless, "stablehlo", tmp_path / "out")


def test_onnx_without_its_extra_says_what_to_install(loaded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ConfigError, match=r"needs jax2onnx: pip install -e \"\.\[onnx\]\""):
        export.export(loaded, "onnx", tmp_path / "out")


@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
def test_onnx_gives_the_same_logits_for_any_batch(loaded, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    pytest.importorskip("jax2onnx", reason="the extra `onnx` is not installed")
    assert export.export(loaded, "onnx", tmp_path / "out") < 1e-4
    session = runtime.InferenceSession(tmp_path / "out" / export.ONNX)
    image = np.random.default_rng(1).normal(size=(2, 32, 48, 3)).astype(np.float32)
    (got,) = session.run(None, {session.get_inputs()[0].name: image})
    np.testing.assert_allclose(got, loaded(image=image), atol=1e-5)
