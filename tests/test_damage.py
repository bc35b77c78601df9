"""Damaged checkpoints: found, set aside, never deleted; the newest good one is used."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import flax.struct
import jax
import jax.numpy as jnp
import pytest

from vit_jax import checkpoint, main, mesh
from vit_jax.checkpoint import Checkpoints
from vit_jax.errors import CheckpointError
from vit_jax.report import read_metrics

ROOT = Path(__file__).parent.parent
NEWEST = 2


@flax.struct.dataclass
class State:
    """As a run saves it: an awkward shape, an integer, an empty part, tuples."""

    step: jax.Array
    params: dict
    model_state: dict
    opt_state: tuple
    ema: dict


def state_of(value):
    # Larger than what Orbax keeps within an index with a checksum of its own, and incompressible.
    kernel = jax.random.normal(jax.random.key(7), (37, 17)) * value
    params = {"head": {"kernel": kernel, "bias": jnp.ones(5)}}
    momenta = jax.tree.map(lambda x: x / 3, params)
    return State(jnp.int32(value), params, {}, ({"mu": momenta}, ()), {"params": params})


@pytest.fixture(scope="module")
def target():
    sharding = mesh.replicated(mesh.make_mesh())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state_of(0)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with two good checkpoints."""
    workdir = tmp_path_factory.mktemp("whole")
    checkpoints = Checkpoints(workdir)
    for step in (1, NEWEST):
        assert checkpoints.save(step, state_of(step), rank=step / 10)
    assert checkpoints.close()
    return workdir


def files_of(workdir, step=NEWEST):
    """The files of a checkpoint, by paths that do not change from run to run."""
    folder = workdir / "checkpoints" / str(step)
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def kind_of(file):
    """A file's path without the random names of array data."""
    return Path(*("data" if len(part) == 32 else part for part in file.parts)).as_posix()


def resume(workdir, target, *, save=True):
    """The step a run goes on from; fails unless all that was promised holds."""
    warnings = []
    checkpoints = Checkpoints(workdir, warn=warnings.append)
    state, step = checkpoints.restore(target)
    chex.assert_trees_all_equal(state, state_of(step))  # nothing wrong is ever returned
    aside = [p for p in checkpoints.folder.iterdir() if p.name.startswith("damaged-")]
    assert (step == 1) == (len(aside) == 1) == (len(warnings) == 1), (step, aside, warnings)
    if step == 1:
        assert f"checkpoint {NEWEST} is damaged" in warnings[0]
    if save:
        assert checkpoints.save(NEWEST, state_of(NEWEST))
        assert checkpoints.save(NEWEST + 1, state_of(NEWEST + 1))
        assert checkpoints.wait()
        assert {NEWEST, NEWEST + 1} <= set(checkpoints.steps())
        chex.assert_trees_all_equal(checkpoints.restore(target, step=NEWEST)[0], state_of(NEWEST))
        assert all(p.exists() for p in aside)
    checkpoints.close()
    return step


def removed(path):
    path.unlink()


def halved(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def emptied(path):
    path.write_bytes(b"")


KINDS = [
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "seal/commit_success.txt",
    "seal/metadata",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "state/commit_success.txt",
    "state/d/data",
    "state/manifest.ocdbt",
    "state/ocdbt.process_0/d/data",
    "state/ocdbt.process_0/manifest.ocdbt",
]


def test_no_kind_of_file_is_forgotten(whole):
    assert sorted({kind_of(file) for file in files_of(whole)}) == KINDS


@pytest.mark.parametrize("damage", [removed, halved, emptied])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_costs_at_most_that_checkpoint(kind, damage, whole, target, tmp_path):
    for file in (f for f in files_of(whole) if kind_of(f) == kind):
        workdir = tmp_path / file.name
        shutil.copytree(whole, workdir)
        damage(workdir / "checkpoints" / str(NEWEST) / file)
        resume(workdir, target)


@pytest.mark.parametrize("item", ["state", "seal", "state/d", "state/ocdbt.process_0"])
def test_a_missing_folder_costs_at_most_that_checkpoint(item, whole, target, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(NEWEST) / item)
    resume(workdir, target)


def test_an_empty_folder_named_as_a_step_is_set_aside(whole, target, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "checkpoints" / "3").mkdir()  # Orbax counts it, as the newest
    checkpoints = Checkpoints(workdir, warn=lambda _: None)
    assert checkpoints.restore(target)[1] == NEWEST
    assert checkpoints.save(3, state_of(3))
    assert checkpoints.wait()
    assert checkpoints.steps() == [NEWEST, 3]
    checkpoints.close()


def flipped(path, chance):
    """Turns one bit over."""
    data = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)


def flip(number, whole, target, folder, *, save):
    """One random bit of the newest checkpoint, turned over; whether that cost the checkpoint."""
    chance = random.Random(number)
    workdir = folder / "run"
    shutil.copytree(whole, workdir)
    sizes = {f: (whole / "checkpoints" / "2" / f).stat().st_size for f in files_of(whole)}
    files = [f for f, size in sizes.items() if size]
    weights = [sizes[f] if number % 2 else 1 for f in files]  # any byte, or any file
    file = chance.choices(files, weights)[0]
    flipped(workdir / "checkpoints" / str(NEWEST) / file, chance)
    step = resume(workdir, target, save=save)
    shutil.rmtree(workdir)
    return step == 1


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in (1, 2, 3))])
def test_no_flipped_bit_goes_unnoticed(part, whole, target, tmp_path):
    numbers = range(50 * part, 50 * part + (10 if part == 0 else 50))
    found = [flip(n, whole, target, tmp_path, save=n % 5 == 0) for n in numbers]
    assert any(found)


@pytest.mark.long
def test_nor_those_that_the_fast_test_left_out(whole, target, tmp_path):
    assert any(flip(n, whole, target, tmp_path, save=n % 5 == 0) for n in range(10, 50))


def test_a_flipped_bit_in_an_arrays_name_is_damage_and_no_other_model(whole, target, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    file = workdir / "checkpoints" / str(NEWEST) / "state" / "_METADATA"
    file.write_text(file.read_text().replace("kernel", "kernem"))
    assert resume(workdir, target) == 1


def test_all_damaged_is_an_error_each_time_and_never_a_new_start(whole, target, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in (1, NEWEST):
        halved(workdir / "checkpoints" / str(step) / "state" / "_METADATA")
    for words in ("none of the checkpoints [1, 2]", "damaged checkpoints only: damaged-1-"):
        checkpoints = Checkpoints(workdir, warn=lambda _: None)
        with pytest.raises(CheckpointError) as raised:
            checkpoints.restore(target)
        assert words in str(raised.value)
        checkpoints.close()
    assert len([p for p in (workdir / "checkpoints").iterdir() if "damaged-" in p.name]) == 2


def test_a_readers_best_survives_a_damaged_seal(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    emptied(workdir / "checkpoints" / str(NEWEST) / "seal" / "metadata")
    assert checkpoint.read(workdir).step == 1


RUN = ["--config=configs/vit.py:tiny", "--config.steps=4", "--config.checkpoint_every=2"]
RUN += ["--config.eval_every=4", "--config.log_every=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert main.main([*RUN, f"--workdir={workdir}"]) == 0
    return workdir


def seal_of(workdir):
    return json.loads((workdir / "checkpoints" / "4" / "seal" / "metadata").read_text())


def test_a_run_whose_last_checkpoint_is_damaged_ends_as_if_it_were_not(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    halved(workdir / "checkpoints" / "4" / "state" / "_METADATA")
    assert main.main([*RUN, f"--workdir={workdir}"]) == 0
    assert "checkpoint 4 is damaged" in capsys.readouterr().out
    assert seal_of(workdir) == seal_of(trained)
    assert read_metrics(workdir) == read_metrics(trained)


@pytest.mark.long
def test_a_run_whose_checkpoints_are_all_damaged_ends_with_4_each_time(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for step in ("2", "4"):
        emptied(workdir / "checkpoints" / step / "seal" / "metadata")
    for words in ("none of the checkpoints [2, 4]", "damaged checkpoints only"):
        argv = [sys.executable, "-m", "vit_jax.main", *RUN, f"--workdir={workdir}"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
        assert words in done.stderr
    assert read_metrics(workdir) == read_metrics(trained)  # nothing was begun anew
