"""Sections of an experiment's report about what was searched, and about what happened inside TreeLoRA."""

from __future__ import annotations

from collections import Counter

from treelora_platform.experiments.analysis import score_of
from treelora_platform.experiments.details import Inside
from treelora_platform.experiments.importance import (
    MAX_PARAMETERS,
    SHUFFLES,
    TREES,
    Importance,
    Parameter,
    importance,
    shown,
    varying,
)
from treelora_platform.experiments.search_figures import (
    MAX_AXES,
    MAX_LINES,
    importance_figure,
    layers_figure,
    parallel_figure,
)
from treelora_platform.experiments.view import View, best_run, plural
from treelora_platform.figures import arms_figure, penalty_figure, tree_figures
from treelora_platform.page import Cell, Chart, Part, Row, Section, Table, chart, csv_download

INSIDE = 3  # groups whose best run is looked into
FEW_TREES = 4
VALUES = 8  # of a parameter in the table


def search_section(view: View) -> Section | None:
    """Parallel coordinates and importance of what differs between the runs."""
    records = view.comparison.records
    parameters = varying(records)
    if not parameters:
        return None
    scores = [score_of(run, view.mode, "op") for run in records]
    rows = [row for row, score in enumerate(scores) if score is not None]
    known = [Parameter(one.key, tuple(one.values[row] for row in rows), one.searched) for one in parameters]
    drawn = [one for one in known if len(one.distinct) + (None in one.values) > 1][:MAX_AXES]
    charts = []
    if len(rows) > 1 and drawn:
        caption = f"A line a run; its colour is its OP, inference {view.mode}, from grey (low) to orange (high)."
        if len(rows) > MAX_LINES:
            caption += f" {MAX_LINES} of {len(rows):,} runs, evenly over the ranking."
        if len(parameters) > len(drawn):
            caption += f" The first {len(drawn)} of {len(parameters)} parameters."
        figure = parallel_figure(drawn, [score for score in scores if score is not None], "OP (%)")
        charts.append(chart(figure, "parallel", caption))
    judged = importance(parameters[:MAX_PARAMETERS], scores)
    lead = (
        "What differs between the runs, and what the score seems to hang on. These are no causes: what was not varied "
        "by itself can't be told from what changed with it."
    )
    parts = [Part(charts=charts), _importance_part(judged, view.mode), Part("Values", tables=[_values(parameters)])]
    return Section("search", "Hyperparameters", parts, lead)


def _importance_part(found: Importance, mode: str) -> Part:
    if found.withheld is not None:
        return Part("Importance", text=f"Importance is not shown: {found.withheld}.")
    caption = (
        f"OP, inference {mode}, of {found.runs:,} runs: a random forest of {TREES} trees explains R2 = {found.r2:.2f} "
        "of its variance on runs that a tree has not seen. Bars: R2 lost when a parameter's values are shuffled, mean "
        f"and standard deviation of {SHUFFLES} shuffles; about 0: no importance."
    )
    return Part("Importance", charts=[chart(importance_figure(found), "importance", caption)])


def _values(parameters: list[Parameter]) -> Table:
    rows, plain = [], []
    together, searched = any(one.together for one in parameters), any(one.searched for one in parameters)
    columns = ["parameter", "values (runs)", *["changes together with"] * together, *["searched"] * searched]
    for one in parameters:
        counts = Counter(one.values)
        order = [*one.distinct, *([None] if None in counts else [])]
        texts = [f"{shown(value, 60)} ({counts[value]})" for value in order[:VALUES]]
        more = f" and {len(order) - VALUES} more" if len(order) > VALUES else ""
        row = [one.key, ", ".join(texts) + more]
        row += [", ".join(one.together)] if together else []
        row += ["yes" if one.searched else ""] if searched else []
        rows.append(Row([Cell(text) for text in row]))
        plain += [(one.key, value, counts[value]) for value in order]
    return Table(
        "Values of the parameters",
        columns,
        rows,
        csv_download("parameters", ("parameter", "value", "runs"), plain),
        ("unset: a setting of another method, or one that the run did not record",),
        texts=4,
        wrap=True,
    )


def inside_section(view: View) -> tuple[Section | None, dict[str, str]]:
    """Tree, arms and penalty of the best run of each TreeLoRA group; and the places of these runs, by run id."""
    places: dict[str, str] = {}
    groups = {group.label: [run for run in group.runs if run.method == "treelora"] for group in view.ranked}
    groups = {label: runs for label, runs in groups.items() if runs}
    parts: list[Part] = []
    pulled: list[tuple[str, Inside]] = []
    for number, (label, runs) in enumerate(list(groups.items())[:INSIDE]):
        found = view.details.inside(best_run(runs, view.mode))
        if found is None or not (found.pulled or found.trees):
            continue
        text = f"{found.record.name}, the best of {plural(len(runs), 'run')} by OP, inference {view.mode}:"
        link = (f"#{view.anchors[found.record.run_id]}", "its row")
        parts += [
            Part(label, f"inside-{number}", text, link),
            *_trees(found, number),
            Part(charts=_arms(found, number)),
        ]
        places[found.record.run_id] = f"inside-{number}"
        if found.pushed:
            pulled.append((label, found))
    if pulled:
        figure = penalty_figure([(label if len(pulled) > 1 else "", found.steps) for label, found in pulled])
        caption = "How far the penalty moves the adapter, against how far the loss does, in the runs above."
        parts.append(Part(charts=[chart(figure, "penalty", caption)]))
    if not parts:
        return None, places
    lead = (
        "Tasks with similar gradients share a branch of the tree. At each step every layer pulls an arm: the past task "
        "that it compares itself with."
    )
    if len(groups) > INSIDE:
        lead += f" The {INSIDE} best of {len(groups)} groups are shown."
    return Section("inside", "Tree, arms, penalty", parts, lead), places


def _trees(found: Inside, number: int) -> list[Part]:
    """The last tree, and those before it, folded where there are many."""
    charts = []
    for name, figure in tree_figures(found.trees):
        index = int(name.removeprefix("tree-"))
        caption = f"After task {index + 1}, {found.names.get(index, 'unnamed')}."
        charts.append(chart(figure, f"inside{number}-{name}", caption))
    fold = "The tree after each task before" if len(charts) > FEW_TREES else ""
    return [Part(charts=charts[-1:]), Part(row=charts[:-1], fold=fold)]


def _arms(found: Inside, number: int) -> list[Chart]:
    if not found.pulled:
        return []
    over_steps = "Share of the layers that pulled each arm, over steps; dotted: a new task."
    by_layer = (
        "Layer by layer: left the arm pulled most while a task was learnt, right the entropy of the pulls, 0 for "
        "always the same arm and 1 for all alike; empty where there was no choice."
    )
    return [
        chart(arms_figure(found.steps, found.names), f"inside{number}-arms", over_steps),
        chart(layers_figure(found.steps, found.names), f"inside{number}-layers", by_layer),
    ]
