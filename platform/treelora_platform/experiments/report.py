"""The report of an experiment: one HTML file that needs nothing else, and says no more than its runs carry."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from treelora.data.files import write_bytes_atomically
from treelora.errors import TreeLoRAError
from treelora_platform.experiments.analysis import ExperimentComparison
from treelora_platform.experiments.details import Details
from treelora_platform.experiments.findings import HOW_TO_READ, findings
from treelora_platform.experiments.records import RunRecord
from treelora_platform.experiments.report_runs import making_section, runs_section
from treelora_platform.experiments.report_scores import SCORE_SECTIONS
from treelora_platform.experiments.report_search import inside_section, search_section
from treelora_platform.experiments.view import View, plural, view_of
from treelora_platform.page import own_script, render_page
from treelora_platform.summary import format_seconds

if TYPE_CHECKING:
    from treelora_platform.tracking_query import History

TEMPLATE, SCRIPT = "experiment.html.j2", "tables.js.j2"
REMARKS = 5  # about artifacts; a server that is down would fill the page


def write_experiment_report(
    comparison: ExperimentComparison, history: History, out: Path, filters: Sequence[str] = ()
) -> Path:
    """Write the page and return its place.

    Curves and artifacts are fetched from MLflow while it is written, of so many runs as the figures show. What can't
    be had is left out, and the page says so. The same runs give the same bytes.

    Args:
        comparison: What is shown.
        history: MLflow, or whatever reads like it.
        out: The file.
        filters: The conditions by which the runs were chosen, for the head of the page.
    """
    with tempfile.TemporaryDirectory(prefix="treelora-report-") as folder:
        view = view_of(comparison, Details(history, Path(folder)))
        comparison = view.comparison
        made = [make(view) for make in (*SCORE_SECTIONS, search_section)]
        inside, looked_into = inside_section(view)
        sections = [section for section in (*made, inside) if section is not None]
        sections += [runs_section(view, _others(view, history), looked_into), making_section(view)]
    page = render_page(
        TEMPLATE,
        title=comparison.experiment,
        subtitle=_subtitle(comparison),
        facts=_facts(view, filters),
        findings=findings(comparison, view.modes),
        how_to_read=HOW_TO_READ if comparison.differences else "",
        remarks=[*comparison.remarks, *_short(view.details.remarks)],
        sections=sections,
        **own_script(SCRIPT),
    )
    write_bytes_atomically(out, page)
    return out


def _others(view: View, history: History) -> list[RunRecord]:
    """The experiment's runs that are not compared."""
    compared = {run.run_id for run in view.comparison.records}
    try:
        return [run for run in history.runs(view.comparison.experiment) if run.run_id not in compared]
    except TreeLoRAError as error:
        view.details.remarks.append(f"the runs that are not compared could not be listed ({error})")
        return []


def _subtitle(comparison: ExperimentComparison) -> str:
    tasks = max(len(run.tasks) for run in comparison.records)
    groups = f"{plural(len(comparison.groups), 'group')} by {', '.join(comparison.by)}"
    stream = f", learning {plural(tasks, 'task')} one after another" if tasks else ""
    return f"{plural(len(comparison.records), 'run')} in {groups}{stream}"


def _facts(view: View, filters: Sequence[str]) -> list[tuple[str, str]]:
    records = view.comparison.records
    orders = {run.tasks for run in records}
    tasks = sorted({task for order in orders for task in order})
    seconds = [run.seconds for run in records if run.seconds is not None]
    sweeps = sorted({run.sweep for run in records if run.sweep})
    seeds = {run.seed for run in records}
    found = {
        "orders": str(len(orders)),
        "seeds": str(len(seeds)),
        "inference": ", ".join(view.modes),
        "reference": view.comparison.reference,
        "only runs with": ", ".join(filters),
        "sweep": ", ".join(sweeps),
        "training in all": format_seconds(sum(seconds)) if seconds else None,
        "made": _period(records),
        "tasks": ", ".join(tasks[:8]) + (", ..." if len(tasks) > 8 else ""),
    }
    return [(label, value) for label, value in found.items() if value]


def _period(records: Sequence[RunRecord]) -> str:
    ends = [run.end_unix_ms or run.start_unix_ms for run in records]
    first, last = (
        datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d")
        for ms in (min(run.start_unix_ms for run in records), max(ends))
    )
    return first if first == last else f"{first} to {last}"


def _short(remarks: Sequence[str]) -> list[str]:
    """Not shown, and why; many in a few lines."""
    lines = [f"Not shown: {remark}" for remark in remarks[:REMARKS]]
    return [*lines, f"... and {len(remarks) - REMARKS} more"] if len(remarks) > REMARKS else lines
