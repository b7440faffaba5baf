"""What came of a sweep: its trials in order of merit, the Pareto set, and the next commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from treelora.data.files import write_bytes_atomically
from treelora_platform.sheets import Sheet, markdown, render, write_sheets
from treelora_platform.summary import NOT_MEASURED, format_bytes, format_number, format_seconds
from treelora_platform.sweep.journal import Entry
from treelora_platform.sweep.progress import show
from treelora_platform.sweep.spec import BETTER, Score, SweepSpec

Scores = Mapping[str, float | None]
HEADS = {"op": "OP", "bwt": "BWT", "seconds": "training", "tokens_per_second": "tokens/s", "stored_bytes": "stored"}
SAID = {"begun": "unfinished", "done": "done", "stopped": "stopped early", "failed": "failed"}


def dominates(one: Scores, other: Scores, better: Mapping[Score, str]) -> bool:
    """Whether one is at least as good in everything and better in something; what wasn't measured can't be."""
    pairs = [(one.get(name), other.get(name), direction) for name, direction in better.items()]
    if any(mine is None for mine, _, _ in pairs):
        return False
    signed = [(m if d == "max" else -m, t if t is None or d == "max" else -t) for m, t, d in pairs if m is not None]
    at_least = all(theirs is None or mine >= theirs for mine, theirs in signed)
    return at_least and any(theirs is None or mine > theirs for mine, theirs in signed)


def pareto(entries: Sequence[Entry], better: Mapping[Score, str]) -> list[Entry]:
    """The finished trials that no other finished one dominates; of equal ones, all."""
    ended = [entry for entry in entries if entry.status == "done"]
    measured = [entry for entry in ended if all(entry.scores.get(name) is not None for name in better)]
    return [one for one in measured if not any(dominates(other.scores, one.scores, better) for other in measured)]


def ranked(spec: SweepSpec, entries: Sequence[Entry]) -> list[Entry]:
    """The best by the first objective first; then those that were stopped, the later the better; then failures."""
    sign = -1.0 if spec.objectives[spec.primary] == "max" else 1.0
    order = {"done": 0, "stopped": 1, "begun": 2, "failed": 3}

    def key(entry: Entry) -> tuple[int, int, float]:
        score = entry.scores.get(spec.primary)
        return order[entry.status], -entry.tasks, float("inf") if score is None else sign * score

    return sorted(entries, key=key)


def trials_sheet(spec: SweepSpec, entries: Sequence[Entry]) -> Sheet:
    """A row a trial."""
    front = {entry.run for entry in pareto(entries, spec.objectives)}
    shown = list(dict.fromkeys([*spec.objectives, "op", "bwt", "seconds"]))
    cells, records = [], []
    for entry in ranked(spec, entries):
        values = [show(entry.values[key]) for key in spec.space]
        scores = [_format(name, entry.scores.get(name)) for name in shown]
        mark = "*" if entry.run in front else ""
        cells.append((short_name(entry.run), *values, str(entry.tasks), *scores, mark, SAID[entry.status]))
        records.append(
            {
                "run": entry.run,
                **{key: show(entry.values[key]) for key in spec.space},
                "tasks": entry.tasks,
                **{name: entry.scores.get(name) for name in BETTER},
                "pareto": entry.run in front,
                "status": entry.status,
                "mlflow_run_id": entry.mlflow_run_id,
                "message": entry.message,
            }
        )
    ways = {"max": "larger", "min": "smaller"}
    said = " and ".join(f"{HEADS[name]} ({ways[way]})" for name, way in spec.objectives.items())
    notes = [f"* Pareto set: no other finished trial is as good in {said} and better in one."]
    if any(entry.status == "stopped" for entry in entries):
        notes.append("Scores of trials that were stopped early are of fewer tasks: not comparable with the others.")
    notes += [f"{short_name(entry.run)}: {entry.message}" for entry in entries if entry.status == "failed"]
    columns = ("trial", *(key.split(".")[-1] for key in spec.space), "tasks", *(HEADS[n] for n in shown), "", "")
    return Sheet("trials", f"Sweep {spec.name}", columns, tuple(cells), records, tuple(notes), 1 + len(spec.space))


def write_sweep(spec: SweepSpec, entries: Sequence[Entry], folder: Path) -> list[Path]:
    """Write the table as Parquet, CSV and Markdown; returns what belongs into MLflow."""
    sheet = trials_sheet(spec, entries)
    page = folder / "trials.md"
    write_bytes_atomically(page, markdown([sheet], f"Sweep {spec.name}").encode())
    return [*write_sheets(folder, [sheet]), page, folder / "sweep.json", folder / "trials.jsonl"]


def show_sweep(spec: SweepSpec, entries: Sequence[Entry], folder: Path, console: Console) -> None:
    """The table, and what to do next."""
    if not entries:
        return
    console.print(render(trials_sheet(spec, entries)))
    best = ranked(spec, entries)[0]
    console.print(f"folder: {folder}", highlight=False)
    if best.status == "done":
        run = escape(str(folder / "runs" / best.run))
        console.print(f"best {HEADS[spec.primary]}: treelora show {run}", highlight=False)


def short_name(run: str) -> str:
    """The first eight digits of the digest that a trial's run is named by."""
    return run.rpartition("-")[2][:8]


def _format(name: str, value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if name == "seconds":
        return format_seconds(value)
    return format_bytes(value) if name == "stored_bytes" else format_number(value)
