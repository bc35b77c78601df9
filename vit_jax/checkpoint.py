"""Checkpoints: the one place that saves and restores a run's state, with Orbax.

Orbax writes atomically but keeps no checksum of arrays and never falls back, so each checkpoint
carries a seal, with a digest of its state, and `restore` goes back to the newest one whose seal
agrees with its content.
"""

import gc
import json
import logging
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from vit_jax import bucket, mesh, processes
from vit_jax.errors import CheckpointError
from vit_jax.faults import NONE, Faults

Tree = Any
Say = Callable[[str], None]
UNFINISHED = ".orbax-checkpoint-tmp"  # after the name of one that is being written
DAMAGED = "damaged-"  # before the name of a checkpoint that was set aside


class Checkpoints:
    """The checkpoints of one run folder, in `checkpoints/<step>`.

    Saving is asynchronous: `save` returns when the arrays are copied, and a failure (a full disk)
    shows at the next call. It never raises; it warns, keeps the reason in `failure` and goes on,
    since a run is worth more than one of its checkpoints.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        warn: Say = print,
        faults: Faults = NONE,
        read_only: bool = False,
    ):
        """Opens or makes the folder.

        Args:
          workdir: the run folder; an `epath.Path` may lie in a bucket.
          keep_last: how many of the newest checkpoints stay.
          keep_best: how many of those saved with the highest `rank` stay as well.
          warn: where warnings go; may be set anew later.
          faults: what is to go wrong, in tests.
          read_only: changes nothing in the folder, in which a run may be going on.
        """
        self.folder = _folder(workdir)
        self.failure = ""
        self.notes: dict[str, Any] = {}  # those of the checkpoint that was restored last
        self.warn = warn
        self._faults, self._read_only = faults, read_only
        self._keep = (keep_last, keep_best)
        self._writing: int | None = None  # the step that was saved last
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        keep_last, keep_best = self._keep
        self._ranks: dict[int, float] = {}
        # Not Orbax's own metrics: it reads them on opening, and a damaged file ends the program.
        policies = [LatestN(max(keep_last, 1)), _Best(keep_best, self._ranks)]
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,  # what a killed save left
            preservation_policy=AnyPreservationPolicy(policies),
        )
        if self._read_only:
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0
            )
        handlers = {"state": ocp.StandardCheckpointHandler(), "seal": ocp.JsonCheckpointHandler()}
        with _answering(self.folder):
            manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
            self._ranks |= _ranks(self.folder, manager.all_steps())
        return manager

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step saved with the highest rank, None if none has one."""
        ranked = [(self._ranks[step], step) for step in self.steps() if step in self._ranks]
        return max(ranked)[1] if ranked else None

    def save(
        self,
        step: int,
        state: Tree,
        *,
        rank: float | None = None,
        notes: dict[str, Any] | None = None,
    ) -> bool:
        """Starts to write `state` as `step`; False, with a warning, if that failed.

        Args:
          step: names the checkpoint; one that is there already is left as it is.
          state: a tree of arrays, on any mesh.
          rank: higher is better; None keeps the checkpoint out of the ranking.
          notes: plain data of JSON that belong to this state; `restore` leaves them in `notes`.
        """
        try:
            if step in self._manager.all_steps():
                return not self.failure
            self.wait()  # a save before this one that failed is not to take this one with it
            if self._faults:
                self._faults.before_save()
            seal = {
                "step": step,
                "digest": digest(state),
                "arrays": _checksum(_shapes(state)),
                "rank": None if rank is None else float(rank),
                "notes": notes or {},
            }
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                seal=ocp.args.JsonSave(seal | {"check": _checksum(seal)}),
            )
            self._writing = step
            if rank is not None:
                self._ranks[step] = float(rank)
            self._manager.save(step, args=args, force=True)
            self.failure = ""
            if self._faults:
                self._faults.after_save()
        except Exception as error:  # Orbax raises many types, also those of the save before
            self._failed(step, error)
        return not self.failure

    def rank(self, step: int, rank: float) -> None:
        """Ranks a checkpoint that was saved before its evaluation was done, if it is still there.

        Raises nothing: a seal that cannot be replaced stays as it is.
        """
        self.wait()
        if not processes.first():
            return
        file = _seal_of(self.folder, step)
        try:
            with _answering(self.folder):
                seal = _read_seal(self.folder, step) | {"rank": float(rank)}
                unfinished = file.with_suffix(".tmp")
                unfinished.write_text(json.dumps(seal | {"check": _checksum(seal)}))
                unfinished.replace(file)  # at no moment without a whole seal
            self._ranks[step] = float(rank)
        except (OSError, ValueError, KeyError) as error:
            self.warn(f"checkpoint {step} could not be ranked: {error}")

    def wait(self) -> bool:
        """Waits until the last save is on the disk; False, with a warning, if it is not."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._failed(self._writing, error)
        return not self.failure

    def _failed(self, step: int | None, error: Exception) -> None:
        self.failure = f"checkpoint {step} could not be written: {_reason(error, 300)}"
        if not processes.alone():  # the others would wait for this one to save with them
            raise CheckpointError(self.failure) from error
        self.warn(f"{self.failure}; the run goes on, older checkpoints are intact")
        self._close()
        shutil.rmtree(self.folder / f"{step}{UNFINISHED}", ignore_errors=True)  # it takes up room
        with suppress(CheckpointError):  # a bucket that is still silent is asked at the next save
            self._manager = self._open()  # the old one believes that the failed step exists

    def restore(self, target: Tree, *, step: int | None = None) -> tuple[Tree, int] | None:
        """The newest good checkpoint, laid out as `target`; None if there is none at all.

        A damaged checkpoint is set aside under `damaged-<step>-<time>`, never deleted, and the one
        before it is tried.

        Args:
          target: a tree of `jax.ShapeDtypeStruct` with shardings.
          step: only this one.

        Raises:
          CheckpointError: if the newest checkpoint is of another model, or the bucket does not
            answer (then nothing is renamed), or if there are checkpoints and none can be read, now
            or when they were set aside.
        """
        steps = processes.from_first([s for s in self.steps() if step is None or s == step])
        with _answering(self.folder):
            aside = [name for name in _names(self.folder) if name.startswith(DAMAGED)]
        if aside and not steps:  # the command that set them aside was given once more
            raise CheckpointError(
                f"{self.folder} holds damaged checkpoints only: {', '.join(aside)}. Start anew "
                "with another --workdir"
            )
        with _without_stray_errors():
            for candidate in reversed(steps):
                damage = None
                try:
                    with _answering(self.folder):
                        state = self._restore_one(candidate, target)
                # Too little memory says nothing of the file.
                except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
                    raise
                except Exception as error:  # Orbax raises at least seven types on damaged files
                    damage = error
                if processes.agree(damage is None):
                    return state, candidate
                self._set_aside(candidate, damage or OSError("another process cannot read it"))
                gc.collect()  # what else was being read complains now, while nobody listens
        if steps:
            aside = "" if self._read_only else "; they were set aside as damaged-*"
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.folder} can be read{aside}. Start anew "
                "with another --workdir"
            )
        return None

    def _restore_one(self, step: int, target: Tree) -> Tree:
        seal = _read_seal(self.folder, step)
        self._check_same_model(step, target, seal)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        state = self._manager.restore(step, args=args)["state"]
        if seal["digest"] != digest(state):
            raise OSError("its digest differs from its content")
        self.notes = seal.get("notes", {})
        return state

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        if self._read_only:
            self.warn(f"checkpoint {step} cannot be read ({reason}), going back to the one before")
            return
        aside = self.folder / f"{DAMAGED}{step}-{time.time_ns()}"
        self.warn(
            f"checkpoint {step} is damaged ({type(error).__name__}: {reason}); set aside as "
            f"{aside.name}, going back to the one before"
        )
        self._close()
        with _answering(self.folder):
            processes.first_does((self.folder / str(step)).rename, aside)
        self._manager = self._open()  # the old manager would refuse to save that step again

    def _check_same_model(self, step: int, target: Tree, seal: dict[str, Any]) -> None:
        saved = _shapes(self._manager.item_metadata(step)["state"])
        if seal.get("arrays", _checksum(saved)) != _checksum(saved):
            raise OSError("its list of arrays is not the one that was sealed")
        wanted = _shapes(target)
        different = [
            f"{name}: {saved.get(name, 'absent')} there, {wanted.get(name, 'absent')} wanted"
            # What the optimizer keeps of a parameter differs with it, and says less.
            for name in sorted(
                saved.keys() | wanted.keys(), key=lambda n: (not n.startswith("params/"), n)
            )
            if saved.get(name) != wanted.get(name)
        ]
        if different:
            shown = "; ".join(different[:3]) + ("; ..." if len(different) > 3 else "")
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} is of another model: {len(different)} arrays "
                f"differ: {shown}"
            )

    def _close(self) -> None:
        try:
            self._manager.close()
        except Exception as error:  # a save that failed is reported once more on closing
            if not self.failure:
                self.warn(f"closing the checkpoints: {error}")

    def close(self) -> bool:
        """Finishes the last save; False if the run's last checkpoint is not on the disk."""
        finished = self.wait()
        self._close()
        return finished


@dataclass(frozen=True)
class _Best:
    """Keeps the `count` checkpoints of the highest rank: a `PreservationPolicy` of Orbax."""

    count: int
    ranks: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        ranked = [(self.ranks[c.step], c.step) for c in checkpoints if c.step in self.ranks]
        best = {step for _, step in sorted(ranked)[max(len(ranked) - self.count, 0) :]}
        return [c.step in best for c in checkpoints]


def _folder(workdir: str | os.PathLike) -> Path | epath.Path:
    """Where the checkpoints of a run folder lie, which may be in a bucket."""
    if isinstance(workdir, epath.Path):
        return workdir / "checkpoints"
    return Path(workdir).absolute() / "checkpoints"


@contextmanager
def _answering(folder: Path | epath.Path) -> Iterator[None]:
    """CheckpointError for a bucket that does not answer, which says nothing of what it holds."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if isinstance(folder, epath.Path) and bucket.unreached(error):
            raise CheckpointError(f"{folder} cannot be reached: {_reason(error)}") from error
        raise


def _names(folder: Path | epath.Path) -> list[str]:
    """What is in a folder; a bucket's is there as long as something is in it."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []


def _reason(error: Exception, most: int = 200) -> str:
    """The first line of what an error says, or what it is."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def _seal_of(folder: Path, step: int) -> Path:
    return folder / str(step) / "seal" / "metadata"


def _read_seal(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint tells of itself; OSError or ValueError if it is damaged."""
    seal = json.loads(_seal_of(folder, step).read_text())
    check = seal.pop("check", None)
    # The first seals held two numbers, and no checksum of themselves.
    if check != _checksum(seal) and (check is not None or seal.keys() != {"step", "digest"}):
        raise OSError("its seal differs from the seal's own checksum")
    if seal["step"] != step:
        raise OSError(f"it was saved as step {seal['step']}")
    return seal


def _ranks(folder: Path, steps: Sequence[int]) -> dict[int, float]:
    """The ranks of those that have one; `restore` deals with the damaged."""
    ranks = {}
    for step in steps:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            rank = _read_seal(folder, step).get("rank")
            if rank is not None:
                ranks[step] = rank
    return ranks


@dataclass(frozen=True)
class Saved:
    """What of a checkpoint a trained model needs, without the optimizer; numpy arrays.

    Attributes:
      step: when it was saved.
      params: the learned arrays.
      model_state: collections such as `batch_stats`.
      ema: running mean of {"params", **model_state}; empty where the run kept none.
    """

    step: int
    params: Tree
    model_state: Tree
    ema: Tree


def read(workdir: str | os.PathLike) -> Saved:
    """The best checkpoint of a run that can be read, else the newest; nothing is changed.

    The run may still be going on. A damaged checkpoint is passed over.

    Raises:
      CheckpointError: if there is none.
    """
    folder = _folder(workdir)
    reasons = []
    with _answering(folder):
        there = folder.is_dir()
    if not there:
        raise CheckpointError(f"{workdir} holds no checkpoints")
    with _without_remarks(), _answering(folder), _reading(folder) as manager:
        steps = manager.all_steps()
        ranked = sorted((rank, step) for step, rank in _ranks(folder, steps).items())
        order = [step for _, step in ranked[::-1]] + sorted(steps, reverse=True)
        with _without_stray_errors():
            for step in dict.fromkeys(order):
                try:
                    return _read_one(manager, folder, step)
                except Exception as error:  # Orbax raises at least seven types on damaged files
                    reasons.append(f"{step}: {_reason(error)}")
                gc.collect()
    told = f": {'; '.join(reasons)}" if reasons else ""
    raise CheckpointError(f"{workdir} holds no checkpoint that can be read{told}")


def _reading(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "seal": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Keeps to itself that Orbax warns of a folder that is only to be read."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_one(manager: ocp.CheckpointManager, folder: Path, step: int) -> Saved:
    seal = _read_seal(folder, step)
    saved = manager.item_metadata(step)["state"]
    target = {
        part: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), saved[part])
        for part in ("params", "model_state", "ema")
        if saved.get(part)
    }
    restore = ocp.args.PyTreeRestore(
        item=target,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target),
        partial_restore=True,
    )
    state = manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
    parts = {part: state.get(part, {}) for part in ("params", "model_state", "ema")}
    # The digests lie in the order of TrainState: step, params, model state, optimizer, mean.
    found = {part: digest(tree) for part, tree in parts.items()}
    front = found["params"] + found["model_state"]
    back = found["ema"]
    wanted = seal["digest"][1 : 1 + len(front)], seal["digest"][len(seal["digest"]) - len(back) :]
    if (front, back) != wanted:
        raise OSError("its digest differs from its content")
    return Saved(step, **parts)


@contextmanager
def _without_stray_errors() -> Iterator[None]:
    """Silences what Orbax's other reads still print after the first of them has failed."""
    before = sys.unraisablehook

    def hook(stray: Any) -> None:
        code = getattr(stray.object, "cr_code", None)  # of a coroutine
        of_orbax = code is not None and "orbax" in code.co_filename
        if not of_orbax and "Event loop is closed" not in str(stray.exc_value):
            before(stray)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _checksum(plain: Any) -> int:
    """Of plain data; tuples and lists are the same, as in JSON."""
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def _shapes(tree: Tree) -> dict[str, tuple]:
    """{"params/head/bias": ("float32", (10,)), ...}; empty containers hold nothing."""

    def leaf(x: Any) -> tuple:
        return str(np.dtype(x.dtype)), tuple(x.shape)

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {mesh.name_of(path): leaf(x) for path, x in flat if hasattr(x, "shape")}


def digest(tree: Tree) -> list[int]:
    """One 32-bit number for each array, the same on any mesh: against accidents, not attackers."""
    return [int(x) for x in jax.device_get(_digest_leaves(jax.tree.leaves(tree)))]


@jax.jit
def _digest_leaves(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(-1)
        place = jax.lax.iota(jnp.uint32, words.size)
        # A sum that wraps does not depend on the order, hence not on how the array is cut up.
        mixed = (words ^ (words >> 15)) * jnp.uint32(0x9E3779B1) + place * jnp.uint32(0x85EBCA77)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE3D)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return [one(x) for x in leaves]
