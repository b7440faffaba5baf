"""Figures of a run: scores, OP and BWT, loss, arms, tree, penalty.

Colours are Okabe and Ito's, safe for colour-blind readers (https://jfly.uni-koeln.de/color/); runs differ by
the line's style too. Text keeps one ink, which an SVG inside a page takes from the page, so it is readable on
dark and light. Names of tasks are never read as formulas.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from treelora_platform.run_tables import TreeSnapshot, read_scores, read_steps, read_trees, task_names
from treelora_platform.summary import modes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)))
INK = "#3a3f47"
WIDTH = 7.2  # inches
SMOOTHING = 0.1  # weight of a new step in the loss curve's moving mean
BINS = 240  # more columns than this can't be told apart
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "treelora",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
}
Runs = Sequence[tuple[str, pa.Table]]


def save_figures(
    run_dir: Path, folder: Path | None = None, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
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
            data = to_svg(figure, name).encode() if extension == "svg" else _rendered(figure, extension)
            path.write_bytes(data)
            paths.append(path)
    return paths


def run_figures(run_dir: Path) -> Iterator[tuple[str, Figure]]:
    """Name and figure, one after the other, so that only one is in memory."""
    scores, steps, names = read_scores(run_dir), read_steps(run_dir), task_names(run_dir)
    for mode in modes_of(scores):
        yield f"matrix-{mode}", matrix_figure(scores, mode, names)
    if scores.num_rows:
        yield "transfer", transfer_figure([("", scores)])
    if steps.num_rows:
        yield "loss", loss_figure([("", steps)])
    if steps.num_rows > steps["arms"].null_count:
        yield "arms", arms_figure(steps, names)
    if steps.num_rows > steps["penalty_ratio"].null_count:
        yield "penalty", penalty_figure([("", steps)])
    for tree in read_trees(run_dir):
        yield f"tree-{tree.after_index:04d}", tree_figure(tree)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page: the page's text colour, ids that start with `name`."""
    svg = _rendered(figure, "svg").decode()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)


def matrix_figure(scores: pa.Table, mode: str, names: dict[int, str]) -> Figure:
    """The matrix R of a mode as a heat map: a row a task, a column a training step of the stream."""
    from matplotlib import colormaps

    from treelora.evaluation.matrix import matrix_from_table

    matrix = matrix_from_table(scores, mode)
    n = len(matrix)
    labels = [_short(names.get(i, f"task {i}")) for i in range(n)]
    with _figure(height=max(2.4, 0.9 + 0.34 * n), width=min(WIDTH, 3.2 + 0.5 * n)) as (figure, axes):
        image = axes.imshow(np.ma.masked_invalid(matrix), cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value) and n <= 16:
                red, green, blue, _ = colormaps["cividis"](value / 100)
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.45 else "white"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=8)
        axes.set_xticks(range(n), labels, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), labels)
        axes.set(title=f"Score of each task, mode {mode}", xlabel="after training", ylabel="score on")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, label="score (%)", fraction=0.05, pad=0.03).outline.set_visible(False)
        return figure


def transfer_figure(runs: Runs) -> Figure:
    """OP (above) and BWT (below) after each task; a colour a mode, a line style a run."""
    from treelora.evaluation.matrix import backward_transfer, matrix_from_table, overall_performance

    modes = list(dict.fromkeys(mode for _, scores in runs for mode in modes_of(scores)))
    with _figure(height=3.6, rows=2) as (figure, (upper, lower)):
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
                label = f"{run}: {mode}" if run else mode
                upper.plot(full, [overall_performance(matrix, n) for n in full], label=label, **look)
                lower.plot(known, [backward_transfer(matrix, n) for n in known], **look)
                last = max(last, len(matrix))
        upper.set(
            title="Overall performance: mean score so far (more is better)", ylabel="OP (%)", ylim=(0, 102)
        )
        lower.set(title="Backward transfer: what was forgotten (less is better)", ylabel="BWT (points)")
        lower.set(
            xlabel="tasks learnt", xticks=range(1, last + 1, max(1, last // 12)), xlim=(0.8, last + 0.2)
        )
        lower.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
        for axes in (upper, lower):
            axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=min(4, max(1, len(modes) * len(runs))))
        return figure


def loss_figure(runs: Runs) -> Figure:
    """Loss over steps, faint, and its moving mean; the boundaries of the first run's tasks are marked."""
    with _figure(height=2.9) as (figure, axes):
        for i, (run, steps) in enumerate(runs):
            at, loss = steps["global_step"].to_numpy(), steps["loss"].to_numpy()
            colour, style = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
            axes.plot(at, loss, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(at, _smooth(steps), color=colour, linewidth=1.6, linestyle=style, label=run)
        axes.set(title="Training loss", xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
        axes.grid(axis="y")
        _mark_tasks(axes, runs[0][1])
        if len(runs) > 1:
            figure.legend(loc="outside lower center", ncols=len(runs))
        return figure


def arms_figure(steps: pa.Table, names: dict[int, str]) -> Figure:
    """Which past task the layers chose: share of the layers, over steps (averaged where there are many)."""
    rows = steps.filter(steps["arms"].is_valid())
    at = rows["global_step"].to_numpy()
    arms = rows["arms"].to_pylist()
    tasks = 1 + max((max(row, default=0) for row in arms), default=0)
    share = np.array(
        [np.bincount(np.array(row, dtype=int), minlength=tasks) / max(1, len(row)) for row in arms]
    )
    edges = np.linspace(at[0] - 0.5, at[-1] + 0.5, min(BINS, at[-1] - at[0] + 1) + 1)
    bins = np.digitize(at, edges) - 1
    image = np.full((tasks, len(edges) - 1), np.nan)
    for b in np.unique(bins):
        image[:, b] = share[bins == b].mean(axis=0)
    with _figure(height=max(2.0, 1.3 + 0.26 * tasks)) as (figure, axes):
        extent = (float(edges[0]), float(edges[-1]), tasks - 0.5, -0.5)
        shown = axes.imshow(
            np.ma.masked_invalid(image), cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=extent,
            interpolation="nearest",
        )  # fmt: skip
        axes.set_yticks(range(tasks), [_short(names.get(i, f"task {i}")) for i in range(tasks)])
        axes.set(title="Arms: which past task the layers look at", xlabel="step", ylabel="past task")
        _mark_tasks(axes, rows, colour="white")
        figure.colorbar(shown, ax=axes, label="share of layers", fraction=0.04, pad=0.02).outline.set_visible(
            False
        )
        return figure


def penalty_figure(runs: Runs) -> Figure:
    """How far the penalty moves the adapter, against how far the loss does, over steps."""
    with _figure(height=2.4) as (figure, axes):
        for i, (run, steps) in enumerate(runs):
            rows = steps.filter(steps["penalty_ratio"].is_valid())
            look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
            axes.plot(rows["global_step"].to_numpy(), rows["penalty_ratio"].to_numpy(), label=run, **look)
        axes.set(title="Strength of the penalty", xlabel="step", ylim=(0, None))
        axes.set_ylabel("update by penalty /\nupdate by loss")
        axes.grid(axis="y")
        _mark_tasks(axes, runs[0][1])
        if len(runs) > 1:
            figure.legend(loc="outside lower center", ncols=len(runs))
        return figure


def tree_figure(tree: TreeSnapshot) -> Figure:
    """The tree as a dendrogram: leaves on the left, a branch at the diameter of the tasks below it."""
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
    with _figure(height=0.95 + 0.25 * len(leaves)) as (figure, axes):
        for node in reversed(range(len(place))):  # children have larger numbers, so theirs are known
            if tree.left[node] < 0:
                continue
            children = (tree.left[node], tree.right[node])
            place[node] = (place[children[0]] + place[children[1]]) / 2
            axes.plot([tree.delta[node]] * 2, [place[c] for c in children], color=COLOURS[0], linewidth=1.6)
            for child in children:
                ends = [tree.delta[child], tree.delta[node]]
                axes.plot(ends, [place[child]] * 2, color=COLOURS[0], linewidth=1.6)
        axes.set_yticks(range(len(leaves)), [_short(tree.names[tree.task[leaf]], 32) for leaf in leaves])
        axes.set(ylim=(len(leaves) - 0.5, -0.5), xlim=(0, max(*tree.delta, 1e-9) * 1.04))
        axes.set_xlabel("diameter of the tasks below: distance of signatures, mean over layers")
        axes.set_title(f"Tree after task {tree.after_index + 1}")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        return figure


@contextmanager
def _figure(height: float, width: float = WIDTH, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    # A Figure without pyplot: no global state, and no window system is asked for.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, 1, sharex=True)


def _rendered(figure: Figure, extension: str) -> bytes:
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # names may be in a script that the font lacks; in a page the browser has it
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        if extension == "svg":
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(out, format=extension, dpi=150, facecolor="white")
    return out.getvalue()


def _mark_tasks(axes: Axes, steps: pa.Table, colour: str = INK) -> None:
    """Dotted lines where a task begins, and the names above the plot where they have room."""
    index, at = steps["task_index"].to_numpy(), steps["global_step"].to_numpy()
    starts = np.flatnonzero(np.diff(index, prepend=index[0] - 1)) if len(index) else []
    for n, row in enumerate(starts):
        if n:
            axes.axvline(at[row] - 0.5, color=colour, linewidth=0.8, linestyle=":", alpha=0.7)
        if len(starts) <= 8:
            end = starts[n + 1] - 1 if n + 1 < len(starts) else len(at) - 1
            name = _short(str(steps["task"][int(row)].as_py()), 80 // len(starts))
            axes.annotate(
                name, ((at[row] + at[end]) / 2, 1), (0, 1), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="bottom", fontsize=7, alpha=0.8,
            )  # fmt: skip
    if len(starts) <= 8:
        axes.set_title(axes.get_title(loc="left"), pad=14, loc="left")


def _smooth(steps: pa.Table) -> np.ndarray:
    """Moving mean of the loss, anew for each task; steps without a finite loss are passed over."""
    loss, index = steps["loss"].to_numpy(), steps["task_index"].to_numpy()
    smooth = np.empty_like(loss)
    mean = np.nan
    for i, value in enumerate(loss):
        fresh = i == 0 or index[i] != index[i - 1] or not np.isfinite(mean)
        if np.isfinite(value):
            mean = value if fresh else mean + SMOOTHING * (value - mean)
        smooth[i] = mean
    return smooth


def _short(name: str, width: int = 18) -> str:
    return name if len(name) <= width else f"{name[: width - 5]}…{name[-4:]}"
