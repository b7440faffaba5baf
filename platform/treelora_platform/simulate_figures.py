"""Figures of the simulations: regret of the searches, recovery of families, accuracy of sketches, storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora.simulation.recovery import INSERT_ONLY, SCENARIOS, TREES, RecoveryScore
from treelora.simulation.regret import RegretCell, RegretResult
from treelora.simulation.sketch_accuracy import SketchScore
from treelora.simulation.statistics import mean_interval
from treelora.simulation.storage import StoragePoint
from treelora_platform.canvas import COLOURS, INK, LINES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREEN, PINK, ORANGE, SKY = COLOURS
GREY = "#8a8f98"
VARIANT_LOOKS: dict[str, dict[str, Any]] = {
    "random": {"color": GREY, "linestyle": LINES[2]},
    "flat": {"color": RED},
    "tree, wrong": {"color": BLUE, "linestyle": LINES[1]},
    "tree": {"color": BLUE},
    "tree, pooled": {"color": SKY},
    "literal, wrong": {"color": GREEN, "linestyle": LINES[1]},
    "literal": {"color": GREEN},
    "full": {"color": PINK},
}
TREE_LOOKS: dict[str, dict[str, Any]] = dict(
    zip(TREES, ({"color": BLUE}, {"color": GREEN}, {"color": RED}, {"color": BLUE, "linestyle": LINES[1]}), strict=True)
)


@contextmanager
def panels(height: float = 6.4) -> Iterator[tuple[Figure, Any]]:
    """A figure of two by two axes that share nothing."""
    with new_figure(height) as (figure, first):
        figure.delaxes(first)  # its one column
        yield figure, figure.subplots(2, 2)


def regret_figure(found: dict[RegretCell, RegretResult], exploration: float) -> Figure:
    """Regret over N, over time, over c and over slack; bands are bootstrap intervals of the mean."""
    sizes = sorted({cell.arms for cell in found})
    shown = [name for name in VARIANT_LOOKS if any(cell.variant == name for cell in found)]

    def series(name: str, size: int, c: float = exploration) -> RegretResult | None:
        slack = 1.0 if name.startswith(("tree", "literal")) else None
        return found.get(RegretCell(size, name, None if name in ("full", "random") else c, slack))

    def dotted(name: str) -> dict[str, Any]:
        return {**VARIANT_LOOKS[name], "label": name, "marker": "o", "markersize": 3}

    with panels() as (figure, ((over_size, over_time), (over_c, over_slack))):
        for name in shown:
            have = [(size, result) for size in sizes if (result := series(name, size))]
            _band(over_size, [s for s, _ in have], [r.regret[-1] for _, r in have], dotted(name))
            if last := series(name, sizes[-1]):
                _band(over_time, last.steps, last.regret, VARIANT_LOOKS[name])
        over_size.set_xscale("log", base=2)
        over_size.set(
            title=f"Regret and number of arms, c = {exploration:g}", xlabel="arms N", ylabel="regret at the end"
        )
        over_size.set_xticks(sizes, [str(size) for size in sizes])
        over_time.set(title=f"Regret over time, {sizes[-1]} arms", xlabel="step", ylabel="cumulative regret")

        constants = sorted({cell.exploration for cell in found if cell.exploration is not None})
        for name in shown:
            if name in ("full", "random"):
                if last := series(name, sizes[-1]):
                    over_c.axhline(last.regret[-1].mean(), **VARIANT_LOOKS[name])
                continue
            have_c = [(c, result) for c in constants if (result := series(name, sizes[-1], c))]
            _band(over_c, [c for c, _ in have_c], [r.regret[-1] for _, r in have_c], dotted(name))
        over_c.set_xscale("log")
        over_c.set_xticks(constants, [f"{c:g}" for c in constants])
        over_c.minorticks_off()
        over_c.set(title=f"Exploration constant, {sizes[-1]} arms", xlabel="c", ylabel="regret at the end")

        slacks = sorted({cell.slack for cell in found if cell.variant == "tree" and cell.slack is not None})
        for size, colour in zip(sizes, (SKY, BLUE, INK, ORANGE), strict=False):
            have_s = [(s, found[cell]) for s in slacks if (cell := RegretCell(size, "tree", exploration, s)) in found]
            look = {"color": colour, "label": f"{size} arms", "marker": "o", "markersize": 3}
            _band(over_slack, [s for s, _ in have_s], [r.regret[-1] for _, r in have_s], look)
        over_slack.set_xscale("symlog", base=2, linthresh=0.25, linscale=0.5)
        over_slack.set_xticks(slacks, [f"{value:g}" for value in slacks])
        over_slack.set(title=f"Looseness of delta (tree, c = {exploration:g})", ylabel="regret at the end")
        over_slack.set_xlabel("believed delta / true bound")
        over_slack.legend(fontsize=8)
        _finish(figure, (over_size, over_time, over_c, over_slack), over_size)
        return figure


def recovery_figure(scores: Sequence[RecoveryScore]) -> Figure:
    """Families found after every insertion, significance, vocabulary against rule, and the controls."""
    stream = [s for s in scores if s.scenario == "families"]
    with panels() as (figure, ((curve, power), (rivals, controls))):
        for tree in TREES:
            mine = [s for s in stream if s.tree == tree and s.labeling == "family"]
            _points(curve, [(s.tasks, s.rand_index) for s in mine], label=tree, **TREE_LOOKS[tree])
            _points(power, [(s.tasks, _share(s.p_value)) for s in mine], **TREE_LOOKS[tree])
        curve.set(title="Families found after every insertion", xlabel="tasks learnt", ylabel="adjusted Rand index")
        power.set(title="Purity beyond chance", xlabel="tasks learnt", ylabel="share of runs with p at most 0.05")
        power.axhline(0.05, color=INK, linewidth=0.8, alpha=0.6)

        for tree in ("medoid", "agglomerative", "paper"):
            for labeling, style in (("family", "-"), ("vocabulary", LINES[1])):
                mine = [s for s in scores if (s.scenario, s.tree, s.labeling) == ("vocabulary", tree, labeling)]
                look = {**TREE_LOOKS[tree], "linestyle": style}
                _points(rivals, [(s.vocabulary_length, s.rand_index) for s in mine], **look)
        rivals.set(title="Rule (solid) or answer words (dashed)", ylabel="adjusted Rand index")
        rivals.set_xlabel("length of the vocabulary's part of the gradient")

        last = max((s.tasks for s in stream), default=0)
        for place, tree in enumerate(TREES):
            for row, scenario in enumerate(SCENARIOS):
                values = [
                    s.rand_index
                    for s in scores
                    if (s.scenario, s.tree, s.labeling, s.tasks) == (scenario, tree, "family", last)
                ]
                at = row + 0.17 * (place - 1.5)
                found = mean_interval(values)
                hollow = "white" if tree == INSERT_ONLY else TREE_LOOKS[tree]["color"]
                controls.plot([found.low, found.high], [at, at], color=TREE_LOOKS[tree]["color"], linewidth=1.4)
                controls.plot(found.value, at, "o", color=TREE_LOOKS[tree]["color"], markersize=4,
                              markerfacecolor=hollow)  # fmt: skip
        controls.set_yticks(range(len(SCENARIOS)), [name.replace(" ", "\n") for name in SCENARIOS])
        controls.set(title=f"Controls, {last} tasks", xlabel="adjusted Rand index of families", ylim=(3.5, -0.5))
        controls.axvline(0, color=INK, linewidth=0.8, alpha=0.6)
        controls.tick_params(axis="y", length=0)
        _finish(figure, (curve, power, rivals), curve)
        for axes in (curve, rivals):
            axes.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
        for axes in (curve, power, rivals):
            axes.set_ylim(-0.15, 1.05)
        return figure


def sketch_figure(scores: Sequence[SketchScore]) -> Figure:
    """Errors of distances, ranking, nearest task, and the constant between residual and exact L1."""

    def draw(axes: Axes, name: str, label: str, **look: Any) -> None:
        _points(
            axes, [(s.sketch_size, getattr(s, name)) for s in scores], label=label, marker="o", markersize=3, **look
        )

    sizes = np.array(sorted({s.sketch_size for s in scores}))
    with panels(5.8) as (figure, ((error, ranking), (nearest, ratio))):
        draw(error, "l2_error", "L2 distance", color=BLUE)
        draw(error, "l1_error", "residual, up to its constant", color=RED)
        error.plot(sizes, 1 / np.sqrt(np.pi * sizes), color=INK, linestyle=LINES[2], label="1 / sqrt(pi K)")
        error.set_yscale("log")
        error.set(title="Relative error of a pair's distance", ylabel="mean of |error|")
        error.set_yticks([0.02, 0.05, 0.1, 0.2], ["2 %", "5 %", "10 %", "20 %"])
        error.minorticks_off()
        for name, label, look in (
            ("layer_ranking", "one layer", {"color": BLUE, "linestyle": LINES[1]}),
            ("ranking", "mean over layers", {"color": BLUE}),
        ):
            draw(ranking, name, label, **look)
            draw(nearest, name.replace("ranking", "nearest"), label, **look)
        ranking.set(title="Pairs ranked as by exact L1", ylabel="Spearman's correlation")
        nearest.set(title="Nearest task is the exact one", ylabel="share of tasks")
        for axes in (ranking, nearest):
            axes.set_ylim(None, 1.03)
        draw(ratio, "l1_ratio", "over exact L1", color=RED)
        draw(ratio, "l2_ratio", "over exact L2", color=BLUE)
        ratio.set(title="What the residual measures", ylabel="median ratio", ylim=(0, 2))
        ratio.axhline(1, color=INK, linewidth=0.8, alpha=0.6)
        for axes in (error, ranking, nearest, ratio):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xlabel("sketch numbers a layer, K")
            axes.grid(axis="y")
        for axes in (error, ranking, nearest, ratio):
            axes.legend(fontsize=8, handlelength=3)
        return figure


def storage_figure(points: Sequence[StoragePoint], adapter: int, budget: int | None) -> Figure:
    """Bytes a task, bytes in all, time of a step, time of a task's end, over the tasks learnt."""
    tasks = np.array([p.tasks for p in points])
    with panels(5.8) as (figure, ((each, total), (step, end))):
        parts = (("sketches", "sketch_bytes", BLUE), ("tree (JSON)", "tree_bytes", GREEN),
                 ("bandit (open task)", "bandit_bytes", ORANGE), ("other", "other_bytes", GREY))  # fmt: skip
        for label, name, colour in parts:
            each.plot(tasks, [getattr(p, name) / p.tasks / 1024 for p in points], color=colour, label=label)
        each.axhline(adapter / 1024, color=INK, linestyle=LINES[1])
        each.annotate("one adapter", (1, adapter / 1024), (0, -3), textcoords="offset points", va="top", fontsize=7.5)
        each.set_yscale("log")
        each.set(title="Stored for each task", ylabel="KiB a task")
        mib = 1024**2
        total.plot(tasks, [p.memory_bytes / mib for p in points], color=BLUE, label="memory")
        total.plot(tasks, [p.arms * adapter / mib for p in points], color=INK, linestyle=LINES[1], label="adapters")
        total.set_yscale("log")
        total.set(title="Stored in all" + (f", at most {budget} arms" if budget else ""), ylabel="MiB")
        step.plot(tasks, [p.step_p50_ms for p in points], color=BLUE, label="median")
        step.plot(tasks, [p.step_p99_ms for p in points], color=BLUE, linestyle=LINES[1], label="99th percentile")
        step.set(title="One step: observe and select", ylabel="ms of CPU time")
        end.plot(tasks, [p.end_p50_ms for p in points], color=RED, label="end of a task, median")
        end.plot(tasks, [p.end_max_ms for p in points], color=RED, linestyle=LINES[1], label="end of a task, longest")
        end.plot(tasks, [p.begin_ms for p in points], color=GREEN, label="begin of a task")
        end.set(title="Between tasks", ylabel="ms of CPU time")
        end.set_yscale("log")
        step.set_ylim(0, None)
        for axes in (each, total, step, end):
            axes.set_xscale("log")
            _plain(axes.xaxis)
            _plain(axes.yaxis)
            axes.set_xlabel("tasks learnt")
            axes.grid(axis="y")
            axes.legend(fontsize=7.5, handlelength=3, loc="upper left", ncols=2 if axes is each else 1)
        each.set_ylim(None, 40 * adapter / 1024)  # room for the legend above the adapter's line
        return figure


def _band(axes: Axes, x: Any, runs: Any, look: dict[str, Any]) -> None:
    """The mean of runs [x, R] as a line, and its interval as a band."""
    means = [mean_interval(row) for row in runs]
    axes.plot(x, [m.value for m in means], **look)
    axes.fill_between(x, [m.low for m in means], [m.high for m in means], color=look["color"], alpha=0.15, linewidth=0)


def _points(axes: Axes, pairs: Sequence[tuple[float, float]], **look: Any) -> None:
    """As `_band`, from pairs (x, y) of all runs; where y isn't defined in any run there is a gap."""
    places = sorted({x for x, _ in pairs})
    _band(axes, places, [[y for at, y in pairs if at == x] for x in places], look)


def _share(p_value: float) -> float:
    return float("nan") if np.isnan(p_value) else float(p_value <= 0.05)


def _plain(axis: Any) -> None:
    """Numbers as they are: the canvas reads no formula, so powers of ten would be drawn as TeX."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def _finish(figure: Figure, axes: Sequence[Axes], named: Axes) -> None:
    for one in axes:
        one.grid(axis="y")
        one.set_ylim(0, None)
    handles, labels = named.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, handlelength=3)
