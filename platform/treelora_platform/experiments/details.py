"""What the figures need beyond the records: curves and artifacts, fetched when asked for, of a few runs of each group.

A run whose artifacts can't be had is left out and remarked on; it is no reason not to show the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa

from treelora.errors import TreeLoRAError
from treelora_platform.experiments.records import RunRecord
from treelora_platform.run_tables import TreeSnapshot, read_scores, read_steps, read_trees, task_names
from treelora_platform.summary import modes_of

if TYPE_CHECKING:
    from treelora_platform.tracking_query import History

CURVE_RUNS = 12
MATRIX_RUNS = 6
SCORES_FILE = "tables/scores.parquet"
GIVE_UP_AFTER = 3  # refusals in a row: each may take as long as the server's time-out
_T = TypeVar("_T")


@dataclass(frozen=True)
class Matrix:
    """The mean accuracy matrix of some runs that learnt the same tasks in the same order."""

    values: np.ndarray
    tasks: tuple[str, ...]
    runs: int


@dataclass(frozen=True)
class Inside:
    """What one run did, step by step, and its tree after each task."""

    record: RunRecord
    steps: pa.Table
    trees: list[TreeSnapshot]
    names: dict[int, str]

    @property
    def pulled(self) -> bool:
        """Whether any layer pulled an arm."""
        return any(self.steps["arms"].to_pylist())

    @property
    def pushed(self) -> bool:
        """Whether the strength of the penalty was measured."""
        return self.steps.num_rows > self.steps["penalty_ratio"].null_count


class Details:
    """Asks MLflow for what the figures draw; `remarks` says what could not be had."""

    def __init__(self, history: History, folder: Path) -> None:
        self.history = history
        self.folder = folder
        self.remarks: list[str] = []
        self._refused = 0

    def curves(self, records: Sequence[RunRecord], metric: str, mode: str) -> list[np.ndarray]:
        """OP or BWT (`op`, `bwt`) over the tasks learnt, of at most `CURVE_RUNS` runs; NaN where it isn't known."""
        key = f"{metric}/{mode}"
        found = [self._try(record, lambda run: _along(self.history.curve(run, key))) for record in records[:CURVE_RUNS]]
        return [curve for curve in found if curve is not None and len(curve)]

    def matrices(self, records: Sequence[RunRecord], modes: Sequence[str]) -> dict[str, Matrix]:
        """The mean matrix by mode, of at most `MATRIX_RUNS` runs: those with the order that most of them have."""
        from treelora.evaluation.matrix import matrix_from_table

        orders = Counter(record.tasks for record in records)
        tasks = orders.most_common(1)[0][0] if orders else ()
        alike = [record for record in records if record.tasks == tasks][:MATRIX_RUNS]
        tables = [table for record in alike if (table := self._try(record, self._scores)) is not None]
        found = {}
        for mode in modes:
            mine = [matrix_from_table(table, mode) for table in tables if mode in modes_of(table)]
            mine = [matrix for matrix in mine if np.isfinite(matrix).any()]
            size = max(map(len, mine), default=0)
            whole = [matrix for matrix in mine if len(matrix) == size]  # others were stopped on the way
            if whole:
                found[mode] = Matrix(np.mean(whole, axis=0), tasks, len(whole))
        return found

    def inside(self, record: RunRecord) -> Inside | None:
        """All that is known of one run, None where it can't be had."""
        return self._try(record, lambda run: self._inside(record, run))

    def _scores(self, run_id: str) -> pa.Table:
        found = self.history.download(run_id, self._place(run_id), (SCORES_FILE,))
        return read_scores(found)

    def _inside(self, record: RunRecord, run_id: str) -> Inside:
        found = self.history.download(run_id, self._place(f"{run_id}-whole"), ("tables", "tree"))
        return Inside(record, read_steps(found), read_trees(found), task_names(found))

    def _place(self, name: str) -> Path:
        return self.folder / "".join(c if c.isalnum() or c == "-" else "_" for c in name)

    def _try(self, record: RunRecord, read: Callable[[str], _T]) -> _T | None:
        if self._refused >= GIVE_UP_AFTER:
            return None
        try:
            found = read(record.run_id)
        except TreeLoRAError as error:
            self._refused += 1
            self.remarks.append(f"{record.name}: {error}")
            if self._refused == GIVE_UP_AFTER:
                self.remarks.append(f"{GIVE_UP_AFTER} runs in a row could not be read, so no more were asked for")
            return None
        self._refused = 0
        return found


def _along(points: Sequence[tuple[int, float]]) -> np.ndarray:
    """[tasks] of (index of the task just learnt, value); the last of several values counts."""
    known = {step: value for step, value in points if step >= 0}
    curve = np.full(max(known, default=-1) + 1, np.nan)
    for step, value in known.items():
        curve[step] = value
    return curve
