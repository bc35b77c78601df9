"""The training pictures that a run left out: each is named once, counted, and too many stop it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax import processes
from vit_jax.contracts import Batch
from vit_jax.errors import DataError
from vit_jax.report import Report

FILE = "broken.jsonl"


class BrokenPictures:
    """Which training examples of a run cannot be read.

    The list lies in the run folder's broken.jsonl, with the step at which each was met first, so
    that a run that goes on from step n knows exactly those that it had met by then.
    """

    def __init__(self, workdir: Path, report: Report, *, start: int, examples: int, most: float):
        """Reads the list, and drops what was met after step `start`.

        Args:
          workdir: the run folder.
          report: says what is wrong.
          start: the step that this process goes on from.
          examples: how many the training split has.
          most: the share of them that may be broken.
        """
        # Of several processes each knows those of its own rows, and its share of the allowance.
        own = FILE if processes.first() else f"{processes.number()}-{FILE}"
        self._path, self._report = workdir / own, report
        self._examples, self._most = examples, most / processes.count()
        self.known: set[int] = set()
        report.attempt(f"read {FILE}", self._open, start)

    def _open(self, start: int) -> None:
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        rows = [row for line in lines if (row := _parse(line)) and row["step"] <= start]
        self.known = {row["index"] for row in rows}
        if len(rows) < len(lines):
            new = self._path.with_suffix(".tmp")
            new.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(new, self._path)

    def check(self, step: int, batch: Batch, describe: Callable[[Batch], list[str]]) -> None:
        """Counts what is broken in a batch and was not known before.

        Args:
          step: of the batch.
          batch: the host's.
          describe: what is wrong with each broken row of a batch, in the order of its rows.

        Raises:
          DataError: if there are now too many, with the last of them and the count.
        """
        bad = (batch["index"] >= 0) & ~batch["valid"]
        if not bad.any():
            return
        indices, first = np.unique(batch["index"][bad], return_index=True)
        rows = np.flatnonzero(bad)[first[[int(i) not in self.known for i in indices]]]
        if not len(rows):
            return
        new = {key: batch[key][rows] for key in ("index", "valid")}
        for index, text in zip(new["index"].tolist(), describe(new), strict=True):
            self.known.add(index)
            self._report.warn(f"skipped a broken picture, {len(self.known)} so far: {text}")
            row = {"step": step, "index": index, "text": text}
            self._report.attempt(f"write {FILE}", self._append, json.dumps(row))
        if len(self.known) > self._most * self._examples:
            raise DataError(
                f"{len(self.known)} of the {self._examples:,} training pictures seen so far are "
                f"broken, more than data.max_broken={self._most:.3g} of all; the last: {text}. "
                f"{self._path} lists them; --config.data.max_broken=1 would go on without them"
            )

    def _append(self, line: str) -> None:
        with open(self._path, "a") as file:
            file.write(line + "\n")


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:  # the last line of a run that was killed
        return None
    return row if isinstance(row, dict) and {"step", "index"} <= row.keys() else None
