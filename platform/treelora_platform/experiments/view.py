"""What all sections of an experiment's report share: ways of inference, groups, and how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from treelora_platform.experiments.analysis import ExperimentComparison, modes_of, score_of
from treelora_platform.experiments.details import Details
from treelora_platform.experiments.figures import Look, looks
from treelora_platform.experiments.groups import Group
from treelora_platform.experiments.records import RunRecord
from treelora_platform.page import Cell, Download, Row, Table, csv_download
from treelora_platform.sheets import Sheet, records_table

DRAWN = 8  # groups that lines and colours can still tell apart
LISTED = 24  # groups in a figure with a line each


@dataclass(frozen=True)
class View:
    """An experiment, and what of it is drawn.

    `modes`: ways of inference, the first the one that most runs were scored in. `ranked`: groups by mean OP in that
    one, the best first, then those without. `look`: of the groups that have colours of their own. `anchors`: the
    place of each group in the page, by label, and of each run, by id.
    """

    comparison: ExperimentComparison
    details: Details
    modes: tuple[str, ...]
    ranked: tuple[Group, ...]
    look: dict[str, Look]
    anchors: dict[str, str]

    @property
    def mode(self) -> str:
        """The way of inference that figures of one are about."""
        return self.modes[0]

    @property
    def drawn(self) -> list[Group]:
        """Groups that have colours, the best first."""
        return [group for group in self.ranked if group.label in self.look]

    def listed(self, limit: int = LISTED) -> list[Group]:
        """The best groups, and the reference whatever its place."""
        return _leading(self.ranked, self.comparison.reference, limit)


def shortened(comparison: ExperimentComparison) -> ExperimentComparison:
    """With the fields' last names in the groups' labels, `rank=8` for `lora.rank=8`, if that leaves all apart."""
    fields = ["" if key == "method" else f"{key.rpartition('.')[2]}=" for key in comparison.by]
    short = {
        group.label: ", ".join(f"{f}{v}" for f, v in zip(fields, group.values, strict=True) if v is not None)
        for group in comparison.groups
    }
    if len({*fields}) < len(fields) or len({*short.values()}) < len(short):
        return comparison
    reference = comparison.reference
    return replace(
        comparison,
        groups=tuple(replace(one, label=short[one.label]) for one in comparison.groups),
        standings=tuple(replace(one, group=short[one.group]) for one in comparison.standings),
        differences=tuple(
            replace(one, group=short[one.group], reference=short[one.reference]) for one in comparison.differences
        ),
        common=tuple(replace(one, group=short.get(one.group, one.group)) for one in comparison.common),
        reference=None if reference is None else short[reference],
    )


def view_of(comparison: ExperimentComparison, details: Details) -> View:
    """Choose what is drawn; groups are called by short names."""
    comparison = shortened(comparison)
    found = modes_of(comparison.groups)
    scored = {mode: sum(score_of(run, mode, "op") is not None for run in comparison.records) for mode in found}
    # of equals `last`, the paper's own way of inference
    modes = sorted(found, key=lambda mode: (-scored[mode], mode != "last", mode))
    means = {group.label: _mean_op(group, modes[0]) for group in comparison.groups}
    ranked = sorted(comparison.groups, key=lambda group: -means[group.label])
    labels = [group.label for group in _leading(ranked, comparison.reference, DRAWN)]
    anchors = {run.run_id: f"run-{place}" for place, run in enumerate(comparison.records)}
    anchors |= {group.label: f"group-{place}" for place, group in enumerate(comparison.groups)}
    return View(comparison, details, tuple(modes), tuple(ranked), looks(labels), anchors)


def scores_in(group: Group, mode: str, metric: str) -> list[float]:
    """What was measured of a score or a cost, in the order of the runs."""
    values = (score_of(run, mode, metric) for run in group.runs)
    return [value for value in values if value is not None]


def best_run(runs: Sequence[RunRecord], mode: str) -> RunRecord:
    """The one with the highest OP, the first of equals."""
    return max(runs, key=lambda run: -1e9 if (op := score_of(run, mode, "op")) is None else op)


def plural(count: int, word: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def table_of(sheet: Sheet, title: str, view: View | None = None, *, anchors: bool = False) -> Table:
    """A sheet as a table of the page; `view` makes links of the groups' names, or with `anchors` the links' targets."""
    rows: list[Row] = []
    gap, records, seen = False, iter(sheet.records), set()
    for cells in sheet.cells:
        if not cells:
            gap = True
            continue
        record = next(records)
        anchor = view.anchors[record.group] if view is not None else None
        known = anchor in seen
        seen.add(anchor)
        first = Cell(cells[0], href=f"#{anchor}" if anchor and not anchors else None)
        rows.append(Row([first, *map(Cell, cells[1:])], anchor if anchors and not known else None, gap))
        gap = False
    return Table(title, sheet.columns, rows, sheet_download(sheet), sheet.notes, sheet.texts)


def sheet_download(sheet: Sheet) -> Download:
    """The numbers behind a sheet."""
    table = records_table(sheet)
    return csv_download(sheet.name, table.column_names, zip(*table.to_pydict().values(), strict=True))


def _leading(ranked: Sequence[Group], reference: str | None, limit: int) -> list[Group]:
    chosen = list(ranked[:limit])
    if reference is not None and all(group.label != reference for group in chosen):
        chosen[-1:] = [group for group in ranked if group.label == reference]
    return chosen


def _mean_op(group: Group, mode: str) -> float:
    values = scores_in(group, mode, "op")
    return float(np.mean(values)) if values else -1e9
