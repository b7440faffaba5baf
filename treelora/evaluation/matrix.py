"""The accuracy matrix of a stream, and the numbers of continual learning as pure functions of it.

R is float64 [N, N]: R[i, j] = score (percent, 0 to 100) on task i after training task j, both counted from 0
in stream order; NaN where it was not measured, usually for i > j (tasks not yet seen). n counts tasks: n = 1
means after the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from treelora.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

SCORES_SCHEMA = pa.schema(
    [
        pa.field("mode", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("after_task", pa.string(), nullable=False),
        pa.field("task_index", pa.int32(), nullable=False),
        pa.field("after_index", pa.int32(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("rows", pa.int32(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
)
BEFORE_TRAINING = -1


@dataclass(frozen=True)
class Score:
    """One measurement, one row of the table of scores.

    `mode` is the way of inference ("last", "merged", "routed", ...); `after_index` is the last trained task's
    index, or BEFORE_TRAINING (then `after_task` is ""); `score` is in percent, `seconds` the time it took.
    """

    mode: str
    task: str
    after_task: str
    task_index: int
    after_index: int
    metric: str
    score: float
    rows: int
    seconds: float


def scores_table(scores: Iterable[Score]) -> pa.Table:
    """The tidy table of scores, one row a measurement, in SCORES_SCHEMA."""
    return pa.Table.from_pylist([asdict(score) for score in scores], schema=SCORES_SCHEMA)


def matrix_from_table(table: pa.Table, mode: str) -> np.ndarray:
    """R [N, N] of one way of inference; N is one more than the largest index in it, NaN where no row is.

    Raises:
        DataError: the mode is not in the table, or a cell was measured twice.
    """
    R, _ = _cells(table, mode)
    return R


def baseline_from_table(table: pa.Table, mode: str) -> np.ndarray:
    """Scores [N] before any training (rows with `after_index` -1), NaN where not measured: b of forward
    transfer.

    Raises:
        DataError: as for `matrix_from_table`.
    """
    _, baseline = _cells(table, mode)
    return baseline


def task_names(table: pa.Table) -> list[str]:
    """Names of the tasks in stream order; "task i" where the table has none for an index.

    Raises:
        DataError: one index carries two names.
    """
    names: dict[int, str] = {}
    for row in table.select(["task_index", "task"]).to_pylist():
        index, name = row["task_index"], row["task"]
        if names.setdefault(index, name) != name:
            raise DataError(f"task index {index} is named both {names[index]!r} and {name!r}; use one name")
    return [names.get(i, f"task {i}") for i in range(max(names, default=-1) + 1)]


def _cells(table: pa.Table, mode: str) -> tuple[np.ndarray, np.ndarray]:
    rows = table.filter(pc.equal(table["mode"], mode)).to_pylist()
    if not rows:
        known = sorted(set(table["mode"].to_pylist()))
        raise DataError(f"no scores of mode {mode!r}; the table has {known}")
    n = 1 + max(max(row["task_index"], row["after_index"]) for row in rows)
    # One more column at the end, which index -1 (before training) fills.
    cells = np.full((n, n + 1), np.nan)
    seen: set[tuple[int, int]] = set()
    for row in rows:
        cell = (row["task_index"], row["after_index"])
        if cell[0] < 0 or cell[1] < BEFORE_TRAINING:
            raise DataError(f"mode {mode!r}: task_index {cell[0]}, after_index {cell[1]}; indices count from 0")
        if cell in seen:
            raise DataError(
                f"mode {mode!r}: task {row['task']!r} after {row['after_task']!r} was measured twice; keep one row"
            )
        seen.add(cell)
        cells[cell] = row["score"]
    return cells[:, :n], cells[:, n]


def overall_performance(R: np.ndarray, n: int | None = None) -> float:
    """OP_n = mean over i <= n of R[i, n] (arXiv 2506.10355): the mean score after task n. Larger is better.

    Raises:
        DataError: R is not square, n is out of range, or a needed cell was not measured.
    """
    R, n = _checked(R, n)
    return float(_measured(R[:n, n - 1], lambda i: (i, n - 1)).mean())


def backward_transfer(R: np.ndarray, n: int | None = None) -> float:
    """BWT_n = mean over i <= n of (R[i, i] - R[i, n]), as arXiv 2506.10355 defines it: what was forgotten.

    Smaller is better, and a negative value means that old tasks gained; nothing is clipped. Much of the
    literature (Lopez-Paz and Ranzato, NeurIPS 2017) has the opposite sign and averages over the n - 1 earlier
    tasks; here the last task counts with its zero.

    Raises:
        DataError: as for `overall_performance`.
    """
    R, n = _checked(R, n)
    learned = _measured(R.diagonal()[:n], lambda i: (i, i))
    return float((learned - _measured(R[:n, n - 1], lambda i: (i, n - 1))).mean())


def forgetting(R: np.ndarray, n: int | None = None) -> float:
    """F_n = mean over i < n of (max over i <= j < n of R[i, j] - R[i, n]) (Chaudhry et al., ECCV 2018).

    Smaller is better; 0.0 for a single task, which can't be forgotten yet.

    Raises:
        DataError: as for `overall_performance`.
    """
    R, n = _checked(R, n)
    if n == 1:
        return 0.0
    best = [_measured(R[i, i : n - 1], _in_row(i)).max() for i in range(n - 1)]
    last = _measured(R[: n - 1, n - 1], lambda i: (i, n - 1))
    return float((np.asarray(best) - last).mean())


def forward_transfer(R_full: np.ndarray, baseline: np.ndarray | Sequence[float]) -> float:
    """FWT = mean over i >= 2 of (R[i, i-1] - b_i) (Lopez-Paz and Ranzato, NeurIPS 2017). Larger is better.

    Args:
        R_full: [N, N] with the scores on the next, still unseen task (one below the diagonal).
        baseline: [N], b_i = score on task i before any training.

    Returns:
        The mean over the tasks for which both were measured; NaN if there is none.

    Raises:
        DataError: R is not square or the baseline has another length.
    """
    R, n = _checked(R_full, None)
    b = np.asarray(baseline, dtype=np.float64)
    if b.shape != (n,):
        raise DataError(f"the baseline has shape {b.shape}; with {n} tasks it must be ({n},)")
    gains = R.diagonal(offset=-1) - b[1:]
    gains = gains[~np.isnan(gains)]
    return float(gains.mean()) if gains.size else float("nan")


def _checked(R: np.ndarray, n: int | None) -> tuple[np.ndarray, int]:
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not R.size:
        raise DataError(f"the accuracy matrix has shape {R.shape}; it must be square with at least one task")
    n = len(R) if n is None else n
    if not 1 <= n <= len(R):
        raise DataError(f"n is {n}; with {len(R)} tasks it must be 1 to {len(R)}")
    return R, n


def _in_row(i: int) -> Callable[[int], tuple[int, int]]:
    return lambda k: (i, i + k)


def _measured(values: np.ndarray, cell_of: Callable[[int], tuple[int, int]]) -> np.ndarray:
    missing = np.flatnonzero(~np.isfinite(values))
    if missing.size:
        i, j = cell_of(int(missing[0]))
        raise DataError(f"R[{i}, {j}] (task {i} after task {j}, from 0) was not measured; evaluate it first")
    return values


def render_matrix(R: np.ndarray, names: Sequence[str], *, title: str = "Score (%) after each task") -> Table:
    """R as a table for the terminal: a row a task, a column a training step, red (0) to green (100); OP_n
    below.

    Raises:
        DataError: R is not square or `names` has another length.
    """
    from rich.table import Table
    from rich.text import Text

    R, n = _checked(R, None)
    if len(names) != n:
        raise DataError(f"{len(names)} names for {n} tasks; give one name a task")
    table = Table(title=title, show_footer=True, caption="a column a learnt task, numbered as the rows")
    table.add_column("task", footer="OP", no_wrap=True)
    for j in range(n):
        column = R[: j + 1, j]
        footer = f"{column.mean():.1f}" if np.isfinite(column).all() else ""
        table.add_column(str(j + 1), footer=footer, justify="right", no_wrap=True)
    for i, name in enumerate(names):
        cells = [Text("·", "dim") if np.isnan(v) else Text(f"{v:.1f}", f"black on {heat(v)}") for v in R[i]]
        table.add_row(Text(f"{i + 1} {shorten(name, 24)}"), *cells)
    return table


def shorten(name: str, width: int = 10) -> str:
    """The name cut to `width` characters; its end is kept as well, because names of one family differ
    there."""
    return name if len(name) <= width else f"{name[: width - 4]}…{name[-3:]}"


def heat(percent: float) -> str:
    """Colour "#rrggbb" of a score: red at 0, yellow at 50, green at 100, pale enough for black text."""
    x = min(max(percent / 100.0, 0.0), 1.0)
    red, green = min(2.0 - 2.0 * x, 1.0), min(2.0 * x, 1.0)
    return f"#{round(90 + 150 * red):02x}{round(90 + 150 * green):02x}5a"
