"""Two runs side by side, from MLflow or from their folders: the difference of their configurations first."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from treelora.data.files import write_bytes_atomically
from treelora.data.names import slugify
from treelora.errors import DataError
from treelora_platform.experiments.fields import IDLE
from treelora_platform.experiments.records import METHOD_SECTIONS, ModeScores, RunRecord
from treelora_platform.run_tables import read_config_yaml, read_run_json, read_scores
from treelora_platform.sheets import Cells, Sheet, markdown, render, write_sheets
from treelora_platform.summary import (
    NOT_MEASURED,
    format_bytes,
    format_number,
    format_seconds,
    summarise,
)
from treelora_platform.tracking_state import loggable_params

if TYPE_CHECKING:
    from treelora_platform.tracking_query import History

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("training time", format_seconds),
    "tokens": ("tokens trained on", lambda value: f"{value:,.0f}"),
    "tokens_per_second": ("tokens per second", format_number),
    "stored_bytes": ("stored", format_bytes),
}


@dataclass(frozen=True)
class Side:
    """One of the two runs; None where something isn't known."""

    name: str
    origin: str
    """Folder, or MLflow's id and the state of the run."""
    method: str
    config: Mapping[str, str]
    tasks: tuple[str, ...]
    scores: Mapping[str, ModeScores]
    task_scores: Mapping[str, Mapping[str, float]]
    costs: Mapping[str, float | None]
    folder: Path | None


def is_run_folder(target: str) -> bool:
    """Whether a run lies there."""
    return any((Path(target) / name).is_file() for name in ("run.json", "config.yaml"))


def compare_two(history: History | None, a: str, b: str, out: Path, console: Console, html: bool = True) -> Path:
    """Show two runs beside each other and write tables, `comparison.md` and, of both runs' artifacts, `report.html`.

    Args:
        history: MLflow; None will do for two folders.
        a: The first run: its folder, its MLflow id, or its name, of which the newest finished one is taken.
        b: The second run.
        out: Folder for the files.
        console: Where the tables are printed.
        html: Whether to write the report.

    Returns:
        The report, or else `comparison.md`.

    Raises:
        DataError: there is no such run, or it is damaged.
        TrackingError: the server can't be reached.
    """
    with tempfile.TemporaryDirectory(prefix="treelora-compare-") as scratch:
        sides = tuple(_side(history, target, Path(scratch) / str(i)) for i, target in enumerate((a, b)))
        one, two = _told_apart(*sides)
        sheets = [sheet for sheet in _sheets(one, two) if sheet.cells]
        remarks = _remarks(one, two)
        if "configuration" not in {sheet.name for sheet in sheets}:
            remarks.append("The configurations don't differ in anything that can matter.")
        for remark in remarks:
            console.print(f"- {remark}", markup=False, highlight=False)
        for sheet in sheets:
            console.print(render(sheet))
        page = out / "comparison.md"
        out.mkdir(parents=True, exist_ok=True)
        write_sheets(out, sheets)
        write_bytes_atomically(page, markdown(sheets, f"{one.name} against {two.name}", remarks).encode())
        if html and one.folder and two.folder:
            from treelora_platform.report import write_report

            page = write_report(one.folder, out / "report.html", two.folder)
    console.print(f"wrote {page}", highlight=False)
    return page


def _side(history: History | None, target: str, scratch: Path) -> Side:
    if is_run_folder(target):
        return _from_folder(Path(target), target)
    if history is None:
        raise DataError(f"{target}: no run is there (no run.json)")
    record = history.run(target) if _RUN_ID.fullmatch(target) else _newest(history, target)
    if record.is_sweep:
        raise DataError(f"{record.name} is a sweep, not one run; give two of its trials")
    folder = history.download(record.run_id, scratch)
    if is_run_folder(str(folder)) and read_scores(folder).num_rows:
        found = _from_folder(folder, f"MLflow run {record.run_id}, {record.status}")
        return replace(found, name=record.name)
    return Side(
        name=record.name,
        origin=f"MLflow run {record.run_id}, {record.status}, without artifacts",
        method=record.method,
        config=record.params,
        tasks=record.tasks,
        scores=record.scores,
        task_scores=record.task_scores,
        costs={key: getattr(record, key) for key in _COSTS},
        folder=None,
    )


def _newest(history: History, name: str) -> RunRecord:
    found = history.named(name)
    if not found:
        raise DataError(f"{name!r} is neither the folder nor the MLflow id nor the name of a run in {history.shown}")
    return next((run for run in found if run.finished), found[0])


def _from_folder(folder: Path, origin: str) -> Side:
    summary, record = summarise(folder), read_run_json(folder)
    newest: dict[str, dict[str, tuple[int, float]]] = {}
    for row in read_scores(folder).to_pylist():
        mine = newest.setdefault(row["mode"], {})
        before = mine.get(slugify(row["task"]), (-2, 0.0))
        mine[slugify(row["task"])] = max(before, (row["after_index"], row["score"]), key=lambda pair: pair[0])
    return Side(
        name=summary.name,
        origin=origin,
        method=summary.method,
        config=loggable_params(read_config_yaml(folder)),
        tasks=tuple(map(str, record.get("tasks", ()))) or summary.tasks,
        scores={mode: ModeScores(s.op, s.bwt, s.fwt) for mode, s in summary.modes.items()},
        task_scores={mode: {task: score for task, (_, score) in own.items()} for mode, own in newest.items()},
        costs={key: getattr(summary, key) for key in _COSTS},
        folder=folder,
    )


def _told_apart(one: Side, two: Side) -> tuple[Side, Side]:
    if one.name != two.name:
        return one, two
    return replace(one, name=f"{one.name} #1"), replace(two, name=f"{two.name} #2")


def _sheets(one: Side, two: Side) -> list[Sheet]:
    return [_configuration(one, two), _numbers(one, two), _tasks(one, two)]


def _configuration(one: Side, two: Side) -> Sheet:
    """Fields that differ and can matter; a field that its run's method doesn't use says so."""
    rows = []
    for key in sorted(one.config.keys() | two.config.keys()):
        section = key.partition(".")[0]
        values = [side.config.get(key, NOT_MEASURED) for side in (one, two)]
        unused = [section in METHOD_SECTIONS and section != side.method for side in (one, two)]
        if values[0] == values[1] or {key, section} & (IDLE - {"stream.order"}) or all(unused):
            continue
        shown = ["not used" if idle else value for value, idle in zip(values, unused, strict=True)]
        rows.append((key, *shown))
    return Sheet(
        "configuration",
        "What differs in the configuration",
        ("field", one.name, two.name),
        tuple(rows),
        [{"field": key, "first": first, "second": second} for key, first, second in rows],
        texts=3,
    )


def _numbers(one: Side, two: Side) -> Sheet:
    """Scores with their difference, and costs with their change in percent."""
    cells: list[Cells] = []
    records: list[dict[str, object]] = []

    def add(label: str, a: float | None, b: float | None, show: Callable[[float], str], share: bool) -> None:
        if a is None and b is None:
            return
        change = NOT_MEASURED
        if a is not None and b is not None and (a or not share):
            change = f"{b / a - 1:+.0%}" if share else f"{b - a:+.2f}"
        cells.append((label, *(NOT_MEASURED if value is None else show(value) for value in (a, b)), change))
        records.append({"number": label, "first": a, "second": b})

    for mode in dict.fromkeys([*one.scores, *two.scores]):
        a, b = (side.scores.get(mode, ModeScores()) for side in (one, two))
        add(f"OP {mode} (%)", a.op, b.op, format_number, share=False)
        add(f"BWT {mode} (points)", a.bwt, b.bwt, format_number, share=False)
        add(f"FWT {mode} (points)", a.fwt, b.fwt, format_number, share=False)
    for key, (label, show) in _COSTS.items():
        add(label, one.costs[key], two.costs[key], show, share=True)
    return Sheet(
        "numbers", "Numbers", ("", one.name, two.name, "second less first"), tuple(cells), records,
        ("OP, FWT: larger is better; BWT: what was forgotten, smaller is better",),
    )  # fmt: skip


def _tasks(one: Side, two: Side) -> Sheet:
    """Last scores of the tasks that both have."""
    names = {slugify(name): name for side in (one, two) for name in side.tasks}
    rows = [
        (names.get(task, task), mode, one.task_scores[mode][task], two.task_scores[mode][task])
        for mode in one.task_scores
        for task in one.task_scores[mode]
        if task in two.task_scores.get(mode, {})
    ]
    return Sheet(
        "tasks",
        "Last scores of the tasks that both have (%)",
        ("task", "inference", one.name, two.name, "second less first"),
        tuple((task, mode, f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}") for task, mode, a, b in rows),
        [{"task": task, "mode": mode, "first": a, "second": b} for task, mode, a, b in rows],
        texts=2,
    )


def _remarks(one: Side, two: Side) -> list[str]:
    remarks = [f"{side.name}: {side.origin}" for side in (one, two)]
    mine, theirs = set(one.tasks), set(two.tasks)
    if mine != theirs:
        both = ", ".join(task for task in one.tasks if task in theirs)
        only = [
            f"only {side.name} has {', '.join(task for task in side.tasks if task not in other)}"
            for side, other in ((one, theirs), (two, mine))
            if set(side.tasks) - other
        ]
        still = f"comparable are the last scores of {both}" if both else "none is in both"
        remarks.append(f"The tasks differ, so OP and BWT are of different tasks: {'; '.join(only)}; {still}.")
    elif one.tasks != two.tasks:
        remarks.append(f"The order of the tasks differs: {', '.join(one.tasks)} against {', '.join(two.tasks)}.")
    remarks += [f"No report: {side.name} has no artifacts." for side in (one, two) if side.folder is None]
    return remarks
