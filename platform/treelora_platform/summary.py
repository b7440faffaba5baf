"""What a run amounts to, in a few numbers, and several runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from treelora.errors import DataError
from treelora_platform.run_tables import read_config_yaml, read_run_json, read_scores, read_steps, read_tasks

if TYPE_CHECKING:
    from rich.table import Table

NOT_MEASURED = "–"


@dataclass(frozen=True)
class ModeSummary:
    """Percent, of one way of inference; None where the cells that a number needs were not measured.

    `op`: larger is better. `bwt`: what was forgotten, smaller is better (arXiv 2506.10355). `fwt`: larger is
    better.
    """

    op: float | None
    bwt: float | None
    fwt: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """`seconds` and `tokens` are of training, `stored_bytes` of all that is kept: adapters, state, memory."""

    name: str
    method: str
    modes: dict[str, ModeSummary]
    seconds: float
    tokens: int
    tokens_per_second: float | None
    stored_bytes: int
    tasks: tuple[str, ...]


def summarise(run_dir: Path) -> RunSummary:
    """Read the tables of a run, finished or not, and sum them up.

    OP and BWT are those after the last task for which a mode's column is complete.

    Raises:
        DataError: there is no run in the directory, or one of its files is damaged.
    """
    run, config = read_run_json(run_dir), read_config_yaml(run_dir)
    scores, tasks = read_scores(run_dir), read_tasks(run_dir)
    steps = read_steps(run_dir, columns=["task", "step_seconds", "tokens"])
    if not (run or config or scores.num_rows or tasks.num_rows or steps.num_rows):
        raise DataError(f"{run_dir}: holds no run; give the folder that has run.json and tables/")
    seconds = _training_seconds(tasks, steps)
    tokens = int(pc.sum(steps["tokens"]).as_py() or 0)
    return RunSummary(
        name=str(run.get("name") or config.get("name") or run_dir.name),
        method=str(config.get("method", "unknown")),
        modes={mode: summarise_mode(scores, mode) for mode in modes_of(scores)},
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds if seconds > 0 else None,
        stored_bytes=_stored_bytes(tasks),
        tasks=tuple(tasks["task"].to_pylist()) or tuple(dict.fromkeys(steps["task"].to_pylist())),
    )


def modes_of(scores: pa.Table) -> list[str]:
    """Ways of inference in a table of scores, in order of their first row."""
    return list(dict.fromkeys(scores["mode"].to_pylist()))


def summarise_mode(scores: pa.Table, mode: str) -> ModeSummary:
    """OP, BWT and FWT of one way of inference; OP of a model that was not trained is its mean score."""
    from treelora.evaluation.matrix import (
        backward_transfer,
        baseline_from_table,
        forward_transfer,
        matrix_from_table,
        overall_performance,
    )

    matrix, baseline = matrix_from_table(scores, mode), baseline_from_table(scores, mode)
    complete = [n for n in range(1, len(matrix) + 1) if np.isfinite(matrix[:n, n - 1]).all()]
    fwt = forward_transfer(matrix, baseline)
    if not complete:
        # before training, tasks are scored with the latest adapter, also in a run that is scored otherwise
        trained = pc.any(pc.greater_equal(scores["after_index"], 0)).as_py()
        untrained = np.isfinite(baseline).all() and not trained
        return ModeSummary(float(baseline.mean()) if untrained else None, None, None)
    n = complete[-1]
    bwt = backward_transfer(matrix, n) if np.isfinite(matrix.diagonal()[:n]).all() else None
    return ModeSummary(overall_performance(matrix, n), bwt, fwt if np.isfinite(fwt) else None)


def render_comparison(summaries: Sequence[RunSummary]) -> Table:
    """Runs side by side for the terminal: a column a run, a row a number; the best of a score in bold.

    Raises:
        DataError: there is nothing to compare.
    """
    from rich.table import Table
    from rich.text import Text

    if not summaries:
        raise DataError("nothing to compare; give at least one run")
    table = Table(title="Runs side by side", pad_edge=False)
    table.add_column("", no_wrap=True)
    for summary in summaries:
        table.add_column(Text(f"{summary.name}\n{summary.method}"), justify="right")
    for row in compare(summaries):
        cells = [Text(value, "bold" if value == row.best else "") for value in row.values]
        table.add_row(Text(row.label), *cells)
    return table


@dataclass(frozen=True)
class Comparison:
    """A number of several runs, as texts, one a run; `best` is the text of the best where one is better."""

    label: str
    values: tuple[str, ...]
    best: str | None = None


def compare(summaries: Sequence[RunSummary]) -> list[Comparison]:
    """The rows that `render_comparison` and the report show; scores that no run has are left out."""
    rows: list[Comparison] = []
    for mode in dict.fromkeys(mode for summary in summaries for mode in summary.modes):
        found = [summary.modes.get(mode, ModeSummary(None, None)) for summary in summaries]
        rows += _scores(f"OP {mode} (%)", [m.op for m in found], max)
        rows += _scores(f"BWT {mode} (points)", [m.bwt for m in found], min)
        rows += _scores(f"FWT {mode} (points)", [m.fwt for m in found], max)
    return [
        *rows,
        Comparison("tasks learnt", tuple(str(len(s.tasks)) for s in summaries)),
        Comparison("training time", tuple(format_seconds(s.seconds) for s in summaries)),
        Comparison("tokens trained on", tuple(f"{s.tokens:,}" for s in summaries)),
        Comparison("tokens per second", tuple(format_number(s.tokens_per_second) for s in summaries)),
        Comparison("stored", tuple(format_bytes(s.stored_bytes) for s in summaries)),
    ]


def _scores(label: str, values: list[float | None], better: Callable[..., float]) -> list[Comparison]:
    measured = [value for value in values if value is not None]
    if not measured:
        return []
    texts = tuple(format_number(value) for value in values)
    # equal texts are a tie, however the digits behind them differ
    best = format_number(better(measured)) if len({t for t in texts if t != NOT_MEASURED}) > 1 else None
    return [Comparison(label, texts, best)]


def format_seconds(seconds: float) -> str:
    """`42.0 s`, `3 min 05 s` or `2 h 07 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(count: float) -> str:
    """With a binary prefix: `512 B`, `1.5 KiB`, `3.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_number(value: float | None) -> str:
    """Two decimals, none from a thousand on; a dash for what was not measured."""
    return NOT_MEASURED if value is None else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _training_seconds(tasks: pa.Table, steps: pa.Table) -> float:
    """What a method does before and after a task's steps counts; of an unfinished task only the steps are known."""
    done = tasks.filter(tasks["train_seconds"].is_valid())
    pending = steps.filter(pc.invert(pc.is_in(steps["task"], value_set=done["task"].combine_chunks())))
    return float(pc.sum(done["train_seconds"]).as_py() or 0.0) + float(pc.sum(pending["step_seconds"]).as_py() or 0.0)


def _stored_bytes(tasks: pa.Table) -> int:
    last = tasks.slice(max(0, tasks.num_rows - 1))
    return sum(int(pc.sum(last[part]).as_py() or 0) for part in ("adapter_bytes", "state_bytes", "memory_bytes"))
