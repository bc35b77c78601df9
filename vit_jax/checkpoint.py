"""Checkpoints: the one place that saves and restores a run's state, with Orbax.

Orbax writes atomically but keeps no checksum of arrays and never falls back, so each checkpoint
carries a digest of its state, and `restore` goes back to the newest one whose digest agrees.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from vit_jax.errors import CheckpointError

Tree = Any
Say = Callable[[str], None]


class Checkpoints:
    """The checkpoints of one run folder, in `checkpoints/<step>`.

    Saving is asynchronous: `save` returns when the arrays are copied, and a failure (a full disk)
    shows at the next call. It never raises; it warns, keeps the reason in `failure` and goes on,
    since a run is worth more than one of its checkpoints.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        warn: Say = print,
    ):
        """Opens or makes the folder.

        Args:
          workdir: the run folder.
          keep_last: how many of the newest checkpoints stay.
          keep_best: how many of those saved with the highest `rank` stay as well.
          warn: where warnings go; may be set anew later.
        """
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.failure = ""
        self.warn = warn
        self._keep = (keep_last, keep_best)
        self._writing: int | None = None  # the step that was saved last
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        keep_last, keep_best = self._keep
        best = BestN(
            get_metric_fn=lambda metrics: metrics["rank"],
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        policies = [LatestN(max(keep_last, 1))] + [best] * (keep_best > 0)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,  # what a killed save left
            best_fn=lambda metrics: metrics["rank"],  # without it ranks are not written to the disk
            preservation_policy=AnyPreservationPolicy(policies),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "seal": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step saved with the highest rank, None if none has one."""
        ranked = [(self._manager.metrics(step) or {}).get("rank") for step in self.steps()]
        pairs = [(rank, step) for rank, step in zip(ranked, self.steps()) if rank is not None]
        return max(pairs)[1] if pairs else None

    def save(self, step: int, state: Tree, *, rank: float | None = None) -> bool:
        """Starts to write `state` as `step`; False, with a warning, if that failed.

        Args:
          step: names the checkpoint; one that is there already is left as it is.
          state: a tree of arrays, on any mesh.
          rank: higher is better; None keeps the checkpoint out of the ranking.
        """
        try:
            if step in self._manager.all_steps():
                return not self.failure
            metrics = None if rank is None else {"rank": float(rank)}
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                seal=ocp.args.JsonSave({"step": step, "digest": digest(state)}),
            )
            self._writing = step
            self._manager.save(step, args=args, metrics=metrics, force=True)
            self.failure = ""
        except Exception as error:  # Orbax raises many types, also those of the save before
            self._failed(step, error)
        return not self.failure

    def wait(self) -> bool:
        """Waits until the last save is on the disk; False, with a warning, if it is not."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._failed(self._writing, error)
        return not self.failure

    def _failed(self, step: int | None, error: Exception) -> None:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        self.failure = f"checkpoint {step} could not be written: {reason[0][:300]}"
        self.warn(f"{self.failure}; the run goes on, older checkpoints are intact")
        self._close()
        self._manager = self._open()  # the old manager believes that the failed step exists

    def restore(self, target: Tree, *, step: int | None = None) -> tuple[Tree, int] | None:
        """The newest good checkpoint, laid out as `target`; None if there is none at all.

        A damaged checkpoint is set aside under `damaged-<step>-<time>`, never deleted, and the one
        before it is tried.

        Args:
          target: a tree of `jax.ShapeDtypeStruct` with shardings.
          step: only this one.

        Raises:
          CheckpointError: if the newest checkpoint is of another model (then nothing is renamed),
            or if there are checkpoints and none can be read.
        """
        steps = [s for s in self.steps() if step is None or s == step]
        with _without_stray_errors():
            for candidate in reversed(steps):
                try:
                    return self._restore_one(candidate, target), candidate
                except CheckpointError:
                    raise
                except Exception as error:  # Orbax raises at least seven types on damaged files
                    self._set_aside(candidate, error)
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.folder} can be read; they were set "
                "aside as damaged-*. Start anew with another --workdir"
            )
        return None

    def _restore_one(self, step: int, target: Tree) -> Tree:
        self._check_same_model(step, target)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), seal=ocp.args.JsonRestore()
        )
        out = self._manager.restore(step, args=args)
        if out["seal"]["step"] != step or out["seal"]["digest"] != digest(out["state"]):
            raise OSError("its digest differs from its content")
        return out["state"]

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        aside = self.folder / f"damaged-{step}-{time.time_ns()}"
        self.warn(
            f"checkpoint {step} is damaged ({type(error).__name__}: {reason}); set aside as "
            f"{aside.name}, going back to the one before"
        )
        self._close()
        os.rename(self.folder / str(step), aside)
        self._manager = self._open()  # the old manager would refuse to save that step again

    def _check_same_model(self, step: int, target: Tree) -> None:
        saved = _shapes(self._manager.item_metadata(step)["state"])
        wanted = _shapes(target)
        different = [
            f"{name}: {saved.get(name, 'absent')} there, {wanted.get(name, 'absent')} wanted"
            for name in sorted(saved.keys() | wanted.keys())
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


def read(workdir: str | Path) -> Saved:
    """The best checkpoint of a run that can be read, else the newest; nothing is changed.

    The run may still be going on. A damaged checkpoint is passed over.

    Raises:
      CheckpointError: if there is none.
    """
    folder = Path(workdir).absolute() / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"{workdir} holds no checkpoints")
    reasons = []
    with _without_remarks(), _reading(folder) as manager:
        ranks = {step: (manager.metrics(step) or {}).get("rank") for step in manager.all_steps()}
        ranked = sorted((rank, step) for step, rank in ranks.items() if rank is not None)
        order = [step for _, step in ranked[::-1]] + sorted(ranks, reverse=True)
        with _without_stray_errors():
            for step in dict.fromkeys(order):
                try:
                    return _read_one(manager, step)
                except Exception as error:  # Orbax raises at least seven types on damaged files
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    reasons.append(f"{step}: {reason[:200]}")
    told = f": {'; '.join(reasons)}" if reasons else ""
    raise CheckpointError(f"{workdir} holds no checkpoint that can be read{told}")


def _reading(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        create=False,
        save_interval_steps=0,
        best_fn=lambda metrics: metrics["rank"],
    )
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


def _read_one(manager: ocp.CheckpointManager, step: int) -> Saved:
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
    args = ocp.args.Composite(state=restore, seal=ocp.args.JsonRestore())
    out = manager.restore(step, args=args)
    state, seal = out["state"], out["seal"]
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
        if "Event loop is closed" not in str(stray.exc_value):
            before(stray)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _shapes(tree: Tree) -> dict[str, tuple]:
    """{"params/head/bias": ("float32", (10,)), ...}; empty containers hold nothing."""

    def leaf(x: Any) -> tuple:
        return str(np.dtype(x.dtype)), tuple(x.shape)

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {"/".join(_key(k) for k in path): leaf(x) for path, x in flat if hasattr(x, "shape")}


def _key(key: Any) -> str:
    """A path entry by its name, whether it is an attribute, a key or an index."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


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
