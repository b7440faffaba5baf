"""Sections of an experiment's report about scores: standings, differences, the stream, matrices, time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from treelora_platform.experiments.analysis import Difference, mean_of, score_of
from treelora_platform.experiments.details import CURVE_RUNS, MATRIX_RUNS, Matrix
from treelora_platform.experiments.figures import (
    Cost,
    Dots,
    Shift,
    cost_figure,
    differences_figure,
    matrices_figure,
    standings_figure,
    stream_figure,
)
from treelora_platform.experiments.findings import beyond_chance
from treelora_platform.experiments.tables import common_sheet, differences_sheet, standings_sheet
from treelora_platform.experiments.view import LISTED, View, plural, scores_in, table_of
from treelora_platform.page import Chart, Part, Section, chart

BEST = 6  # matrices


def standings_section(view: View) -> Section:
    """Means by group, as dots and as a table."""
    groups = view.listed()
    charts = []
    for mode in view.modes:
        op, bwt = ({group.label: _dots(scores_in(group, mode, metric)) for group in groups} for metric in ("op", "bwt"))
        known = [label for label in op if op[label].runs]
        figure = standings_figure({k: op[k] for k in known}, {k: bwt[k] for k in known}, view.look)
        caption = f"Inference {mode}. Marks: means with 95 % bootstrap intervals; strokes: single runs."
        if len(view.ranked) > len(groups):
            caption += f" The {LISTED} best of {len(view.ranked)} groups, and the reference."
        charts.append(chart(figure, f"standings-{view.modes.index(mode)}", caption))
    table = table_of(standings_sheet(view.comparison), "Standings", view, anchors=True)
    return Section("standings", "Standings", [Part(charts=charts, tables=[table])])


def differences_section(view: View) -> Section | None:
    """Paired differences from the reference."""
    comparison = view.comparison
    if not comparison.differences or comparison.reference is None:
        return None
    labels = [group.label for group in view.listed()]
    charts = []
    for mode in view.modes:
        found = {(one.group, one.metric): one for one in comparison.differences if one.mode == mode}
        op, bwt = ([_shift(found[label, m]) for label in labels if (label, m) in found] for m in ("op", "bwt"))
        if op:
            caption = (
                f"Inference {mode}, against {comparison.reference}. Means of paired differences with 95 % t intervals; "
                "filled: beyond chance."
            )
            figure = differences_figure(op, bwt)
            charts.append(chart(figure, f"differences-{view.modes.index(mode)}", caption))
    lead = f"All against {comparison.reference}. Runs are paired, so that what order and seed do to both cancels out."
    table = table_of(differences_sheet(comparison), "Differences", view)
    return Section("differences", "Differences", [Part(charts=charts, tables=[table])], lead)


def common_section(view: View) -> Section | None:
    """Where runs are on different tasks: what can still be compared."""
    if not view.comparison.common:
        return None
    table = table_of(common_sheet(view.comparison), "Scores on common tasks")
    lead = "Some runs learnt other tasks, and are not in the rest of this page. All are judged here on what they share."
    return Section("common", "Common tasks", [Part(tables=[table])], lead)


def stream_section(view: View) -> Section | None:
    """OP and BWT over tasks."""
    charts = []
    for mode in view.modes:
        curves = {
            metric: {group.label: view.details.curves(group.runs, metric, mode) for group in view.drawn}
            for metric in ("op", "bwt")
        }
        known = [label for label, found in curves["op"].items() if found]
        if not known:
            continue
        op, bwt = ({label: curves[metric][label] for label in known} for metric in ("op", "bwt"))
        caption = f"Inference {mode}. Means with 95 % bootstrap intervals; thin lines: single runs." + _sample(view)
        charts.append(chart(stream_figure(op, bwt, view.look), f"stream-{view.modes.index(mode)}", caption))
    if not charts:
        return None
    lead = "After each task: the mean score of all tasks learnt so far, and how much of the old ones was lost."
    return Section("stream", "Along the stream", [Part(charts=charts)], lead)


def _sample(view: View) -> str:
    """What is left out of a figure of curves."""
    cut = [f"{group.label} {CURVE_RUNS} of {len(group.runs)}" for group in view.drawn if len(group.runs) > CURVE_RUNS]
    left = len(view.ranked) - len(view.drawn)
    texts = [f"of some groups not all runs are drawn ({', '.join(cut)})"] if cut else []
    texts += [f"{plural(left, 'group')} with lower scores {'is' if left == 1 else 'are'} left out"] if left else []
    return f" For clarity {'; '.join(texts)}." if texts else ""


def matrices_section(view: View) -> Section | None:
    """The mean accuracy matrix of each group."""
    found: dict[str, dict[str, Matrix]] = {}
    for group in view.drawn[:BEST]:
        for mode, matrix in view.details.matrices(group.runs, view.modes).items():
            found.setdefault(mode, {})[group.label] = matrix
    charts = []
    for mode in (mode for mode in view.modes if mode in found):
        mine = found[mode]
        counts = {label: matrix.runs for label, matrix in mine.items()}
        runs = ", ".join(f"{label} {count}" for label, count in counts.items())
        if len(set(counts.values())) == 1:
            runs = f"{next(iter(counts.values()))} a group"
        orders = {matrix.tasks for matrix in mine.values()}
        named = "; ".join(_numbered(tasks) for tasks in orders) if len(orders) == 1 else "groups differ in task order"
        caption = (
            f"Inference {mode}: score (%) on each task (down) after each task (across). Tasks: {named}. Runs: {runs}."
        )
        figure = matrices_figure({label: matrix.values for label, matrix in mine.items()})
        charts.append(chart(figure, f"matrices-{view.modes.index(mode)}", caption))
    if not charts:
        return None
    lead = f"Means over at most {MATRIX_RUNS} runs a group, all with the order of tasks that is most frequent in it."
    if len(view.ranked) > BEST:
        lead += f" The {BEST} best of {len(view.ranked)} groups are shown."
    return Section("matrices", "Accuracy matrices", [Part(charts=charts)], lead)


def _numbered(tasks: tuple[str, ...]) -> str:
    return ", ".join(f"{i} {task}" for i, task in enumerate(tasks, start=1))


def cost_section(view: View) -> Section | None:
    """OP against training time."""
    charts: list[Chart] = []
    for mode in view.modes:
        costs = {}
        for group in view.ranked:
            both = [(run.seconds, score_of(run, mode, "op")) for run in group.runs]
            points = [(seconds, op) for seconds, op in both if seconds is not None and op is not None]
            if points:
                seconds, op = np.mean(points, axis=0).tolist()
                costs[group.label] = Cost(tuple(points), seconds, op)
        if costs:
            caption = (
                f"Inference {mode}. Marks: means of groups; dots: runs. Ringed: no group is both faster and better."
            )
            if len(costs) > len(view.look):
                caption += " Grey: groups with lower scores."
            charts.append(chart(cost_figure(costs, view.look), f"cost-{view.modes.index(mode)}", caption))
    return Section("cost", "Time and quality", [Part(charts=charts)]) if charts else None


def _dots(values: list[float]) -> Dots:
    found = mean_of(values)
    return Dots(tuple(values), found.bootstrap if found else None)


def _shift(one: Difference) -> Shift:
    return Shift(one.group, one.found.t, beyond_chance(one))


SCORE_SECTIONS: tuple[Callable[[View], Section | None], ...] = (
    standings_section,
    differences_section,
    common_section,
    stream_section,
    matrices_section,
    cost_section,
)
