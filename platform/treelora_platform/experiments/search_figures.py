"""Figures of what was searched, and of how the bandit chose: parallel coordinates, importance, arms layer by layer.

Shapes: S steps, L layers, K tasks learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from treelora_platform.canvas import COLOURS, INK, WIDTH, new_figure, short
from treelora_platform.experiments.importance import Importance, Parameter, number, shown
from treelora_platform.page import PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_AXES = 8
MAX_LINES = 300
MAX_TICKS = 7
LOG_FROM = 8  # largest over smallest value, from which an axis is one of logarithms
_SCALE = ("#97a0ac", "#a8836f", "#d55e00")  # from low to high; each readable on white and on black


def parallel_figure(parameters: Sequence[Parameter], scores: Sequence[float], label: str) -> Figure:
    """A line a run through its values of each parameter, ending at its score, by which it is coloured."""
    from matplotlib.colors import LinearSegmentedColormap

    parameters = list(parameters)[:MAX_AXES]
    colours = LinearSegmentedColormap.from_list("scores", _SCALE)
    low, high = min(scores), max(scores)
    places_pr = np.array([places(parameter) for parameter in parameters])
    ends_r = (np.array(scores) - low) / ((high - low) or 1)
    columns = len(parameters) + 1
    order = np.argsort(scores, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(MAX_LINES, len(order))).round().astype(int))]
    with new_figure(height=3.5, width=WIDTH) as (figure, axes):
        for rank, run in enumerate(chosen):  # the best last, above the others
            share = rank / max(1, len(chosen) - 1)
            line = [*places_pr[:, run], ends_r[run]]
            axes.plot(range(columns), line, color=colours(ends_r[run]), linewidth=0.9 + 0.9 * share,
                      alpha=0.45 + 0.5 * share)  # fmt: skip
        for column, parameter in enumerate(parameters):
            _scale(axes, column, _ticks(parameter))
        marks = np.linspace(low, high, 5 if high > low else 1)
        places_m = (marks - low) / ((high - low) or 1)
        _scale(axes, columns - 1, [(at, f"{mark:.1f}") for at, mark in zip(places_m, marks, strict=True)], right=True)
        names = [_axis_name(parameter.key) for parameter in parameters]
        axes.set_xticks(range(columns), [*names, label], fontweight="bold", fontsize=8)
        axes.tick_params(axis="x", length=0, pad=6)
        axes.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.35, columns - 0.65))
        axes.spines[:].set_visible(False)
        return figure


def places(parameter: Parameter) -> list[float]:
    """Where each value stands on its axis, 0 to 1: numbers to scale, texts and unset values in even steps."""
    if (scale := _number_scale(parameter)) is not None:
        low, high, logarithmic = scale
        numbers = [float(value) for value in parameter.values if value is not None]
        known = np.log(numbers) if logarithmic else np.array(numbers)
        return ((known - low) / (high - low)).tolist() if high > low else [0.5] * len(known)
    steps: list[str | None] = [*parameter.distinct, *([None] if None in parameter.values else [])]
    return [steps.index(value) / max(1, len(steps) - 1) for value in parameter.values]


def _number_scale(parameter: Parameter) -> tuple[float, float, bool] | None:
    """Ends of the axis, and whether it is one of logarithms; None for what has no scale."""
    if not parameter.is_number or None in parameter.values:
        return None
    low, high = (float(parameter.distinct[end]) for end in (0, -1))
    if low > 0 and high >= LOG_FROM * low:
        return float(np.log(low)), float(np.log(high)), True
    return low, high, False


def importance_figure(found: Importance) -> Figure:
    """A bar a parameter: R2 lost by shuffling it, with the spread over shuffles."""
    with new_figure(height=0.85 + 0.3 * len(found.losses)) as (figure, axes):
        for place, (_, loss, spread) in enumerate(found.losses):
            axes.barh(place, max(loss, 0.0), height=0.55, color=COLOURS[0])
            axes.plot([loss - spread, loss + spread], [place, place], color=INK, linewidth=1.2)
        axes.set_yticks(range(len(found.losses)), [short(parameter.key, 30) for parameter, _, _ in found.losses])
        axes.set_ylim(len(found.losses) - 0.4, -0.6)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="R2 lost when the values are shuffled")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        return figure


def pulls_by_layer(steps: pa.Table) -> tuple[list[int], np.ndarray, np.ndarray]:
    """What each layer pulled while each task was learnt.

    Returns:
        The tasks' indices; [L, K] the arm pulled most (the first of equals), and [L, K] the entropy of the pulls as a
        share of the largest possible, 0 for always one arm and 1 for all alike. NaN: no pulls, or no choice.
    """
    rows = steps.filter(steps["arms"].is_valid())
    tasks_s, arms_s = rows["task_index"].to_numpy(), rows["arms"].to_pylist()
    tasks = sorted(set(tasks_s.tolist()))
    layers = max((len(arms) for arms in arms_s), default=0)
    most_lk, entropy_lk = np.full((2, layers, len(tasks)), np.nan)
    for column, task in enumerate(tasks):
        mine = [arms for arms, at in zip(arms_s, tasks_s, strict=True) if at == task]
        for layer in range(layers):
            pulls = np.bincount([arms[layer] for arms in mine if layer < len(arms)], minlength=task)
            if not pulls.sum():
                continue
            most_lk[layer, column] = pulls.argmax()
            share = pulls[pulls > 0] / pulls.sum()
            if len(pulls) > 1:
                entropy_lk[layer, column] = -(share * np.log(share)).sum() / np.log(len(pulls))
    return tasks, most_lk, entropy_lk


def layers_figure(steps: pa.Table, names: Mapping[int, str]) -> Figure:
    """Left the arm that each layer pulled most while a task was learnt, right how evenly it pulled."""
    from matplotlib import colormaps

    tasks, most_lk, entropy_lk = pulls_by_layer(steps)
    arms = int(np.nanmax(most_lk)) + 1
    labels = [short(names.get(task, f"task {task}"), 14) for task in tasks]
    with new_figure(height=min(6.0, 2.4 + 0.08 * len(most_lk))) as (figure, first):
        first.remove()
        left, right = figure.subplots(1, 2, sharey=True)
        which = left.imshow(
            np.ma.masked_invalid(most_lk), cmap=colormaps["cividis"].resampled(arms), vmin=-0.5, vmax=arms - 0.5,
            aspect="auto", interpolation="nearest",
        )  # fmt: skip
        spread = right.imshow(
            np.ma.masked_invalid(entropy_lk), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        bar = figure.colorbar(which, ax=left, ticks=range(arms), fraction=0.06, pad=0.03)
        bar.ax.set_yticklabels([short(names.get(arm, f"task {arm}"), 12) for arm in range(arms)], fontsize=7)
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
        figure.colorbar(spread, ax=right, fraction=0.06, pad=0.03).outline.set_visible(False)
        for axes in (left, right):
            axes.set_xticks(range(len(tasks)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_xlabel("task learnt")
        left.set(title="Arm pulled most", ylabel="layer")
        right.set_title("Evenness of pulls")
        return figure


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    """Place and text of all values where they are few, of some along the scale where they are many."""
    scale = _number_scale(parameter)
    if len(parameter.distinct) > MAX_TICKS and scale is not None:
        low, high, logarithmic = scale
        marks = np.linspace(low, high, 5)
        values = np.exp(marks) if logarithmic else marks
        return [(i / 4, f"{value:.2g}") for i, value in enumerate(values)]
    at = sorted(zip(places(parameter), map(_value_text, parameter.values), strict=True))
    ticks = list(dict.fromkeys(at))
    return ticks[:: -(-len(ticks) // (2 * MAX_TICKS))]


def _value_text(value: str | None) -> str:
    found = number(value)
    return shown(value, 16) if found is None else f"{found:.6g}"


def _scale(axes: Axes, column: int, ticks: Sequence[tuple[float, str]], *, right: bool = False) -> None:
    axes.plot([column, column], [0, 1], color=INK, linewidth=0.9)
    for place, text in ticks:
        axes.plot([column - 0.02, column + 0.02], [place, place], color=INK, linewidth=0.9)
        axes.annotate(
            text, (column, place), (6 if right else -6, 0), textcoords="offset points", va="center", fontsize=7.5,
            ha="left" if right else "right", bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        )  # fmt: skip


def _axis_name(key: str) -> str:
    """In two lines, section and field, so that neighbours don't meet."""
    section, dot, field = key.rpartition(".")
    return f"{short(section, 16)}{dot}\n{short(field, 16)}" if dot else short(key, 16)
