"""The report of a run, or of two side by side: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from treelora.data.parquet import write_bytes_atomically
from treelora_platform.page import inline_svg, render_page
from treelora_platform.redaction import HIDDEN, hide_credentials, is_secret
from treelora_platform.run_tables import (
    TreeSnapshot,
    read_config_yaml,
    read_run_json,
    read_scores,
    read_steps,
    read_tasks,
    read_trees,
    task_names,
)
from treelora_platform.summary import (
    RunSummary,
    compare,
    format_bytes,
    format_number,
    format_seconds,
    modes_of,
    summarise,
)
from treelora_platform.tracking_state import flatten

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class _Run:
    """What the report takes from one run directory."""

    label: str
    summary: RunSummary
    config: dict[str, str]
    about: dict[str, str]
    scores: pa.Table
    steps: pa.Table
    tasks: pa.Table
    trees: list[TreeSnapshot]
    names: dict[int, str]


def write_report(run_dir: Path, out: Path | None = None, other: Path | None = None) -> Path:
    """Write the report of a run to `out` (default: `<run_dir>/report.html`), beside that of `other` if given.

    The file is self-contained: inline figures and style, no scripts, nothing fetched. It shows what the run
    has so far, so it may be written in the middle of one.

    Raises:
        DataError: a directory holds no run, or a table, tree or configuration in it is damaged.
    """
    out = out or run_dir / "report.html"
    runs = [_read(folder) for folder in (run_dir, other) if folder is not None]
    if len({run.label for run in runs}) < len(runs):
        runs = [_relabel(run, f"{run.label} #{i}") for i, run in enumerate(runs, start=1)]
    page = render_page(
        TEMPLATE,
        title=" against ".join(run.label for run in runs),
        labels=[run.label for run in runs],
        comparison=compare([run.summary for run in runs]),
        curves=_curves(runs),
        sections=[_section(i, run) for i, run in enumerate(runs)],
        config=_side_by_side([run.config for run in runs]),
        about=_side_by_side([run.about for run in runs]),
    )
    write_bytes_atomically(out, page)
    return out


def _read(run_dir: Path) -> _Run:
    summary = summarise(run_dir)
    run = read_run_json(run_dir)
    return _Run(
        label=f"{summary.name} ({summary.method})",
        summary=summary,
        config=_texts(read_config_yaml(run_dir)),
        about=_texts({key: _when(value) if key == "created" else value for key, value in run.items()}),
        scores=read_scores(run_dir),
        steps=read_steps(run_dir),
        tasks=read_tasks(run_dir),
        trees=read_trees(run_dir),
        names=task_names(run_dir),
    )


def _relabel(run: _Run, label: str) -> _Run:
    return _Run(**{**vars(run), "label": label})


def _texts(plain: Mapping[str, Any]) -> dict[str, str]:
    # numbers are shown whatever their name, such as max_new_tokens
    return {
        key: HIDDEN if is_secret(key) and isinstance(value, str) else hide_credentials(_text(value))
        for key, value in flatten(plain)
    }


def _when(created: Any) -> Any:
    if not isinstance(created, int | float):
        return created
    return datetime.fromtimestamp(created, UTC).isoformat(sep=" ", timespec="seconds")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    return "none" if value is None or value == {} else str(value)


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, [column.get(key, "–") for column in columns]) for key in keys]
    return [{"key": key, "values": values, "differs": len(set(values)) > 1} for key, values in rows]


def _curves(runs: Sequence[_Run]) -> list[Any]:
    """The figures that both runs share: a colour a mode or a run, a line style a run."""
    from treelora_platform.figures import loss_figure, penalty_figure, transfer_figure

    one = len(runs) == 1
    scores = [("" if one else run.label, run.scores) for run in runs if run.scores.num_rows]
    steps = [("" if one else run.label, run.steps) for run in runs if run.steps.num_rows]
    pulled = [(label, rows) for label, rows in steps if rows["penalty_ratio"].null_count < rows.num_rows]
    figures = []
    if scores:
        figures.append(inline_svg(transfer_figure(scores), "transfer"))
    if steps:
        figures.append(inline_svg(loss_figure(steps), "loss"))
    if pulled:
        figures.append(inline_svg(penalty_figure(pulled), "penalty"))
    return figures


def _section(number: int, run: _Run) -> dict[str, Any]:
    from treelora_platform.figures import arms_figure, tree_figures

    trees = [inline_svg(figure, f"run{number}-{name}") for name, figure in tree_figures(run.trees)]
    arms = run.steps["arms"].null_count < run.steps.num_rows
    return {
        "label": run.label,
        "matrices": [_matrix(run, mode) for mode in modes_of(run.scores)],
        "arms": inline_svg(arms_figure(run.steps, run.names), f"run{number}-arms") if arms else None,
        "trees": trees,
        "tasks": [_task(row) for row in run.tasks.to_pylist()],
        "stored": format_bytes(run.summary.stored_bytes),
    }


def _matrix(run: _Run, mode: str) -> dict[str, Any]:
    from treelora.evaluation.matrix import baseline_from_table, matrix_from_table

    matrix, baseline = matrix_from_table(run.scores, mode), baseline_from_table(run.scores, mode)
    names = [run.names.get(i, f"task {i}") for i in range(len(matrix))]
    columns, means = list(names), [matrix[: n + 1, n].mean() for n in range(len(matrix))]
    if np.isfinite(baseline).any():
        matrix = np.column_stack([baseline, matrix])
        columns, means = ["before training", *names], [baseline.mean(), *means]
    measured = np.isfinite(matrix).any(axis=0)
    found = run.summary.modes[mode]
    return {
        "mode": mode,
        "columns": [column for column, shown in zip(columns, measured, strict=True) if shown],
        "rows": [(name, [_cell(value) for value in row]) for name, row in zip(names, matrix[:, measured], strict=True)],
        "means": [_mean(mean) for mean, shown in zip(means, measured, strict=True) if shown],
        "numbers": [("OP", format_number(found.op)), ("BWT", format_number(found.bwt))],
    }


def _mean(mean: float) -> str:
    return format_number(mean) if np.isfinite(mean) else ""


def _cell(value: float) -> dict[str, str] | None:
    if not np.isfinite(value):
        return None
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colour = colormaps["cividis"](min(max(value / 100, 0.0), 1.0))
    light = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 0.45
    return {
        "text": f"{value:.1f}",
        "style": f"background:{to_hex(colour)};color:{'#000' if light else '#fff'}",
    }


def _task(row: Mapping[str, Any]) -> list[str]:
    def shown(key: str, form: Any) -> str:
        return "–" if row[key] is None else form(row[key])

    return [
        row["task"],
        shown("family", str),
        shown("vocabulary", str),
        shown("steps", "{:,}".format),
        shown("tokens", "{:,}".format),
        shown("train_seconds", format_seconds),
        shown("eval_seconds", format_seconds),
        shown("adapter_bytes", format_bytes),
        shown("memory_bytes", format_bytes),
        shown("router_accuracy", "{:.1f}".format),
    ]
