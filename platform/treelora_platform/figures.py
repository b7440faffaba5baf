"""Figures of a run: scores, OP and BWT, loss, arms, tree, penalty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from treelora.data.names import slugify
from treelora_platform.canvas import (
    COLOURS,
    INK,
    LINES,
    WIDTH,
    draw_matrix,
    legend_below,
    new_figure,
    render,
    score_bar,
    short,
    to_svg,
)
from treelora_platform.run_tables import TreeSnapshot, read_scores, read_steps, read_trees, task_names
from treelora_platform.summary import modes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 240  # more columns than this can't be told apart
Runs = Sequence[tuple[str, pa.Table]]  # name of a run, and its steps or scores


def save_figures(run_dir: Path, folder: Path | None = None, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw all that the run has data for into `folder` (default: `<run_dir>/figures`); returns the files
    written.

    Raises:
        DataError: a table or a tree of the run is damaged.
    """
    folder = folder or run_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in run_figures(run_dir):
        for extension in formats:
            path = folder / f"{name}.{extension}"
            data = to_svg(figure, name).encode() if extension == "svg" else render(figure, extension)
            path.write_bytes(data)
            paths.append(path)
    return paths


def run_figures(run_dir: Path) -> Iterator[tuple[str, Figure]]:
    """Name and figure, one after the other, so that only one is in memory."""
    scores, steps, names = read_scores(run_dir), read_steps(run_dir), task_names(run_dir)
    for mode in modes_of(scores):
        yield f"matrix-{slugify(mode)}", matrix_figure(scores, mode, names)
    if scores.num_rows:
        yield "transfer", transfer_figure([("", scores)])
    if steps.num_rows:
        yield "loss", loss_figure([("", steps)])
    if steps.num_rows > steps["arms"].null_count:
        yield "arms", arms_figure(steps, names)
    if steps.num_rows > steps["penalty_ratio"].null_count:
        yield "penalty", penalty_figure([("", steps)])
    yield from tree_figures(read_trees(run_dir))


def tree_figures(trees: Sequence[TreeSnapshot]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each tree that has a branch, all with one axis of diameters."""
    grown = [tree for tree in trees if len(tree.task) > 1]
    widest = max((max(tree.delta) for tree in grown), default=None)
    for tree in grown:
        yield f"tree-{tree.after_index:04d}", tree_figure(tree, widest)


def matrix_figure(scores: pa.Table, mode: str, names: dict[int, str]) -> Figure:
    """The matrix R of a mode as a heat map: a row a task, a column a training step of the stream."""
    from treelora.evaluation.matrix import matrix_from_table

    matrix = matrix_from_table(scores, mode)
    n = len(matrix)
    labels = [short(names.get(i, f"task {i}")) for i in range(n)]
    with new_figure(height=max(2.4, 0.9 + 0.34 * n), width=min(WIDTH, 3.2 + 0.5 * n)) as (figure, axes):
        image = draw_matrix(axes, matrix, fontsize=8, written=16)
        axes.set_xticks(range(n), labels, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), labels)
        axes.set(title=f"Score of each task, mode {mode}", xlabel="after training", ylabel="score on")
        score_bar(figure, image, axes, fraction=0.05, pad=0.03)
        return figure


def transfer_figure(runs: Runs) -> Figure:
    """OP (above) and BWT (below) after each task; a colour a mode, a line style a run."""
    from treelora.evaluation.matrix import backward_transfer, matrix_from_table, overall_performance

    modes = list(dict.fromkeys(mode for _, scores in runs for mode in modes_of(scores)))
    with new_figure(height=3.6, rows=2) as (figure, (upper, lower)):
        last = 1
        for (run, scores), style in zip(runs, LINES, strict=False):
            for mode in modes_of(scores):
                matrix = matrix_from_table(scores, mode)
                full = [n for n in range(1, len(matrix) + 1) if np.isfinite(matrix[:n, n - 1]).all()]
                known = [n for n in full if np.isfinite(matrix.diagonal()[:n]).all()]
                look: dict[str, Any] = {
                    "color": COLOURS[modes.index(mode) % len(COLOURS)],
                    "linestyle": style,
                    "marker": "o",
                    "markersize": 4,
                }
                label = f"{short(run, 36)}: {mode}" if run else mode
                upper.plot(full, [overall_performance(matrix, n) for n in full], label=label, **look)
                lower.plot(known, [backward_transfer(matrix, n) for n in known], **look)
                last = max(last, len(matrix))
        upper.set(title="Overall performance: mean score so far (more is better)", ylabel="OP (%)")
        upper.margins(y=0.15)
        lower.set(title="Backward transfer: what was forgotten (less is better)", ylabel="BWT (points)")
        lower.set(xlabel="tasks learnt", xticks=range(1, last + 1, max(1, last // 12)), xlim=(0.8, last + 0.2))
        lower.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
        for axes in (upper, lower):
            axes.grid(axis="y")
        legend_below(figure, upper)
        return figure


def loss_figure(runs: Runs) -> Figure:
    """Loss over steps, faint, and its moving mean; the first run's tasks are marked."""
    with new_figure(height=2.9) as (figure, axes):
        axes.set(title="Training loss", ylabel="loss (nats)")
        _curves(axes, runs, "loss", smooth=True)
        return figure


def penalty_figure(runs: Runs) -> Figure:
    """How far the penalty moves the adapter, against how far the loss does, over steps."""
    with new_figure(height=2.4) as (figure, axes):
        axes.set(title="Strength of the penalty", ylabel="update by penalty /\nupdate by loss")
        _curves(axes, runs, "penalty_ratio", smooth=False)
        return figure


def arms_figure(steps: pa.Table, names: dict[int, str]) -> Figure:
    """Which past task the layers chose: share of the layers, over steps (averaged where there are many)."""
    rows = steps.filter(steps["arms"].is_valid())
    at = rows["global_step"].to_numpy()
    arms = rows["arms"].to_pylist()
    tasks = 1 + max((max(row, default=0) for row in arms), default=0)
    share = np.array([np.bincount(np.array(row, dtype=int), minlength=tasks) / max(1, len(row)) for row in arms])
    edges = np.linspace(at[0] - 0.5, at[-1] + 0.5, min(BINS, at[-1] - at[0] + 1) + 1)
    bins = np.digitize(at, edges) - 1
    image = np.full((tasks, len(edges) - 1), np.nan)
    for b in np.unique(bins):
        image[:, b] = share[bins == b].mean(axis=0)
        image[rows["task_index"].to_numpy()[bins == b].max() :, b] = np.nan  # not learnt yet, so no arm
    with new_figure(height=max(2.0, 1.3 + 0.26 * tasks)) as (figure, axes):
        extent = (float(edges[0]), float(edges[-1]), tasks - 0.5, -0.5)
        shown = axes.imshow(
            np.ma.masked_invalid(image), cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=extent,
            interpolation="nearest",
        )  # fmt: skip
        axes.set_yticks(range(tasks), [short(names.get(i, f"task {i}")) for i in range(tasks)])
        axes.set(title="Arms: which past task the layers look at", xlabel="step", ylabel="past task")
        _mark_tasks(axes, rows)
        figure.colorbar(shown, ax=axes, label="share of layers", fraction=0.04, pad=0.02).outline.set_visible(False)
        return figure


def tree_figure(tree: TreeSnapshot, widest: float | None = None) -> Figure:
    """The tree as a dendrogram: leaves on the left, a branch at the diameter of the tasks below it.

    `widest` ends the axis of diameters (default: at this tree's own), so that trees can be compared.
    """
    place = [0.0] * len(tree.parent)
    leaves: list[int] = []
    waiting = [0]
    while waiting:
        node = waiting.pop()
        if tree.left[node] < 0:
            place[node] = float(len(leaves))
            leaves.append(node)
        else:
            waiting += [tree.right[node], tree.left[node]]
    with new_figure(height=0.95 + 0.25 * len(leaves)) as (figure, axes):
        for node in reversed(range(len(place))):  # children have larger numbers, so theirs are known
            if tree.left[node] < 0:
                continue
            children = (tree.left[node], tree.right[node])
            place[node] = (place[children[0]] + place[children[1]]) / 2
            axes.plot([tree.delta[node]] * 2, [place[c] for c in children], color=COLOURS[0], linewidth=1.6)
            for child in children:
                ends = [tree.delta[child], tree.delta[node]]
                axes.plot(ends, [place[child]] * 2, color=COLOURS[0], linewidth=1.6)
        axes.set_yticks(range(len(leaves)), [short(tree.names[tree.task[leaf]], 32) for leaf in leaves])
        axes.set(ylim=(len(leaves) - 0.5, -0.5), xlim=(0, (widest or max(tree.delta)) * 1.04 or 1))
        axes.set_xlabel("diameter of the tasks below: distance of signatures, mean over layers")
        axes.set_title(f"Tree after task {tree.after_index + 1}")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        return figure


def _mark_tasks(axes: Axes, steps: pa.Table) -> None:
    """Dotted lines where a task begins, and the names above the plot where they have room."""
    index, at = steps["task_index"].to_numpy(), steps["global_step"].to_numpy()
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    for n, row in enumerate(starts):
        if n:
            axes.axvline(at[row] - 0.5, color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        if len(starts) <= 8:
            end = starts[n + 1] - 1 if n + 1 < len(starts) else len(at) - 1
            name = short(str(steps["task"][int(row)].as_py()), 80 // len(starts))
            axes.annotate(
                name, ((at[row] + at[end]) / 2, 1), (0, 1), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="bottom", fontsize=7,
            )  # fmt: skip
    if len(starts) <= 8:
        axes.set_title(axes.get_title(loc="left"), pad=14, loc="left")


def _curves(axes: Axes, runs: Runs, column: str, *, smooth: bool) -> None:
    for i, (run, steps) in enumerate(runs):
        rows = steps.filter(steps[column].is_valid())
        at, values = rows["global_step"].to_numpy(), rows[column].to_numpy()
        look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
        if smooth:
            axes.plot(at, values, color=look["color"], alpha=0.3, linewidth=0.8)
            values = _smooth(values, rows["task_index"].to_numpy())
        axes.plot(at, values, label=short(run, 48), linewidth=1.6, **look)
    axes.set(xlabel="step", ylim=(0, None))
    axes.grid(axis="y")
    _mark_tasks(axes, runs[0][1].filter(runs[0][1][column].is_valid()))
    if len(runs) > 1:
        legend_below(axes.figure, axes)


def _smooth(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Centred moving mean over an eighth of a task's steps, within the task, of finite values."""
    smooth = np.full(len(values), np.nan)
    for task in np.unique(index):
        mine = index == task
        finite = np.isfinite(values[mine])
        kernel = np.ones(min(2 * (mine.sum() // 16) + 1, mine.sum()))
        total = np.convolve(np.where(finite, values[mine], 0.0), kernel, "same")
        count = np.convolve(finite.astype(float), kernel, "same")
        smooth[mine] = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return smooth
