"""The results of `treelora chaos` for people and for programs: a table, JSON, and Parquet."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_platform.provenance import versions

if TYPE_CHECKING:
    from rich.console import Console

    from treelora_platform.chaos.harness import Outcome, Plan

FAULTS = "faults.parquet"


def write_results(path: Path, plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """Write all to a JSON file, and a row for each fault to `faults.parquet` beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = {
        "seed": plan.seed,
        "schedules": plan.schedules,
        "faults": plan.faults,
        "kinds": list(plan.kinds),
        "config_hash": plan.config.digest(),
        "versions": versions(),
        "summary": summary(outcomes),
        "outcomes": [_plain(outcome) for outcome in outcomes],
    }
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    os.replace(scratch, path)
    rows = [row for outcome in outcomes for row in fault_rows(outcome)]
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), path.with_name(FAULTS))


def fault_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """One row a fault, those that found nothing to hit too."""
    struck = [
        {
            "schedule": outcome.name,
            "kind": hit.fault.kind,
            "moment": hit.fault.moment,
            "where": hit.fault.where(outcome.outline),
            "injected": True,
            "exact": hit.exact,
            "time_unix_ms": round(1000 * hit.time),
            "at_step": cost.at_step,
            "steps_lost": cost.steps_lost,
            "recovery_s": cost.seconds,
            "survived": outcome.survived,
        }
        for hit, cost in zip(outcome.story.hits, outcome.costs, strict=True)
    ]
    missed = [
        {"schedule": outcome.name, "kind": fault.kind, "moment": fault.moment, "where": fault.where(outcome.outline)}
        | {"injected": False, "survived": outcome.survived}
        for fault in outcome.story.missed
    ]
    return struck + missed


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts over all schedules; recovery in s, of all but the MLflow server's ends: nobody waits for it."""
    rows = [row for outcome in outcomes for row in fault_rows(outcome)]
    struck = [row for row in rows if row["injected"]]
    seconds = [row["recovery_s"] for row in struck if row["recovery_s"] is not None and row["kind"] != "mlflow"]
    return {
        "schedules": len(outcomes),
        "survived": sum(outcome.survived for outcome in outcomes),
        "faults": len(struck),
        "missed": len(rows) - len(struck),
        "steps_lost": sum(outcome.steps_again for outcome in outcomes),
        "recovery_median_s": statistics.median(seconds) if seconds else None,
        "recovery_max_s": max(seconds, default=None),
    }


def show_results(outcomes: Sequence[Outcome], console: Console) -> None:
    """A row for each fault, with global steps done and steps lost; and the sum."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("no.", "fault", "when"):
        table.add_column(name)
    for name in ("step", "lost", "back in"):
        table.add_column(name, justify="right")
    table.add_column("survived")
    for outcome in outcomes:
        name, said = outcome.name.removeprefix("schedule-"), "[green]yes[/]" if outcome.survived else "[red]no[/]"
        for number, row in enumerate(fault_rows(outcome)):
            first = (name, said) if not number else ("", "")
            table.add_row(first[0], row["kind"], *_cells(row), first[1])
        if not outcome.drawn:
            table.add_row(name, "none", "", "", "", "", said)
    console.print(table)
    found = summary(outcomes)
    line = f"{found['survived']} of {found['schedules']} schedules survived, {found['faults']} faults"
    line += f" ({found['missed']} more found nothing to hit)" if found["missed"] else ""
    line += f", {found['steps_lost']} steps made again"
    if found["recovery_median_s"] is not None:
        line += f", recovered in {found['recovery_median_s']:.1f} s (median), {found['recovery_max_s']:.1f} s (most)"
    console.print(line, highlight=False)


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    if not row["injected"]:
        return row["where"], "", "", "nothing to hit"
    seconds = row["recovery_s"]
    return (
        row["where"] + ("" if row["exact"] else ", just after"),
        str(row["at_step"]),
        str(row["steps_lost"]),
        "" if seconds is None else f"{seconds:.1f} s",
    )


def _plain(outcome: Outcome) -> dict[str, Any]:
    story = outcome.story
    return {
        "name": outcome.name,
        "survived": outcome.survived,
        "reasons": list(outcome.reasons),
        "seconds": story.seconds,
        "steps_again": outcome.steps_again,
        "tracked_later": story.tracked_later,
        "drawn": [asdict(fault) for fault in outcome.drawn],
        "faults": fault_rows(outcome),
        "commands": [asdict(command) for command in story.commands],
    }


def _schema() -> Any:
    import pyarrow as pa

    text = {name: pa.string() for name in ("schedule", "kind", "moment", "where")}
    rest = {
        "injected": pa.bool_(),
        "exact": pa.bool_(),
        "time_unix_ms": pa.int64(),
        "at_step": pa.int64(),
        "steps_lost": pa.int64(),
        "recovery_s": pa.float64(),
        "survived": pa.bool_(),
    }
    return pa.schema([pa.field(name, kind) for name, kind in {**text, **rest}.items()])
