"""The command line as a person types it; wrong ones are caught before any device is touched."""

import json
from pathlib import Path

import pytest

from vit_jax import main

ROOT = Path(__file__).parent.parent


def test_values_files_and_folders_are_read_from_the_command_line():
    config, workdir, mode, dry = main.parse(
        ["--config=configs/vit.py:tiny", "--config.batch_size=16", "--config.image_size=24"]
    )
    assert config["batch_size"] == 16
    assert config["model"]["backbone"]["image_size"] == 24  # a reference follows its source
    assert config["train"]["transforms"][2]["size"] == [24, 24]
    assert (workdir, mode, dry) == (Path("runs/vit-tiny"), "train", False)
    assert main.parse(["--config=configs/vit.py", "--workdir=a/b"])[1] == Path("a/b")
    json.dumps(config)


def test_a_config_is_found_beside_the_package_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.parse(["--config=configs/swin.py"])[1] == Path("runs/swin-digits")
    assert main.parse(["--config=configs/setr.py"])[1] == Path("runs/setr-scenes")


@pytest.mark.parametrize(
    ("said", "kept"), [("True", True), ("false", False), ("dots_saveable", "dots_saveable")]
)
def test_remat_is_a_switch_or_the_name_of_what_is_kept(said, kept):
    for name in ("vit", "clip", "masked"):
        line = [f"--config=configs/{name}.py", f"--config.model.backbone.remat={said}"]
        model = main.parse(line)[0]["model"]
        assert model["backbone"]["remat"] == kept
        assert not any(part["remat"] for part in (model, model.get("text", {})) if "remat" in part)


def test_help_teaches(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--config=configs/cvt.py", "--dry_run", "--mode=eval", "cifar10"):
        assert word in text
