"""Sections of an experiment's report that list: all runs, and what they were made with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from treelora_platform.experiments.analysis import score_of
from treelora_platform.experiments.importance import shown
from treelora_platform.experiments.records import RunRecord
from treelora_platform.experiments.view import View
from treelora_platform.page import Cell, Part, Row, Section, Table, csv_download
from treelora_platform.redaction import HIDDEN, hide_credentials, is_secret
from treelora_platform.summary import NOT_MEASURED, format_seconds

NAMES = {"op": "OP", "bwt": "BWT"}
MAKING = ("stream", "data_hash", "version.", "treelora.sweep")
VALUES = 6


def runs_section(view: View, others: Sequence[RunRecord], inside: Mapping[str, str]) -> Section:
    """Every run, those that are compared first.

    Args:
        view: The experiment.
        others: Runs of the experiment that are not compared.
        inside: Anchors of the runs that the page looks into, by run id.
    """
    group_of = {run.run_id: group.label for group in view.comparison.groups for run in group.runs}
    orders = list(dict.fromkeys(run.tasks for run in (*view.comparison.records, *others)))
    scores = [(metric, mode) for metric in NAMES for mode in view.modes]
    columns = [
        "run",
        "id",
        "group",
        "status",
        "seed",
        "order",
        *(f"{NAMES[m]} {mode}" for m, mode in scores),
        "training",
    ]
    rows, plain = [], []
    for place, run in enumerate((*view.comparison.records, *others)):
        label = group_of.get(run.run_id)
        values = [score_of(run, mode, metric) for metric, mode in scores]
        order = orders.index(run.tasks) + 1
        group = Cell("not compared") if label is None else Cell(label, href=f"#{view.anchors[label]}")
        rows.append(
            Row(
                [
                    Cell(run.name, href=f"#{inside[run.run_id]}" if run.run_id in inside else None),
                    Cell(run.run_id[:8]),
                    group,
                    Cell(run.status.lower()),
                    _number(run.seed, "{:d}"),
                    _number(order if run.tasks else None, "{:d}"),
                    *(_number(value, "{:.1f}") for value in values),
                    Cell(NOT_MEASURED, "") if run.seconds is None else Cell(format_seconds(run.seconds), run.seconds),
                ],
                f"run-{place}",
            )
        )
        plain.append((run.name, run.run_id, label, run.status, run.seed, ", ".join(run.tasks), *values, run.seconds))
    table = Table(
        "All runs",
        columns,
        rows,
        csv_download("runs", [*columns[:-1], "training (s)"], plain),
        (
            "OP in percent, BWT in points",
            *(f"order {i}: {', '.join(tasks)}" for i, tasks in enumerate(orders[:VALUES], start=1) if tasks),
        ),
        texts=4,
        sortable=True,
    )
    lead = "A group leads to its mean, the name of a run that was looked into to its tree."
    return Section("runs", "All runs", [Part(tables=[table])], lead)


def _number(value: float | None, form: str) -> Cell:
    return Cell(NOT_MEASURED, "") if value is None else Cell(form.format(value), value)


def making_section(view: View) -> Section:
    """Versions, data, and the settings that all runs share."""
    records = view.comparison.records
    tags = sorted({key for run in records for key in run.tags if key.startswith(MAKING)})
    keys = sorted({key for run in records for key in run.params if not key.startswith("sweep.")})
    shared = [
        (key, HIDDEN if is_secret(key) else hide_credentials(records[0].params[key]))
        for key in keys
        if len({run.params.get(key) for run in records}) == 1
    ]
    made = [(key, Counter(run.tags.get(key) for run in records)) for key in tags]
    versions = Table(
        "Made with",
        ("what", "values (runs)"),
        [Row([Cell(key), Cell(_counted(values))]) for key, values in made],
        csv_download(
            "made-with", ("what", "value", "runs"), [(k, v, n) for k, found in made for v, n in found.items()]
        ),
        texts=2,
        wrap=True,
    )
    settings = Table(
        "Settings that all runs share",
        ("setting", "value"),
        [Row([Cell(key), Cell(value)]) for key, value in shared],
        csv_download("settings", ("setting", "value"), shared),
        texts=2,
        wrap=True,
    )
    tables = [("Versions and data", versions), ("Settings that all runs share", settings)]
    return Section("making", "Provenance", [Part(title, tables=[table]) for title, table in tables if table.rows])


def _counted(found: Counter[str | None]) -> str:
    texts = [f"{shown(value, 60)} ({count})" for value, count in found.most_common(VALUES)]
    return ", ".join(texts) + (f" and {len(found) - VALUES} more" if len(found) > VALUES else "")
