"""The faults of VIT_JAX_FAULT: what is understood, when they strike, and that none cost nothing."""

import os
import signal

import numpy as np
import pytest

from vit_jax import faults, main
from vit_jax.errors import ConfigError

BATCH = {"image": np.ones((2, 3, 4, 3), np.float32), "label": np.zeros(2, np.int32)}


def read(text):
    return faults.read({faults.VARIABLE: text})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nn@3", "no fault 'nn'. Did you mean 'nan'"),
        ("nan", "'nan' is no fault; write such as nan@12"),
        ("nan@save2", "'nan@save2': nan is at N"),
        ("enospc@3", "enospc is at saveN"),
        ("kill@evl1", "kill is at N or saveN or evalN"),
        ("nan@0", "numbers start at 1"),
        ("nan@3;kill@4", "'nan@3;kill@4' is no fault"),
    ],
)
def test_a_misspelt_fault_is_an_error_with_what_there_is(text, said):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert said in str(caught.value)


def test_a_misspelt_fault_ends_the_command_before_it_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "hag@3")
    assert main.main(["--config=configs/vit.py:tiny", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "Did you mean 'hang'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_faults_there_is_nothing_to_call():
    assert not faults.read({})
    assert not read("")
    assert not read(" , ")
    assert read("nan@3")


def test_a_spoilt_batch_comes_once_or_for_ever_and_the_data_stays_whole():
    once, ever = read("nan@2"), read(" nan@2+ ,")
    for number in range(1, 5):
        assert np.isnan(once.step(number, BATCH)["image"]).all() == (number == 2)
        assert np.isnan(ever.step(number, BATCH)["image"]).all() == (number >= 2)
        assert once.step(number, BATCH)["label"] is BATCH["label"]
    assert np.isfinite(BATCH["image"]).all()


def test_saves_and_evaluations_are_counted_apart(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda _, number: sent.append(number))
    planned = read("kill@save2,term@eval1,kill@7")
    planned.before_save()
    planned.after_save()
    assert sent == []
    planned.evaluation()
    assert sent == [signal.SIGTERM]
    planned.before_save()
    assert sent == [signal.SIGTERM]
    planned.after_save()
    planned.evaluation()
    assert sent == [signal.SIGTERM, signal.SIGKILL]
    assert planned.step(6, BATCH) is BATCH
    planned.step(7, BATCH)
    assert sent == [signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]


def test_memory_runs_out_as_it_does_on_a_device():
    import jax

    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        read("oom@3").step(3, BATCH)
