import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax import programs

COMPILES = """
from vit_jax import programs
print(programs.keep())
import jax, jax.numpy as jnp
def doubled(x):
    return jnp.tanh(x) @ x * 2
print(float(jax.jit(doubled)(jnp.ones((3, 3)))[0, 0]))
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process in which JAX has not started and nothing is set."""
    monkeypatch.delitem(sys.modules, "jax")
    for name in (programs.FOLDER, programs.SWITCH, programs.LEAST):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(programs, "_mend", lambda folder: None)
    yield monkeypatch
    for name in (programs.FOLDER, programs.LEAST):
        os.environ.pop(name, None)


def test_programs_are_kept_in_the_users_cache_by_kind_of_processor(fresh, tmp_path):
    folder = programs.keep()
    assert folder.parent == tmp_path / "vit_jax" / "programs"
    assert folder.is_dir()
    assert os.environ[programs.FOLDER] == str(folder)


def test_a_folder_that_the_user_names_is_taken_as_it_is(fresh, tmp_path):
    fresh.setenv(programs.FOLDER, str(tmp_path / "mine"))
    old = tmp_path / "mine" / "jit_f-1-cache"
    old.parent.mkdir()
    old.touch()
    os.utime(old, (0, 0))
    assert programs.keep() == tmp_path / "mine"
    assert old.exists()
    fresh.setenv(programs.FOLDER, "gs://bucket/programs")
    assert programs.keep() is None
    assert os.environ[programs.FOLDER] == "gs://bucket/programs"


def test_nothing_is_kept_where_it_is_switched_off_cannot_be_or_comes_too_late(fresh, tmp_path):
    fresh.setenv(programs.SWITCH, "false")
    assert programs.keep() is None
    fresh.delenv(programs.SWITCH)
    (tmp_path / "file").touch()
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert programs.keep() is None
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh.setitem(sys.modules, "jax", object())
    assert programs.keep() is None
    assert programs.FOLDER not in os.environ


def test_programs_of_long_ago_are_forgotten(fresh):
    folder = programs.keep()
    del os.environ[programs.FOLDER]
    old, new, other = (folder / n for n in ("jit_a-1-cache", "jit_b-2-cache", "notes.txt"))
    for file in (old, new, other):
        file.touch()
    long_ago = time.time() - (programs.DAYS + 1) * 24 * 3600
    for file in (old, other):
        os.utime(file, (long_ago, long_ago))
    programs.keep()
    assert [f.exists() for f in (old, new, other)] == [False, True, True]


def test_a_program_that_a_killed_process_left_unfinished_is_compiled_anew_and_kept(tmp_path):
    def run():
        return subprocess.run(
            [sys.executable, "-c", COMPILES],
            env=os.environ
            | {"XDG_CACHE_HOME": str(tmp_path), programs.LEAST: "0", programs.SWITCH: "true"},
            capture_output=True,
            text=True,
            check=True,
        )

    first = run()
    (file,) = Path(first.stdout.split()[0]).glob("jit_doubled-*-cache")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    second = run()
    assert second.stdout == first.stdout
    assert second.stderr == ""
    assert file.stat().st_size > len(whole) // 2
    kept = file.stat().st_mtime_ns
    assert run().stderr == ""
    assert file.stat().st_mtime_ns == kept


@pytest.fixture
def asked():
    """`programs.options` as if nobody had called it, before and after."""
    programs.options.cache_clear()
    yield
    programs.options.cache_clear()


def test_this_compiler_knows_every_option_for_a_cpu_and_other_devices_have_none(asked):
    assert programs.options("cpu") == programs.CPU
    assert programs.options("gpu") == programs.options("tpu") == {}
    assert programs.once("gpu") == programs.once("tpu") == {}


def test_an_option_of_another_version_is_left_out(asked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(programs.CPU, "xla_cpu_of_another_version", True)
        assert "xla_cpu_of_another_version" not in programs.options("cpu")
    assert programs.options("cpu") == programs.CPU
