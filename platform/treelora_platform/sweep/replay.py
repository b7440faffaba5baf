"""Sending a whole sweep to an MLflow server that was away while it ran."""

from __future__ import annotations

from pathlib import Path

from treelora_platform.sweep.journal import Journal
from treelora_platform.tracking import FinishReport, adopt_runs, replay
from treelora_platform.tracking_state import State

SPEC_JSON = "sweep.json"


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's, not a run's."""
    return (folder / SPEC_JSON).exists()


def replay_sweep(folder: Path, tracking_uri: str | None = None) -> list[FinishReport]:
    """Send all that the server lacks of the sweep and of its trials, and make these its children.

    Returns:
        A report for the sweep, then one for each trial that began. Repeating it changes nothing.

    Raises:
        DataError: a trial's memory of what was sent, or the journal, is damaged.
    """
    reports = [replay(folder, tracking_uri)]
    runs = [folder / "runs" / name for name in Journal(folder / "trials.jsonl").latest()]
    reports += [replay(run, tracking_uri) for run in runs if State.load(run).plan]
    parent, children = reports[0].run_id, [report.run_id for report in reports[1:] if report.run_id]
    address = tracking_uri or State.load(folder).tracking_uri
    if parent and address:
        adopt_runs(address, parent, children)
    return reports
