import json
import math
import os
import pty
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from vit_jax import report
from vit_jax.report import Report, read_metrics, sentence

NUMBERS = {"loss": 0.3125, "accuracy": 0.975, "grad_norm": 0.87, "learning_rate": 1e-3}


class Clock:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(report.time, "monotonic", lambda: self.now)

    def spend(self, seconds, context=None):
        if context is None:
            self.now += seconds
        else:
            with context:
                self.now += seconds


def open_report(workdir, total=100, start=0, **options):
    return Report(workdir, total, 20.0, 8, start, **options)


def events(workdir):
    """What TensorBoard reads: every event of every file, in the order of the files' names."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_a_row_is_one_json_object_a_line_with_step_epoch_split_and_numbers(tmp_path):
    with open_report(tmp_path) as r:
        r.write(10, "train", {"loss": np.float32(0.5), "accuracy": np.float64(0.25)})
        r.write(10, "validation", {"loss": 1})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    wanted = {"step": 10, "epoch": 0.5, "split": "train", "loss": 0.5, "accuracy": 0.25}
    assert json.loads(first) == wanted
    assert second == '{"step": 10, "epoch": 0.5, "split": "validation", "loss": 1.0}'
    assert read_metrics(tmp_path)[0] == wanted


def test_numbers_that_are_not_finite_survive_in_valid_json(tmp_path):
    with open_report(tmp_path) as r:
        r.write(1, "train", {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(word):
        raise ValueError(word)

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_rows_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    with open_report(tmp_path) as r:
        for step in (10, 20, 30):
            r.write(step, "train", {"loss": 1.0})
            r.write(step, "validation", {"loss": 2.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "split": "tr')  # the run was killed while it wrote
    with open_report(tmp_path, start=20) as r:
        r.write(30, "train", {"loss": 3.0})
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["split"]) for row in rows] == [
        (10, "train"),
        (10, "validation"),
        (20, "train"),
        (20, "validation"),
        (30, "train"),
    ]
    assert rows[-1]["loss"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_file_without_stale_rows_is_left_as_it_is(tmp_path):
    with open_report(tmp_path) as r:
        r.write(10, "train", {"loss": 1.0})
    before = os.stat(tmp_path / "metrics.jsonl").st_ino
    open_report(tmp_path, start=10)
    assert os.stat(tmp_path / "metrics.jsonl").st_ino == before


def test_metrics_of_a_folder_without_a_run_are_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_the_same_numbers_and_forgets_those_written_twice(tmp_path):
    with open_report(tmp_path) as r:
        r.write(10, "train", {"loss": 0.5})
    with open_report(tmp_path, start=5) as r:
        r.write(10, "validation_ema", {"loss": 0.25, "accuracy": math.nan})
    found = events(tmp_path)
    values = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert values[:2] == [(10, "train/loss", 0.5), (10, "validation_ema/loss", 0.25)]
    assert math.isnan(values[2][2])
    starts = [e for e in found if e.session_log.status == e.session_log.START]
    assert [e.step for e in starts] == [1, 6]  # from there on what came before is void


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with open_report(None) as r:
        r.say("hello")
        r.progress(10, NUMBERS)
        r.write(10, "train", NUMBERS)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.startswith("hello\nstep 10/100")


def test_a_progress_line_tells_where_the_run_is_and_how_fast(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with open_report(tmp_path) as r:
        clock.spend(50, r.paused())  # compilation
        clock.spend(7)
        clock.spend(1, r.waiting())
        clock.spend(3)
        r.progress(10, NUMBERS)
    line = capsys.readouterr().out
    # 10 steps of 8 images in 4 seconds, one of which was waiting; 90 steps at 0.4 seconds are left.
    assert line.startswith(
        "step 10/100 | epoch 0.5 | 10 % | ETA 0:00:36 | 20 images/s | waiting for data 25 % | "
        "loss 0.3125, accuracy 97.50 %, gradient norm 0.87, learning rate 0.001 | memory "
    )
    assert line.endswith("B\n")
    assert (tmp_path / "log.txt").read_text().endswith(line)


def test_the_time_left_includes_evaluations_but_not_the_first_ones_compilation(monkeypatch):
    clock = Clock(monkeypatch)
    timer = report._Clock(0)
    for step, pause in [(10, 30.0), (20, 2.0), (30, 2.0)]:
        clock.spend(0, timer.timed("waiting"))
        clock.spend(10)
        rate, _, left = timer.lap(step, 100)
        assert rate == pytest.approx(1.0)
        clock.spend(pause, timer.timed("paused"))
    # Before the third pause: 70 steps of a second, and 2 seconds of pause every 15 steps.
    assert left == pytest.approx(70 + 70 * 2 * 2 / 30)


def test_the_speed_is_that_of_the_recent_steps(monkeypatch):
    clock = Clock(monkeypatch)
    timer = report._Clock(0)
    for step in range(1, 101):
        clock.spend(5.0 if step <= 50 else 1.0)
        _, _, left = timer.lap(step, 110)
    assert left == pytest.approx(10)


def test_a_log_file_gets_a_progress_line_now_and_then_and_always_the_last(
    tmp_path, monkeypatch, capsys
):
    clock = Clock(monkeypatch)
    with open_report(tmp_path, interval=10) as r:
        for step in range(1, 101):
            clock.spend(0.3)
            r.progress(step, NUMBERS)
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps == [1, 35, 69, 100]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == len(lines)


def test_what_is_said_is_in_the_log_with_the_time_and_a_warning_says_so(tmp_path, capsys):
    with open_report(tmp_path) as r:
        r.say("[bold] is no markup")
        r.warn("caf\udce9.png is broken")  # a file's name may hold any byte
    assert capsys.readouterr().out == "[bold] is no markup\nwarning: caf\\udce9.png is broken\n"
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    time.strptime(first[:19], "%Y-%m-%d %H:%M:%S")
    assert first[20:] == "[bold] is no markup"
    assert second[20:] == "warning: caf\\udce9.png is broken"


def test_a_full_disk_costs_rows_and_no_run(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_report(tmp_path) as r:
        r.write(1, "train", {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))  # half a line fits
        try:
            for step in (2, 3, 4):
                r.write(step, "validation", {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        r.write(5, "validation", {"loss": 5.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 5]
    out = capsys.readouterr().out
    assert out.count("warning: CANNOT write metrics.jsonl") == 1
    assert r.lost >= 3
    assert f"{r.lost} writes failed" in out


def test_a_folder_that_cannot_be_written_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with open_report(tmp_path / "file" / "run") as r:
        for step in (1, 2):
            r.write(step, "train", NUMBERS)
    out = capsys.readouterr().out
    assert out.count("CANNOT open the run folder") == 1
    assert out.count("CANNOT write metrics.jsonl") == 1
    assert "writes failed" in out


def test_an_error_that_is_not_the_disks_is_no_failed_write(tmp_path):
    r = open_report(tmp_path)
    assert r.attempt("add", lambda x: x + 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        r.attempt("divide", lambda: 1 / 0)


PROGRAM = """
import sys
from vit_jax.report import Report
with Report(None, 4, 2.0, 8) as r:
    for step in range(1, 5):
        r.progress(step, {"loss": 0.5})
        r.say("a line")
"""


def test_on_a_terminal_the_progress_line_stays_in_place_and_a_pipe_gets_plain_lines():
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", PROGRAM]
    piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    assert "\x1b" not in piped.stdout
    assert piped.stdout.count("a line\n") == 4
    assert piped.stdout.count("step 4/4") == 1

    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0
    assert b"\x1b[2K" in shown  # a line is erased before it is drawn again
    assert shown.count(b"a line") == 4
    assert shown.rindex(b"step 4/4") > shown.rindex(b"a line")


def test_a_closed_pipe_does_not_end_a_run():
    program = PROGRAM + "sys.stderr.write('done')\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read().startswith("done")
    process.stderr.close()
    process.wait()


def test_a_sentence_names_the_numbers_of_a_row_and_leaves_out_its_place():
    row = {"step": 3, "epoch": 0.1, "split": "train", "accuracy_top5": 1.0, "loss": math.nan}
    assert sentence(row) == "accuracy top5 100.00 %, loss nan"


def test_hours_are_not_cut_into_days():
    assert [report._duration(s) for s in (0.4, 59.6, 3599, 100 * 3600 + 61)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "100:01:01",
    ]
