"""What a run survives, and how it ends where it cannot: faults put into whole runs."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import checkpoint, faults, main, mesh, step
from vit_jax.errors import CheckpointError, OutOfMemoryError
from vit_jax.lock import only_run
from vit_jax.report import read_metrics
from vit_jax.tasks.classification import Classification

ROOT = Path(__file__).parent.parent
TINY = ["--config=configs/vit.py:tiny", "--config.steps=6", "--config.eval_every=6"]
TINY += ["--config.checkpoint_every=2", "--config.checkpoint.keep_last=9", "--config.log_every=2"]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs the smallest config with faults in `tmp_path / "run"`; status and both streams."""

    def run(planned, *argv, base=TINY):
        monkeypatch.setenv(faults.VARIABLE, planned)
        capsys.readouterr()
        status = main.main([*base, f"--workdir={tmp_path / 'run'}", *argv])
        return status, *capsys.readouterr()

    return run


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def arrays_of(workdir, number):
    """Every array of a checkpoint, optimizer and all."""
    import orbax.checkpoint as ocp

    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(number) / "state")
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_one_bad_batch_is_skipped_counted_and_poisons_no_number(run, tmp_path):
    status, out, err = run("nan@2,nan@5,nan@6")
    assert (status, err) == (0, "")
    line = next(x for x in out.splitlines() if x.startswith("warning: step 2"))
    assert "loss nan, gradient norm nan, not finite: that update was not made, 1 in a row" in line
    assert line.count("digits ") == 8  # the examples of the batch
    rows = [r for r in read_metrics(tmp_path / "run") if r["split"] == "train"]
    assert [r.get("skipped_updates") for r in rows] == [1.0, None, 2.0]
    for row in rows[:2]:
        assert np.isfinite([row["loss"], row["accuracy"], row["grad_norm"]]).all()
    assert rows[2].keys() == {"step", "epoch", "split", "learning_rate", "skipped_updates"}
    for number in saved_steps(tmp_path / "run"):
        assert all(np.isfinite(x).all() for x in arrays_of(tmp_path / "run", number))


def test_bad_batches_for_ever_stop_the_run_with_all_that_is_known_of_them(run, tmp_path):
    argv = ["--config.steps=20", "--config.max_skipped=3", "--config.checkpoint_every=1"]
    status, out, err = run("nan@2,nan@5+", *argv)  # the count begins anew after a good one
    assert status == 5
    assert "step 2: loss nan" in out
    for words in ("step 7: loss nan", "gradient norm nan", "none of the last 3", "digits "):
        assert words in err
    assert err.count("\n") == 1
    steps = saved_steps(tmp_path / "run")
    assert {1, 2, 5} <= set(steps)
    for number in steps:
        assert all(np.isfinite(x).all() for x in arrays_of(tmp_path / "run", number))


class Small(nn.Module):
    """Something with batch statistics and dropout."""

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dense(7)(image.reshape(len(image), -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(x))


def small_step(number):
    """A step's arguments: state and batch, and what stays the same."""
    random = np.random.default_rng(number)
    image = random.normal(size=(8, 3, 5, 3)).astype(np.float32)
    batch = {"image": image, "valid": np.ones(8, bool)}
    batch["label"] = random.integers(0, 3, 8).astype(np.int32)
    parts = {"model": Small(), "task": Classification(), "optimizer": optax.adamw(0.1)}
    return batch, parts


def unguarded(state, batch, *, model, task, optimizer, key):
    """The update of `step.train_step`, in which nothing looks at what is finite."""

    def loss_of(params):
        variables = {"params": params, **state.model_state}
        rngs = {"dropout": jax.random.fold_in(key, state.step)}
        outputs, new = model.apply(
            variables, batch["image"], train=True, rngs=rngs, mutable=list(state.model_state)
        )
        return task.score(outputs, batch)[0], new

    (_, model_state), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return step.TrainState(state.step + 1, params, dict(model_state), opt_state, {})


def test_good_batches_are_bit_identical_with_and_without_the_guard():
    batch, parts = small_step(0)
    variables = step.init_variables(jax.random.key(0), batch, model=parts["model"])
    state = step.init_state(variables, optimizer=parts["optimizer"])
    guarded = jax.jit(partial(step.train_step, **parts))
    plain, with_guard = jax.jit(partial(unguarded, **parts)), state
    for number in range(5):
        batch = small_step(number)[0]
        with_guard, sums = guarded(with_guard, batch, key=jax.random.key(1))
        state = plain(state, batch, key=jax.random.key(1))
        assert sums["finite"] == 1
    jax.tree.map(np.testing.assert_array_equal, with_guard, state)


def test_a_bad_batch_leaves_everything_but_the_number_of_the_step():
    batch, parts = small_step(0)
    variables = step.init_variables(jax.random.key(0), batch, model=parts["model"])
    state = step.init_state(variables, optimizer=parts["optimizer"], ema=True)
    bad = batch | {"image": np.full_like(batch["image"], np.inf)}
    new, sums = step.train_step(state, bad, key=jax.random.key(1), ema_decay=0.9, **parts)
    assert sums["finite"] == 0
    assert new.step == 1
    jax.tree.map(np.testing.assert_array_equal, new.replace(step=state.step), state)


@pytest.mark.long
def test_a_state_that_overflowed_is_never_saved(run, tmp_path):
    # The first update is finite and so is its gradient, but 1e38 times as long.
    argv = ["--config.learning_rate=1e38", "--config.schedule.warmup_epochs=0.0"]
    status, _, err = run("", *argv, "--config.checkpoint_every=1", "--config.max_skipped=2")
    assert status == 5, err
    for number in saved_steps(tmp_path / "run"):
        assert all(np.isfinite(x).all() for x in arrays_of(tmp_path / "run", number))


@pytest.mark.parametrize("place", ["params", "model_state", "opt_state", "ema"])
def test_one_number_anywhere_in_a_state_is_seen(place):
    state = {p: {"a": jnp.ones((3, 5)), "n": jnp.int32(7)} for p in ("params", "opt_state")}
    state |= {"model_state": {"m": jnp.ones(4, jnp.bfloat16)}, "ema": {"b": jnp.zeros(2)}}
    assert step.all_finite(state)
    name = sorted(state[place])[0]
    state[place][name] = state[place][name].at[-1].set(jnp.inf)
    assert not step.all_finite(state)


# --- broken pictures


def damage(path, kind):
    """Leaves a picture file that cannot be read."""
    content = path.read_bytes()
    if kind == "bomb":  # 60,000 x 60,000 pixels, says its header
        content = content[:16] + (60_000).to_bytes(4) * 2 + content[24:]
    changed = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no picture"}
    path.write_bytes(changed.get(kind, content))


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Two classes of 200 pictures, 4 of all 400 damaged: 1 %."""
    folder, random = tmp_path_factory.mktemp("album"), np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        for part, count in (("train", 160), ("val", 40)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = random.normal(level, 20, (12, 16, 3)).clip(0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / part / name / f"{i:03}.png"), image)
    for i, kind in enumerate(("truncated", "empty", "text", "bomb")):
        damage(folder / "train" / "dark" / f"{40 * i:03}.png", kind)
    return folder


ALBUM = ["--config=configs/vit.py:folder", "--config.batch_size=32", "--config.epochs=1"]
ALBUM += ["--config.image_size=16", "--config.model.backbone.width=16", "--config.log_every=1"]
ALBUM += ["--config.model.backbone.depth=1", "--config.eval_every=10", "--config.data.threads=2"]


def seal_of(workdir):
    newest = saved_steps(workdir)[-1]
    return newest, json.loads((workdir / "checkpoints" / str(newest) / "seal/metadata").read_text())


@pytest.mark.slow
def test_broken_pictures_are_counted_exactly_also_after_a_stop(album, run, tmp_path):
    base = [*ALBUM, f"--config.data.data_dir={album}"]
    whole, cut = f"--workdir={tmp_path / 'whole'}", f"--workdir={tmp_path / 'run'}"
    status, out, _ = run("", whole, base=base)
    assert status == 0
    assert out.count("skipped a broken picture") == 4
    rows = read_metrics(tmp_path / "whole")
    counts = [r.get("broken_pictures", 0.0) for r in rows if r["split"] == "train"]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0.0, 4.0)
    listed = (tmp_path / "whole" / "broken.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in listed]
    assert {Path(json.loads(x)["text"].split(":")[0]).name for x in listed} == {
        f"{i:03}.png" for i in (0, 40, 80, 120)
    }
    assert run("term@7", cut, base=base)[0] == 143
    assert run("", cut, base=base)[0] == 0
    assert read_metrics(tmp_path / "run") == rows
    assert (tmp_path / "run" / "broken.jsonl").read_text().splitlines() == listed
    assert seal_of(tmp_path / "run") == seal_of(tmp_path / "whole")


def test_too_many_broken_pictures_stop_the_run_with_the_last_and_the_count(album, run, tmp_path):
    base = [*ALBUM, f"--config.data.data_dir={album}"]
    status, _, err = run("", "--config.data.max_broken=0.0063", base=base)  # 2.02 of 320
    assert status == 3
    assert "3 of the 320 training pictures" in err
    assert "more than data.max_broken=0.0063 of all; the last: " in err
    assert ".png: " in err
    assert err.count("\n") == 1
    assert len((tmp_path / "run" / "broken.jsonl").read_text().splitlines()) == 3


# --- full disks, hangs, second runs: processes of their own


def process(workdir, planned, *argv, timeout=120):
    """A run as a person starts it."""
    command = [sys.executable, "-m", "vit_jax.main", *TINY, f"--workdir={workdir}", *argv]
    environment = os.environ | {faults.VARIABLE: planned}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


FULL = """
import sys, jax, jax.numpy as jnp
from pathlib import Path
from vit_jax import checkpoint, faults
state = {"a": jax.random.normal(jax.random.key(0), (100, 99))}
said = []
keep = checkpoint.Checkpoints(sys.argv[1], keep_last=9, warn=said.append, faults=faults.read())
print([keep.save(number, state) for number in (1, 2, 3)])
print(keep.close(), keep.failure)
print(len(said), *said, sep="\\n")
print(sorted(p.name for p in Path(sys.argv[1], "checkpoints").iterdir()))
found = checkpoint.Checkpoints(sys.argv[1])
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
print([found.restore(target, step=number)[1] for number in found.steps()])
"""


@pytest.mark.parametrize(("planned", "kept"), [("enospc@save2", [1, 3]), ("enospc@save3", [1, 2])])
def test_a_full_disk_costs_one_checkpoint_and_a_loud_line(planned, kept, tmp_path):
    environment = os.environ | {faults.VARIABLE: planned}
    argv = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    missing = ({1, 2, 3} - set(kept)).pop()
    assert lines[0] == "[True, True, True]", done.stderr  # each save was begun
    last_one_failed = missing == 3
    assert lines[1].startswith(f"{not last_one_failed}")
    assert lines[2] == "1"
    assert lines[3].startswith(f"checkpoint {missing} could not be written: ")
    assert "the run goes on, older checkpoints are intact" in lines[3]
    assert lines[4] == str([str(number) for number in kept])  # no leftovers
    assert lines[5] == str(kept)


@pytest.mark.long
def test_a_disk_that_is_full_at_the_end_is_no_success_and_the_next_run_makes_up_for_it(tmp_path):
    done = process(tmp_path / "run", "enospc@save3")
    assert done.returncode == 4
    assert "warning: checkpoint 6 could not be written" in done.stdout
    assert done.stderr.startswith("error: the run ended, but checkpoint 6 could not be written")
    assert done.stderr.count("\n") == 1
    assert saved_steps(tmp_path / "run") == [2, 4]
    done = process(tmp_path / "run", "")
    assert done.returncode == 0, done.stderr
    assert "going on from step 4" in done.stdout
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["2", "4", "6"]


@pytest.mark.long
@pytest.mark.parametrize("planned", ["hang@3", "hang@eval1"])
def test_a_run_that_hangs_is_ended_with_every_stack(planned, tmp_path):
    done = process(tmp_path / "run", planned, "--config.hang_seconds=6")
    assert done.returncode == 1
    assert "Timeout (0:00:06)!" in done.stderr
    assert "faults.py" in done.stderr
    assert done.stderr.count("Thread 0x") >= 2


# --- two runs, other models, too little memory


@pytest.mark.long
def test_a_second_run_is_refused_and_looking_at_the_first_is_not(run, tmp_path):
    workdir = tmp_path / "run"
    assert run("")[0] == 0
    unfinished = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    with only_run(workdir):
        unfinished.mkdir()  # what the first one is writing
        before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
        status, _, err = run("")
        assert status == 4
        assert f"{workdir} is in use by another run (process {os.getpid()} on" in err
        assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before
        status, out, err = run("", "--mode=eval")
        assert (status, err) == (0, "")
        assert "step 6 (best) validation" in out
        assert checkpoint.read(workdir).step == 6
        assert unfinished.exists()
    assert run("")[0] == 0


def state_of(width=4, depth=2, classes=3, dtype=jnp.float32, ema=False, kind="vit"):
    """Something like the state of a model of those sizes."""
    block = {"kernel": jnp.ones((width, width), dtype), "bias": jnp.ones(width)}
    params = {f"{kind}_block_{i}": block for i in range(depth)}
    params |= {"head": {"kernel": jnp.ones((width, classes))}}
    return step.init_state({"params": params}, optimizer=optax.adam(1e-3), ema=ema)


def shapes_of(state):
    leaf = partial(jax.ShapeDtypeStruct, sharding=mesh.replicated(mesh.make_mesh()))
    return jax.tree.map(lambda x: leaf(x.shape, x.dtype), state)


OTHER = {
    "family": ({"kind": "swin"}, "params/swin_block_0/bias: absent there, ('float32', (4,)) want"),
    "width": ({"width": 6}, "params/head/kernel: ('float32', (4, 3)) there, ('float32', (6, 3))"),
    "depth": ({"depth": 3}, "params/vit_block_2/bias: absent there, ('float32', (4,)) wanted"),
    "classes": ({"classes": 5}, "params/head/kernel: ('float32', (4, 3)) there, ('float32', (4, 5"),
    "dtype": ({"dtype": jnp.bfloat16}, "params/vit_block_0/kernel: ('float32', (4, 4)) there, ('b"),
    "EMA": ({"ema": True}, "ema/params/head/kernel: absent there, ('float32', (4, 3)) wanted"),
}


@pytest.mark.parametrize("other", OTHER)
def test_a_checkpoint_of_another_model_is_refused_by_name_and_shapes(other, tmp_path):
    changes, said = OTHER[other]
    keep = checkpoint.Checkpoints(tmp_path)
    keep.save(1, state_of())
    keep.save(2, state_of())
    keep.wait()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(CheckpointError) as caught:
        keep.restore(shapes_of(state_of(**changes)))
    assert "checkpoint 2" in str(caught.value)
    assert said in str(caught.value)
    keep.close()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.long
def test_a_run_folder_with_another_models_checkpoints_ends_the_command(run, tmp_path):
    assert run("", "--config.steps=2")[0] == 0
    (tmp_path / "run").rename(tmp_path / "other")
    assert run("", "--config.steps=2", "--config.model.backbone.width=8")[0] == 0
    theirs, own = tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints"
    own.rename(tmp_path / "aside")
    theirs.rename(own)
    before = sorted(own.rglob("*"))
    status, _, err = run("", "--config.steps=2", "--config.model.backbone.width=8")
    assert status == 4
    assert "there, ('float32'" in err
    assert sorted(own.rglob("*")) == before


@pytest.mark.long
def test_out_of_memory_names_the_bytes_and_a_batch_that_runs(run, tmp_path):
    status, _, err = run("oom@2")
    assert status == 6
    assert "batch_size=8 does not fit" in err
    assert "123,456,789,012 bytes (115 GiB) were wanted; try batch_size=4, or" in err
    argv = ["--config.batch_size=4", "--config.steps=2", f"--workdir={tmp_path / 'smaller'}"]
    assert run("", *argv)[0] == 0


TEXTS = {
    "RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes.": (
        "1,073,741,824 bytes (1 GiB) were wanted; try batch_size=24,"
    ),
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17.59GiB.": (
        "17.59GiB were wanted; try batch_size=24,"
    ),
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.0G of 16.0G hbm.": (
        "20.0GB in all were wanted; try batch_size=36,"
    ),
    "RESOURCE_EXHAUSTED: of something": "RESOURCE_EXHAUSTED: of something; try batch_size=24",
}


@pytest.mark.parametrize("text", TEXTS)
def test_each_backends_words_for_too_little_memory_are_understood(text):
    with pytest.raises(OutOfMemoryError) as caught, mesh.memory_errors(52, unit=12):
        raise jax.errors.JaxRuntimeError(text)
    assert TEXTS[text] in str(caught.value)


def test_where_no_smaller_batch_is_possible_none_is_named():
    with pytest.raises(OutOfMemoryError) as caught, mesh.memory_errors(8, unit=8):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    assert "try a smaller image_size or model" in str(caught.value)


def test_a_full_disk_and_other_errors_are_not_taken_for_too_little_memory():
    for error in (
        ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"),
        jax.errors.JaxRuntimeError("INTERNAL: something else"),
    ):
        with pytest.raises(type(error)) as caught, mesh.memory_errors(8):
            raise error
        assert caught.value is error
