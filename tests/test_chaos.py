"""Five kills and a few signals of `tests/chaos.py`, whose long form is run by hand."""

import json
import os

import pytest

from tests import chaos
from vit_jax.report import Report


@pytest.mark.slow
def test_nothing_is_lost_by_kills_and_signals_at_random_moments(tmp_path, capsys):
    argv = ["--kills=5", "--terms=2", "--seeds=1", "--configs=vit", f"--out={tmp_path}"]
    status = chaos.main(argv)
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (status, len(results["kills"]), len(results["signals"])) == (0, 5, 2), out
    assert all(run["problems"] == [] for run in results["runs"])
    assert sum(row["in_save"] for row in results["kills"]) >= 2, out
    assert "2 of them exactly as undisturbed ones" in out


def write_events(folder, start, steps):
    """A file as a process of a run leaves it that went on from `start` and was killed."""
    with Report(folder, 100, 10.0, 8, start) as report:
        for step in steps:
            report.write(step, "train", {"loss": step / 10})
        report.flush()
        assert chaos.curves(folder)[-1][0] == steps[-1]  # before the file is closed


def test_curves_are_read_as_tensorboard_shows_them(tmp_path):
    write_events(tmp_path, 0, [1, 2, 3, 4])
    write_events(tmp_path, 2, [3, 4, 5])
    file = max((tmp_path / "tensorboard").iterdir())
    file.write_bytes(file.read_bytes()[:-3])  # killed in the middle of the last record
    write_events(tmp_path, 4, [5, 6])
    assert [step for step, _, _ in chaos.curves(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_lost_a_doubled_and_a_changed_row_are_told_apart():
    want = {"state": {"params": "ab"}, "rows": "1\n2\n3", "curves": [], "checkpoints": [3]}
    want |= {"best": [3], "pictures": []}
    for rows in ("1\n3", "1\n2\n2\n3", "1\n2\n4"):
        assert len(chaos.differences(want, want | {"rows": rows})) == 1
    assert chaos.differences(want, want) == []
    assert "params differs" in chaos.differences(want, want | {"state": {"params": "ac"}})[0]


def test_a_process_that_outlives_its_run_is_found():
    assert chaos.orphans([], patience=0) == []
    assert "stayed behind" in chaos.orphans([os.getpid()], patience=0)[0]
