"""Cut and resumed equals uncut, bit for bit: every config, an epoch's border, threads, processes.

What a signal leaves, and how ViT goes on from it, is in test_train.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import chaos
from vit_jax import faults, main
from vit_jax.report import read_metrics
from vit_jax.run import check_owner, claim

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem[0] != "_")
CONFIGS.remove("common")
# A row of three steps is cut in the middle.
SHRUNK = ["--config.steps=4", "--config.eval_every=4", "--config.checkpoint_every=4"]
SHRUNK += ["--config.log_every=3", "--config.ema=0.9"]
# 1,442 pictures: the second epoch begins within the third step.
EPOCHS = ["--config=configs/vit.py:tiny", *SHRUNK, "--config.batch_size=512"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Compiles what several runs share once."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield names["jax_compilation_cache_dir"]
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def parts(workdir):
    """All that a run leaves behind."""
    return chaos.hashes(workdir), read_metrics(workdir), chaos.curves(workdir)


def cut_and_resumed(argv, workdir, monkeypatch, *, at=2):
    """Two processes' work in one: SIGTERM in a step, which is saved, and the rest."""
    monkeypatch.setenv(faults.VARIABLE, f"term@{at}")
    assert main.main([*argv, f"--workdir={workdir}"]) == 143
    assert chaos.finished(workdir) == [at]
    monkeypatch.delenv(faults.VARIABLE)
    assert main.main([*argv, f"--workdir={workdir}"]) == 0
    return parts(workdir)


def test_a_run_that_was_killed_while_it_claimed_its_folder_starts_all_the_same(tmp_path):
    config = main.parse(["--config=configs/vit.py:tiny"])[0]
    (tmp_path / "labels.json").write_text("[]\n")
    (tmp_path / "config.json.tmp").write_text('{"seed":')
    claim(tmp_path, config, ("cat", "dog"))
    assert check_owner(tmp_path, config)
    assert json.loads((tmp_path / "labels.json").read_text()) == ["cat", "dog"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "vit" else pytest.mark.long)
        for name in CONFIGS
    ],
)
def test_every_config_goes_on_bit_for_bit(name, programs, tmp_path, monkeypatch):
    argv = [f"--config=configs/{name}.py:tiny", *SHRUNK]
    assert main.main([*argv, f"--workdir={tmp_path / 'uncut'}"]) == 0
    assert cut_and_resumed(argv, tmp_path / "cut", monkeypatch) == parts(tmp_path / "uncut")


@pytest.fixture(scope="module")
def two_epochs(programs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("epochs") / "uncut"
    assert main.main([*EPOCHS, f"--workdir={workdir}"]) == 0
    return parts(workdir)


@pytest.mark.long
def test_a_run_goes_on_across_an_epochs_border(two_epochs, tmp_path, monkeypatch):
    argv = [*EPOCHS, "--config.data.threads=0"]
    assert cut_and_resumed(argv, tmp_path / "cut", monkeypatch) == two_epochs


def process(argv, workdir, programs, fault):
    environment = os.environ | {
        faults.VARIABLE: fault,
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "vit_jax.main", *argv, f"--workdir={workdir}"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


@pytest.mark.long
def test_another_number_of_worker_processes_makes_the_same_run(two_epochs, programs, tmp_path):
    workdir = tmp_path / "cut"
    assert process([*EPOCHS, "--config.data.workers=2"], workdir, programs, "term@2") == 143
    assert chaos.finished(workdir) == [2]
    assert main.main([*EPOCHS, "--config.data.workers=1", f"--workdir={workdir}"]) == 0
    assert parts(workdir) == two_epochs


@pytest.mark.long
def test_no_row_and_no_point_of_a_curve_is_lost_by_a_kill(two_epochs, programs, tmp_path):
    workdir = tmp_path / "cut"
    argv = [*EPOCHS, "--config.log_every=1", "--config.checkpoint_every=2"]
    assert process(argv, workdir, programs, "kill@4") == -9
    start = max(chaos.finished(workdir), default=0)
    shown = {step for step, _, _ in chaos.curves(workdir)}
    assert shown >= set(range(1, start + 1))  # what a new process will not write again
    assert main.main([*argv, f"--workdir={workdir}"]) == 0
    steps = [row["step"] for row in read_metrics(workdir) if row["split"] == "train"]
    assert steps == [1, 2, 3, 4]
    assert [s for s, tag, _ in chaos.curves(workdir) if tag == "train/loss"] == steps
    assert chaos.hashes(workdir) == two_epochs[0]
