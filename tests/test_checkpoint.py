import json
import os

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import checkpoint, mesh
from vit_jax.checkpoint import Checkpoints, digest
from vit_jax.errors import CheckpointError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict


def state_of(value, width=5):
    params = {"head": {"kernel": jnp.full((3, width), float(value)), "bias": jnp.arange(width)}}
    return State(jnp.int32(value), params, {})


def target_of(state, devices=None):
    sharding = mesh.replicated(mesh.make_mesh(devices=devices))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def checkpoints(tmp_path, warnings):
    opened = Checkpoints(tmp_path, warn=warnings.append)
    yield opened
    opened.close()


def test_the_newest_two_and_the_best_stay(checkpoints, tmp_path, warnings):
    for step, rank in [(1, 0.5), (2, 0.9), (3, 0.7), (4, None), (5, 0.6)]:
        assert checkpoints.save(step, state_of(step), rank=rank)
    assert checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2
    again = Checkpoints(tmp_path)
    assert again.best() == 2
    restored, step = again.restore(target_of(state_of(0)))
    assert step == restored.step == 5
    assert again.restore(target_of(state_of(0)), step=2)[0].params["head"]["kernel"][0, 0] == 2
    again.close()
    assert not warnings


def test_an_empty_folder_restores_nothing(checkpoints):
    assert checkpoints.restore(target_of(state_of(0))) is None


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    checkpoints, tmp_path, warnings
):
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    checkpoints.close()
    for file in (tmp_path / "checkpoints" / "2" / "state" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    again = Checkpoints(tmp_path, warn=warnings.append)
    state, step = again.restore(target_of(state_of(0)))
    assert step == state.step == 1
    assert "checkpoint 2 is damaged" in warnings[0]
    assert [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith("damaged-2-")]
    assert again.save(2, state_of(2))  # Orbax alone would now refuse to save
    assert again.close()
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_changed_bit_is_found_by_the_digest(checkpoints, warnings):
    checkpoints.save(1, state_of(1))
    checkpoints.save(2, state_of(2))
    checkpoints.wait()
    file = checkpoints.folder / "2" / "seal" / "metadata"
    seal = json.loads(file.read_text())
    assert seal["digest"] == digest(state_of(2))
    seal["digest"][1] ^= 1  # as if the array had changed
    del seal["check"]
    file.write_text(json.dumps(seal | {"check": checkpoint._checksum(seal)}))
    assert checkpoints.restore(target_of(state_of(0)))[1] == 1
    assert "digest" in warnings[0]


def test_all_damaged_is_an_error_not_a_new_start(checkpoints):
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    (checkpoints.folder / "1" / "state" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[1\]"):
        checkpoints.restore(target_of(state_of(0)))


def test_a_checkpoint_may_be_ranked_later(checkpoints, tmp_path):
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), notes={"a": step})
        if step == 1:
            checkpoints.rank(1, 0.9)
    checkpoints.save(4, state_of(4), rank=0.5)
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.best()) == ([1, 3, 4], 1)
    again = Checkpoints(tmp_path)
    assert again.best() == 1
    assert again.restore(target_of(state_of(0)), step=1)[0].step == 1  # its seal is whole
    assert again.notes == {"a": 1}
    again.close()


def test_notes_are_sealed_with_their_state(checkpoints):
    notes = {"row": {"loss": 0.1 + 0.2}, "broken": [3, 5]}
    checkpoints.save(1, state_of(1))
    checkpoints.save(2, state_of(2), notes=notes)
    checkpoints.wait()
    checkpoints.restore(target_of(state_of(0)))
    assert checkpoints.notes == notes
    checkpoints.restore(target_of(state_of(0)), step=1)
    assert checkpoints.notes == {}


def test_too_little_memory_is_no_damage(checkpoints, monkeypatch):
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    monkeypatch.setattr(checkpoint, "digest", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory"):
        checkpoints.restore(target_of(state_of(0)))
    assert checkpoints.steps() == [1]


def test_another_model_is_refused_by_name_and_nothing_is_renamed(checkpoints):
    checkpoints.save(1, state_of(1, width=5))
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"params/head/bias: .*\(5,\).*\(7,\)"):
        checkpoints.restore(target_of(state_of(0, width=7)))
    assert checkpoints.steps() == [1]


def test_a_save_that_fails_is_said_and_the_next_one_works(checkpoints, warnings, monkeypatch):
    manager = checkpoints._manager
    monkeypatch.setattr(
        type(manager), "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    assert not checkpoints.save(1, state_of(1))
    assert "No space left" in checkpoints.failure
    assert "No space left" in warnings[0]
    monkeypatch.undo()
    assert checkpoints.save(2, state_of(2))
    assert checkpoints.wait()
    assert checkpoints.steps() == [2]


def test_the_digest_does_not_depend_on_the_mesh_but_on_every_bit():
    x = {"a": np.arange(24, dtype=np.float32).reshape(8, 3), "b": np.array([True, False])}
    rows = mesh.split_rows(mesh.make_mesh())
    spread = {"a": jax.device_put(x["a"], rows), "b": jax.device_put(x["b"], rows)}
    assert digest(x) == digest(spread)
    swapped = {"a": x["a"][::-1], "b": x["b"]}
    flipped = {"a": x["a"].copy(), "b": x["b"]}
    flipped["a"].view(np.uint32)[3, 1] ^= 1
    assert len({tuple(digest(t)) for t in (x, swapped, flipped)}) == 3


@flax.struct.dataclass
class Whole:
    """As a run saves it."""

    step: jax.Array
    params: dict
    model_state: dict
    opt_state: tuple
    ema: dict


def whole(value, ema):
    params = {"head": {"kernel": jnp.full((3, 4), float(value)), "bias": jnp.arange(4.0)}}
    stats = {"batch_stats": {"mean": jnp.full(3, value + 0.5)}}
    mean = {"params": jax.tree.map(lambda x: x + 1, params), **stats} if ema else {}
    return Whole(jnp.int32(value), params, stats, ({"mu": params},), mean)


@pytest.mark.parametrize("ema", [False, True])
def test_a_reader_gets_the_best_without_the_optimizer(checkpoints, ema):
    for step, rank in [(1, 0.5), (2, 0.9), (3, 0.7)]:
        checkpoints.save(step, whole(step, ema), rank=rank)
    checkpoints.wait()
    saved = checkpoint.read(checkpoints.folder.parent)
    want = whole(2, ema)
    assert saved.step == 2
    chex.assert_trees_all_equal(saved.params, want.params)
    chex.assert_trees_all_equal(saved.model_state, want.model_state)
    chex.assert_trees_all_equal(saved.ema, want.ema)


def test_a_reader_passes_over_what_is_damaged_and_changes_nothing(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, whole(step, ema=True), rank=float(step))
    checkpoints.wait()
    seal = checkpoints.folder / "2" / "seal" / "metadata"
    text = seal.read_text()
    number = str(digest(whole(2, ema=True))[-1])
    seal.write_text(text.replace(number, str(int(number) ^ 1)))
    before = sorted(checkpoints.folder.rglob("*"))
    assert checkpoint.read(checkpoints.folder.parent).step == 1
    assert sorted(checkpoints.folder.rglob("*")) == before
    (checkpoints.folder / "1" / "state" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint that can be read: 1: .*; 2: "):
        checkpoint.read(checkpoints.folder.parent)


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        checkpoint.read(tmp_path)
