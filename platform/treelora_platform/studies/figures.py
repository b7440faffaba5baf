"""Pictures of a study: OP against training time, forgetting, OP along the stream, and the accuracy matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora.data.files import write_bytes_atomically
from treelora_platform.canvas import (
    COLOURS,
    INK,
    LINES,
    WIDTH,
    draw_matrix,
    new_figure,
    number_tasks,
    render,
    score_bar,
    short,
)
from treelora_platform.statistics import mean_interval
from treelora_platform.studies.analysis import modes_in, values_of
from treelora_platform.studies.rows import Row
from treelora_platform.studies.spec import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = {
    "TreeLoRA": (COLOURS[0], "o"),
    "replay-free peer": (COLOURS[2], "s"),
    "sees past rows": (COLOURS[4], "D"),
    "bound": ("#8a8f98", "^"),
}
COLUMNS = 5
LABEL_GAP = 8.5  # points between two labels


def save_study_figures(study: Study, rows: Sequence[Row], full: Sequence[Row], folder: Path) -> list[Path]:
    """Draw all as PNG, for each way of inference; returns the files written.

    Args:
        rows: All rows, of every number of steps.
        full: Those of the comparison at equal steps.
    """
    paths = []
    for mode in modes_in(full):
        for name, figure in study_figures(study, rows, full, mode):
            path = folder / f"{name}-{mode}.png"
            write_bytes_atomically(path, render(figure, "png"))
            paths.append(path)
    return paths


def study_figures(study: Study, rows: Sequence[Row], full: Sequence[Row], mode: str) -> Iterator[tuple[str, Figure]]:
    """Name and figure, one after the other; a figure without anything to show is left out."""
    names = [name for name in study.variants if values_of(full, name, mode, "op")]
    if any(study.trains(name) for name in names):
        yield "cost", cost_figure(study, rows, full, mode)
    if any(values_of(full, name, mode, "bwt") for name in names):
        yield "bwt", bwt_figure(study, full, mode)
        yield "stream", stream_figure(study, full, mode)
    for order in sorted({row.order for row in full if row.mode == mode}):
        if any(row.bwt is not None for row in full if (row.mode, row.order) == (mode, order)):
            yield f"matrices-order{order}", matrices_figure(study, full, mode, order)


def group_of(study: Study, variant: str) -> str:
    """One of `GROUPS`."""
    found = study.variants[variant]
    if not study.in_order(variant):
        return "bound"
    if found.method == "treelora":
        return "TreeLoRA"
    return "sees past rows" if found.replay else "replay-free peer"


def cost_figure(study: Study, rows: Sequence[Row], full: Sequence[Row], mode: str) -> Figure:
    """OP against training time with 95 % intervals; a line joins a variant's runs at other numbers of steps."""
    with new_figure(height=4.9) as (figure, axes):
        labels: list[tuple[float, float, str, str]] = []
        for name in study.variants:
            colour, marker = GROUPS[group_of(study, name)]
            op = list(values_of(full, name, mode, "op").values())
            seconds = list(values_of(full, name, mode, "seconds").values())
            if not op:
                continue
            score = mean_interval(op)
            if not study.trains(name):
                axes.axhline(score.value, color=colour, linestyle=LINES[2], linewidth=1)
                axes.annotate(f"{name}, not trained", (0, score.value), (3, 3), fontsize=7.5, color=colour,
                              xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
                continue
            cost = mean_interval(seconds)
            if len(op) > 1:
                axes.plot([cost.value] * 2, [score.low, score.high], color=colour, linewidth=1.1, alpha=0.55)
                axes.plot([cost.low, cost.high], [score.value] * 2, color=colour, linewidth=1.1, alpha=0.55)
            shorter = _steps_curve(rows, name, mode)
            if len(shorter) > 1:
                axes.plot(*zip(*shorter, strict=True), color=colour, linewidth=0.9, alpha=0.7, linestyle=LINES[1])
                axes.plot(*zip(*shorter[:-1], strict=True), marker, color=colour, markersize=3, alpha=0.7)
            axes.plot(cost.value, score.value, marker, color=colour, markersize=6)
            labels.append((cost.value, score.value, name, colour))
        axes.set_xscale("log")
        _plain_log(axes)
        axes.margins(x=0.14, y=0.08)
        axes.set(title=f"Overall performance against training time, inference {mode}", ylabel="OP (%)")
        axes.set_xlabel("training time of the whole stream (s); small marks: fewer steps")
        axes.grid(axis="y")
        _group_legend(figure, study, [*dict.fromkeys(row.variant for row in full if row.mode == mode)])
        figure.draw_without_rendering()  # places are in points from here on, so the layout must be settled
        _place_labels(axes, labels)
        return figure


def bwt_figure(study: Study, full: Sequence[Row], mode: str) -> Figure:
    """What was forgotten, a bar a variant, with 95 % intervals."""
    names = [name for name in study.variants if values_of(full, name, mode, "bwt")]
    with new_figure(height=1.2 + 0.24 * len(names)) as (figure, axes):
        for place, name in enumerate(names):
            found = mean_interval(list(values_of(full, name, mode, "bwt").values()))
            axes.barh(place, found.value, height=0.66, color=GROUPS[group_of(study, name)][0])
            axes.plot([found.low, found.high], [place, place], color=INK, linewidth=1.3)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), [short(name, 26) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set(title=f"What was forgotten, inference {mode}", xlabel="BWT (points); smaller is better")
        axes.grid(axis="x")
        _group_legend(figure, study, names)
        return figure


def stream_figure(study: Study, full: Sequence[Row], mode: str) -> Figure:
    """OP after each task: the mean over runs, single runs faint, and the reference dashed in every panel."""
    curves = {name: _along_stream(full, name, mode) for name in study.variants}
    curves = {name: found for name, found in curves.items() if found}
    tasks = max(len(curve) for found in curves.values() for curve in found)
    with _panels(len(curves), 1.45, sharey=True) as (figure, panels):
        for axes, (name, found) in zip(panels, curves.items(), strict=True):
            colour = GROUPS[group_of(study, name)][0]
            for curve in found:
                axes.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=0.7, alpha=0.35)
            if name != study.reference and study.reference in curves:
                mean = _mean_curve(curves[study.reference])
                axes.plot(range(1, len(mean) + 1), mean, color=INK, linewidth=1, linestyle=LINES[1])
            mean = _mean_curve(found)
            axes.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=1.8, marker="o", markersize=2.5)
            axes.set_title(short(name, 20), fontsize=8)
            axes.set_xticks(range(1, tasks + 1, max(1, tasks // 6)))
            axes.tick_params(labelsize=7)
            axes.grid(axis="y")
        figure.suptitle(f"OP (%) over tasks learnt, inference {mode}; dashed: {study.reference}", fontsize=10,
                        fontweight="bold", x=0.01, ha="left", color=INK)  # fmt: skip
        return figure


def matrices_figure(study: Study, full: Sequence[Row], mode: str, order: int) -> Figure:
    """The accuracy matrix of each variant on one order, the mean over seeds: a row a task, a column a task learnt."""
    found = {name: _mean_matrix(full, name, mode, order) for name in study.variants}
    found = {name: matrix for name, matrix in found.items() if np.isfinite(matrix).any()}
    tasks = next(row.tasks for row in full if (row.mode, row.order) == (mode, order))
    with _panels(len(found), 1.5) as (figure, panels):
        for axes, (name, matrix) in zip(panels, found.items(), strict=True):
            shown = draw_matrix(axes, matrix, fontsize=6, written=6)
            axes.set_title(short(name, 20), fontsize=8)
            number_tasks(axes, len(matrix), most=6, fontsize=7)
        score_bar(figure, shown, list(panels))
        listed = ", ".join(f"{i} {short(task, 14)}" for i, task in enumerate(tasks, start=1))
        title = f"Score on each task (down) after each task (across), inference {mode}, order {order}"
        figure.suptitle(f"{title}\n{listed}", fontsize=9, x=0.01, ha="left", color=INK)
        return figure


def _along_stream(full: Sequence[Row], name: str, mode: str) -> list[np.ndarray]:
    """OP_n of each run, where every task so far was scored after every task."""
    curves = []
    for row in full:
        matrix = _array(row)
        if (row.variant, row.mode) == (name, mode) and len(matrix):
            seen = [matrix[: n + 1, n] for n in range(len(matrix))]
            if all(np.isfinite(column).all() for column in seen):
                curves.append(np.array([column.mean() for column in seen]))
    return curves


def _mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Over runs, as far as the shortest stream goes."""
    length = min(map(len, curves))
    mean: np.ndarray = np.mean([curve[:length] for curve in curves], axis=0)
    return mean


def _mean_matrix(full: Sequence[Row], name: str, mode: str, order: int) -> np.ndarray:
    mine = [_array(row) for row in full if (row.variant, row.mode, row.order) == (name, mode, order)]
    return np.mean(mine, axis=0) if mine else np.full((1, 1), np.nan)


def _array(row: Row) -> np.ndarray:
    return np.array(row.matrix, dtype=np.float64)  # None becomes NaN


def _steps_curve(rows: Sequence[Row], name: str, mode: str) -> list[tuple[float, float]]:
    """(mean seconds, mean OP) at each number of steps, in order."""
    points: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if (row.variant, row.mode) == (name, mode) and row.op is not None:
            points.setdefault(row.steps, []).append((row.seconds, row.op))
    return [
        (float(np.mean([s for s, _ in at])), float(np.mean([o for _, o in at]))) for _, at in sorted(points.items())
    ]


def _group_legend(figure: Figure, study: Study, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    there = {group_of(study, name) for name in names}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=group)
        for group, (colour, marker) in GROUPS.items()
        if group in there
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _place_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names to the right of their points, moved up where they would cover each other, with a thin line then."""
    scale = 72 / axes.figure.dpi
    taken: list[tuple[float, float, float]] = []
    for x, y, name, colour in sorted(labels, key=lambda label: label[1]):
        left, bottom = axes.transData.transform((x, y)) * scale
        text = short(name, 22)
        width, at = 4.2 * len(text) + 8, bottom - 3
        for start, end, height in sorted(taken, key=lambda place: place[2]):
            if start < left + width and left < end and abs(at - height) < LABEL_GAP:
                at = height + LABEL_GAP
        taken.append((left, left + width, at))
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5} if at - bottom > LABEL_GAP else None
        axes.annotate(text, (x, y), (7, at - bottom), textcoords="offset points", fontsize=7.5, color=INK,
                      arrowprops=line)  # fmt: skip


@contextmanager
def _panels(count: int, height: float, **shared: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """So many small axes in rows of `COLUMNS`; heights in inches."""
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    with new_figure(height=0.75 + height * rows, width=WIDTH if columns > 2 else 2.6 * columns + 1) as (figure, first):
        figure.delaxes(first)  # its one column
        grid = figure.subplots(rows, columns, squeeze=False, **shared).ravel().tolist()
        for unused in grid[count:]:
            figure.delaxes(unused)
        yield figure, grid[:count]


def _plain_log(axes: Axes) -> None:
    """Seconds as they are: the canvas reads no formula, so powers of ten would be drawn as TeX."""
    from matplotlib.ticker import LogLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
