"""Figures of an experiment: its groups by score, along the stream, task by task, and against time.

A group keeps its colour and mark in every figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora.simulation.statistics import Interval
from treelora_platform.canvas import (
    COLOURS,
    INK,
    LINES,
    WIDTH,
    draw_matrix,
    legend_below,
    new_figure,
    number_tasks,
    score_bar,
    short,
)
from treelora_platform.page import PAPER
from treelora_platform.statistics import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = ("o", "s", "D", "^", "v", "P")
PANELS = 3
LEAST_SPAN = 1.0  # points on an axis of scores
GREY = "#8a93a0"  # readable on white and on black


@dataclass(frozen=True)
class Look:
    """How a group is drawn."""

    colour: str
    line: Any
    mark: str


@dataclass(frozen=True)
class Dots:
    """A number of a group: each run's, and their mean with its interval."""

    runs: tuple[float, ...]
    mean: Interval | None


@dataclass(frozen=True)
class Shift:
    """A group less the reference: the mean of the pairs with its interval, and whether it is more than chance."""

    label: str
    mean: Interval
    beyond_chance: bool


@dataclass(frozen=True)
class Cost:
    """A group by training time (s) and OP: a point a run, and their means."""

    runs: tuple[tuple[float, float], ...]
    seconds: float
    op: float


def looks(groups: Sequence[str]) -> dict[str, Look]:
    """A look a group, no two alike among the first eighteen."""
    return {
        group: Look(
            COLOURS[i % len(COLOURS)], LINES[(i // len(COLOURS) + i) % len(LINES)] if i else "-", MARKS[i % len(MARKS)]
        )
        for i, group in enumerate(groups)
    }


def standings_figure(op: Mapping[str, Dots], bwt: Mapping[str, Dots], look: Mapping[str, Look]) -> Figure:
    """OP (left) and BWT (right), a line a group: mean and interval, a stroke a run. Groups without a look are grey."""
    with new_figure(height=0.95 + 0.3 * len(op)) as (figure, first):
        first.remove()
        sides = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
        for axes, found in zip(sides, (op, bwt), strict=True):
            for place, (group, dots) in enumerate(found.items()):
                colour, mark = (look[group].colour, look[group].mark) if group in look else (GREY, "o")
                axes.plot(dots.runs, [place] * len(dots.runs), "|", color=colour, alpha=0.55, markersize=9)
                if dots.mean is not None:
                    _ends(axes, dots.mean, place, colour)
                    axes.plot(dots.mean.value, place, mark, color=colour, markersize=6.5)
            axes.margins(x=0.08)
        _name_rows(sides, list(op))
        sides[0].set(title="Overall performance", xlabel="OP (%), more is better")
        sides[1].set(title="Forgetting", xlabel="BWT (points), less is better")
        return figure


def differences_figure(op: Sequence[Shift], bwt: Sequence[Shift]) -> Figure:
    """Paired differences from the reference in OP (left) and BWT (right); filled where they are beyond chance."""
    labels = list(dict.fromkeys(one.label for one in (*op, *bwt)))
    with new_figure(height=1.05 + 0.3 * len(labels)) as (figure, first):
        first.remove()
        sides = figure.subplots(1, 2, sharey=True)
        for axes, found in zip(sides, (op, bwt), strict=True):
            for one in found:
                place, colour = labels.index(one.label), COLOURS[0] if one.beyond_chance else GREY
                _ends(axes, one.mean, place, colour)
                fill = colour if one.beyond_chance else PAPER
                axes.plot(one.mean.value, place, "o", color=colour, markerfacecolor=fill, markersize=6.5)
            axes.axvline(0, color=INK, linewidth=0.9, alpha=0.8)
            axes.margins(x=0.12)
        _name_rows(sides, labels)
        sides[0].set(title="Difference in OP", xlabel="points, right of the line is better")
        sides[1].set(title="Difference in BWT", xlabel="points, left of the line is better")
        return figure


def _name_rows(sides: Sequence[Axes], labels: Sequence[str]) -> None:
    for axes in sides:
        low, high = axes.get_xlim()
        if high - low < LEAST_SPAN:  # values that are all alike would be magnified to their rounding
            axes.set_xlim((low + high - LEAST_SPAN) / 2, (low + high + LEAST_SPAN) / 2)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    sides[0].set_yticks(range(len(labels)), [short(label, 26) for label in labels])
    sides[0].set_ylim(len(labels) - 0.4, -0.6)


def stream_figure(
    op: Mapping[str, Sequence[np.ndarray]], bwt: Mapping[str, Sequence[np.ndarray]], look: Mapping[str, Look]
) -> Figure:
    """OP (above) and BWT (below) over the tasks learnt: means with intervals, single runs faint.

    A curve is [tasks]; NaN where a task's score is not known. Groups may differ in length.
    """
    with new_figure(height=4.1 + _legend_height(len(op)), rows=2) as (figure, (upper, lower)):
        last = 1
        for axes, found in ((upper, op), (lower, bwt)):
            for group, curves in found.items():
                style = look[group]
                for curve in curves if len(curves) > 1 else ():
                    axes.plot(range(1, len(curve) + 1), curve, color=style.colour, linewidth=0.7, alpha=0.3)
                at, means = mean_curve(curves)
                axes.fill_between(
                    at, [one.low for one in means], [one.high for one in means], color=style.colour, alpha=0.13,
                    linewidth=0,
                )  # fmt: skip
                axes.plot(
                    at, [one.value for one in means], color=style.colour, linestyle=style.line, marker=style.mark,
                    markersize=4.5, linewidth=1.8, label=short(group, 34),
                )  # fmt: skip
                last = max([last, *map(len, curves)])
            axes.grid(axis="y")
            axes.margins(y=0.12)
        upper.set(title="Overall performance: mean score of the tasks so far", ylabel="OP (%)")
        lower.set(title="Backward transfer: what was forgotten (less is better)", ylabel="BWT (points)")
        lower.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
        lower.set(xlabel="tasks learnt", xticks=range(1, last + 1, max(1, last // 12)), xlim=(0.8, last + 0.2))
        legend_below(figure, upper)
        return figure


def mean_curve(curves: Sequence[np.ndarray]) -> tuple[list[int], list[Interval]]:
    """Numbers of tasks, from 1, at which any curve is known, and the mean there over those that are."""
    at, means = [], []
    for n in range(max(map(len, curves), default=0)):
        known = [float(curve[n]) for curve in curves if n < len(curve) and math.isfinite(curve[n])]
        if known:
            at.append(n + 1)
            means.append(mean_interval(known))
    return at, means


def matrices_figure(matrices: Mapping[str, np.ndarray]) -> Figure:
    """The accuracy matrix of each group: down the tasks, across the task just learnt, both numbered from 1."""
    columns = min(PANELS, len(matrices))
    rows = -(-len(matrices) // columns)
    with new_figure(height=0.5 + 2.05 * rows, width=WIDTH if columns > 2 else 1 + 2.6 * columns) as (figure, first):
        first.remove()
        grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for unused in grid[len(matrices) :]:
            unused.remove()
        for axes, (group, matrix) in zip(grid, matrices.items(), strict=False):
            shown = draw_matrix(axes, matrix, fontsize=7.5, written=8)
            axes.set_title(short(group, 24), fontsize=9)
            number_tasks(axes, len(matrix), most=8, fontsize=8)
        figure.supxlabel("after learning task", fontsize=8.5)
        figure.supylabel("score on task", fontsize=8.5)
        score_bar(figure, shown, grid[: len(matrices)])
        return figure


def cost_figure(groups: Mapping[str, Cost], look: Mapping[str, Look]) -> Figure:
    """OP against training time; groups on the Pareto front are ringed and joined. Groups without a look are grey."""
    front = [list(groups)[i] for i in pareto_front([(cost.seconds, cost.op) for cost in groups.values()])]
    with new_figure(height=3.3 + _legend_height(len(look) + 1)) as (figure, axes):
        for group, cost in groups.items():
            style = look.get(group)
            colour = style.colour if style else GREY
            if len(cost.runs) > 1:
                axes.plot(*zip(*cost.runs, strict=True), ".", color=colour, alpha=0.35, markersize=5)
            axes.plot(
                cost.seconds, cost.op, style.mark if style else "o", color=colour, markersize=7 if style else 4,
                linestyle="", label=short(group, 34) if style else None,
            )  # fmt: skip
        at = [(groups[group].seconds, groups[group].op) for group in front]
        axes.plot(*zip(*at, strict=True), color=INK, linewidth=0.9, linestyle=LINES[1], alpha=0.7)
        axes.plot(
            *zip(*at, strict=True), "o", markerfacecolor="none", color=INK, markersize=12, markeredgewidth=1.1,
            label="Pareto front",
        )  # fmt: skip
        seconds = [cost.seconds for cost in groups.values()]
        if max(seconds) > 10 * min(seconds) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")  # the canvas reads no formula
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.margins(0.08)
        axes.set(title="Overall performance against training time", xlabel="training time (s)", ylabel="OP (%)")
        axes.grid()
        legend_below(figure, axes)
        return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, quality) that no other matches in both and beats in one, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def _legend_height(entries: int) -> float:
    """Inches, so that a long legend takes nothing from the figure; entries of usual length come two in a row."""
    return 0.2 * -(-entries // 2)


def _ends(axes: Axes, mean: Interval, place: int, colour: str) -> None:
    if math.isfinite(mean.low):
        axes.plot([mean.low, mean.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
