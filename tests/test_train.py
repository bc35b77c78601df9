"""Whole runs of the smallest config, driven as a person drives them."""

import json
import os
import signal

import cv2
import numpy as np
import pytest

from vit_jax import main
from vit_jax.report import Report, read_metrics

TINY = "--config=configs/vit.py:tiny"
RUN = ["--config.steps=6", "--config.eval_every=3", "--config.checkpoint_every=2"]
RUN += ["--config.log_every=1", "--config.ema=0.9", "--config.model.backbone.dropout=0.1"]


def run(capsys, *argv):
    """Status and what was printed on both streams."""
    capsys.readouterr()
    status = main.main(list(argv))
    return status, *capsys.readouterr()


def last_state(workdir):
    """Every file of the newest checkpoint's seal: step and digest of all arrays."""
    folder = workdir / "checkpoints"
    newest = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    return newest, json.loads((folder / str(newest) / "seal" / "metadata").read_text())


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uncut") / "run"
    assert main.main([TINY, *RUN, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM]
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(number, uncut, tmp_path, capsys, monkeypatch):
    workdir, progress = tmp_path / "run", Report.progress

    def stop_after_three(self, step, numbers):
        progress(self, step, numbers)
        if step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Report, "progress", stop_after_three)
    status, out, _ = run(capsys, TINY, *RUN, f"--workdir={workdir}")
    assert status == 128 + number
    assert "stopped at step 3" in out
    assert last_state(workdir)[0] == 3
    monkeypatch.undo()
    status, out, _ = run(capsys, TINY, *RUN, f"--workdir={workdir}")
    assert status == 0
    assert "going on from step 3" in out
    assert last_state(workdir) == last_state(uncut)
    assert read_metrics(workdir) == read_metrics(uncut)  # none doubled, none missing


@pytest.mark.slow
def test_a_run_stopped_before_its_last_evaluation_makes_up_for_it(
    uncut, tmp_path, capsys, monkeypatch
):
    workdir, progress = tmp_path / "run", Report.progress

    def stop_after_the_last(self, step, numbers):
        progress(self, step, numbers)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "progress", stop_after_the_last)
    assert run(capsys, TINY, *RUN, f"--workdir={workdir}")[0] == 143
    monkeypatch.undo()
    assert run(capsys, TINY, *RUN, f"--workdir={workdir}")[0] == 0
    assert read_metrics(workdir) == read_metrics(uncut)
    assert (workdir / "predictions.png").exists()


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vit_jax.train.set_up", interrupted)
    status, _, err = run(capsys, TINY, f"--workdir={tmp_path / 'run'}")
    assert (status, err) == (130, "stopped before anything was trained\n")


def test_a_finished_run_says_so_and_changes_nothing(uncut, capsys):
    before = {p: p.stat().st_mtime_ns for p in (uncut / "checkpoints").rglob("*")}
    rows = read_metrics(uncut)
    status, out, _ = run(capsys, TINY, *RUN, f"--workdir={uncut}")
    assert status == 0
    assert "finished already: 6 steps" in out
    assert read_metrics(uncut) == rows
    assert {p: p.stat().st_mtime_ns for p in (uncut / "checkpoints").rglob("*")} == before


def test_the_rows_of_a_run_name_step_epoch_and_split(uncut):
    rows = read_metrics(uncut)
    evaluated = [(r["step"], r["split"]) for r in rows if r["split"] != "train"]
    assert evaluated == [(s, v) for s in (3, 6) for v in ("validation", "validation_ema")]
    assert [r["step"] for r in rows if r["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert {"epoch", "loss", "accuracy"} <= row.keys()


def test_evaluation_repeats_the_last_row(uncut, capsys):
    status, out, _ = run(capsys, TINY, *RUN, f"--workdir={uncut}", "--mode=eval")
    assert status == 0
    last = [r for r in read_metrics(uncut) if r["split"] == "validation"][-1]
    assert f"accuracy {last['accuracy']:.2%}".replace("%", " %") in out.replace("  ", " ")


def test_another_config_is_refused_with_the_keys_that_differ(uncut, capsys):
    before = (uncut / "config.json").read_bytes()
    argv = [TINY, *RUN, f"--workdir={uncut}", "--config.learning_rate=0.5", "--config.seed=3"]
    status, _, err = run(capsys, *argv)
    assert status == 4
    assert "2 keys differ: learning_rate (0.004 there, 0.5 now), seed (0 there, 3 now)" in err
    assert (uncut / "config.json").read_bytes() == before
    assert run(capsys, TINY, *RUN, f"--workdir={uncut}", "--config.data.threads=1")[0] == 0


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("dear")
    status, _, err = run(capsys, TINY, f"--workdir={tmp_path}")
    assert status == 2
    assert "no run folder" in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_workdir_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, TINY, f"--workdir={tmp_path / 'file' / 'run'}")
    assert status == 2
    assert "cannot be written" in err


def test_evaluating_what_was_never_trained_is_an_error(tmp_path, capsys):
    status, _, err = run(capsys, TINY, f"--workdir={tmp_path / 'none'}", "--mode=eval")
    assert status == 4
    assert "nothing to evaluate" in err


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    tmp_path, capsys
):
    argv = [TINY, *RUN, f"--workdir={tmp_path / 'run'}", "--config.learning_rate=1e38"]
    argv += ["--config.schedule.warmup_epochs=0.0", "--config.checkpoint_every=1"]
    status, _, err = run(capsys, *argv, "--config.max_skipped=2")
    assert status == 5
    assert "step 3: loss" in err
    assert "the last checkpoint is of step" in err.lower()
    assert last_state(tmp_path / "run")[0] >= 1


WRONG = {
    "--config.batch_size=7": (2, "batch_size=7 does not divide over 2 devices"),
    "--config.image_size=18": (2, "patch"),
    "--config.model.num_classes=7": (3, "digits has 10 classes and the head only 7"),
    "--config.data.name=digit": (2, "'digits'"),
    "--config.model.backbone.target=models.vit.vit_s61": (2, "'vit_s16'"),
    "--config.optimizer.name=adam": (2, "'adamw'"),
    "--config.optimizer.freeze=bakbone": (2, "bakbone"),
    "--config.schedule.name=cosin": (2, "'cosine'"),
    "--config.data.name=folder": (3, "data_dir"),
    "--config.train.transforms[0].target=data.transforms.RandomCrap": (2, "'RandomCrop'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_one_sentence_and_writes_nothing(wrong, tmp_path, capsys):
    status, _, err = run(capsys, TINY, f"--workdir={tmp_path / 'run'}", wrong)
    assert (status, WRONG[wrong][1] in err) == (WRONG[wrong][0], True), err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_dry_run_draws_one_batch_and_trains_nothing(tmp_path, capsys):
    status, out, err = run(capsys, TINY, f"--workdir={tmp_path / 'run'}", "--dry_run")
    assert status == 0, err
    for words in ("parameters", "FLOPs per image", "memory:", "ms a step", "head/kernel"):
        assert words in out
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["batch.png"]
    assert main.main([TINY, f"--workdir={tmp_path / 'run'}"]) == 0  # and it is in nobody's way


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of plain pictures, one of them broken."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for i in range(10):
            image = random.normal(level, 20, (30 + i, 40, 3)).clip(0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / name / f"{i}.png"), image)
    (folder / "dark" / "3.png").write_bytes(b"no picture at all")
    (folder / "light" / "notes.txt").write_text("bright ones")
    return folder


FOLDER = ["--config=configs/vit.py:folder", "--config.steps=4", "--config.batch_size=8"]
FOLDER += ["--config.image_size=16", "--config.model.backbone.width=16", "--config.log_every=2"]
FOLDER += ["--config.model.backbone.depth=1", "--config.eval_every=4"]
FOLDER += ["--config.data.max_broken=0.1"]  # one of 16 is broken


def test_own_pictures_train_and_a_broken_one_is_named_and_counted(pictures, tmp_path, capsys):
    argv = [*FOLDER, f"--config.data.data_dir={pictures}", f"--workdir={tmp_path / 'run'}"]
    status, out, err = run(capsys, *argv)
    assert status == 0, err
    assert "2 classes" in out
    assert "3.png: no picture" in out
    assert "1 files are no pictures by their suffix and are left out: light/notes.txt" in out
    assert (tmp_path / "run" / "predictions.png").exists()


def test_a_broken_picture_stops_the_run_where_the_config_says_so(pictures, tmp_path, capsys):
    argv = [*FOLDER, f"--config.data.data_dir={pictures}", f"--workdir={tmp_path / 'run'}"]
    status, _, err = run(capsys, *argv, "--config.data.on_broken=stop")
    assert status == 3
    assert "3.png" in err
