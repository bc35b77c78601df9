"""The command line as a person types it; wrong ones are caught before any device is touched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax import main

ROOT = Path(__file__).parent.parent

WRONG = {
    "": "try --config=configs/cvt.py",
    "--confg=configs/cvt.py": "--confg is no flag",
    "--config configs/cvt.py": "with the equals sign",
    "--config=configs/cvtt.py": "no config file 'configs/cvtt.py'. Did you mean 'configs/cvt.py'",
    "--config=configs/cvt.py:imagnet": "no recipe 'imagnet'. Did you mean 'imagenet'?",
    "--config=configs/cvt.py batch_size=3": "write --config.batch_size=3",
    "--config=configs/cvt.py train": "'train' is no flag",
    "--config=configs/cvt.py --workdr=x": "workdir",
    "--config=configs/cvt.py --mode=evaluate": "<train|eval>",
    "--config=configs/cvt.py --config.batchsize=3": "'batchsize'. Did you mean 'batch_size'",
    "--config=configs/cvt.py --config.optimizer.weight_deca=0": "'optimizer.weight_decay'",
    "--config=configs/cvt.py --config.model.backbone.width=3": "model.backbone.widths",
    "--config=configs/cvt.py --config.train.transforms[9].size=3": "train.transforms[9].size",
    "--config=configs/cvt.py --config.batch_size=abc": "batch_size=abc: a whole number",
    "--config=configs/cvt.py --config.batch_size=1.5": "batch_size=1.5: a whole number",
    "--config=configs/cvt.py --config.batch_size=True": "batch_size=True: a whole number",
    "--config=configs/cvt.py --config.batch_size=None": "batch_size=None: a whole number",
    "--config=configs/cvt.py --config.learning_rate=fast": "learning_rate=fast: a number",
    "--config=configs/cvt.py --config.epochs": "epochs",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_is_one_sentence_with_the_nearest_right_name(line, capsys):
    argv = line.split() or ["--mode=train"]
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert WRONG[line] in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out


def test_a_misspelt_key_in_a_config_file_is_an_error(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import vit\n"
        "def get_config(recipe='tiny'):\n"
        "    config = vit.get_config(recipe)\n"
        "    config.learnig_rate = 1e-3\n"
        "    return config\n"
    )
    assert main.main([f"--config={file}"]) == 2
    assert "learning_rate" in capsys.readouterr().err


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


def test_help_teaches(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--config=configs/cvt.py", "--dry_run", "--mode=eval", "cifar10"):
        assert word in text


def test_a_wrong_key_stops_the_program_before_it_imports_jax():
    code = (
        "import sys; from vit_jax import main; status = main.main(sys.argv[1:]);"
        "sys.exit(status if 'jax' not in sys.modules else 99)"
    )
    argv = [sys.executable, "-c", code, "--config=configs/cvt.py", "--config.batchsize=3"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
