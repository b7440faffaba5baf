"""Pictures of a SignatureTree: for the terminal, as a dendrogram, and as numbers for other plotting tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from treelora.errors import DataError

if TYPE_CHECKING:
    from rich.tree import Tree as RichTree

    from treelora.tree import SignatureTree


def linkage(tree: SignatureTree) -> np.ndarray:
    """[N - 1, 4] float64: the tree as `scipy.cluster.hierarchy` writes one.

    Rows by rising height; columns: two clusters (tasks 0..N-1, row i as N + i), height (mean delta over
    layers), tasks below. Heights never fall towards the root, for a node's tasks include its children's.
    """
    height = tree.delta.mean(axis=1)
    inner = np.flatnonzero(tree.left >= 0)
    # Children have larger numbers than their parent, so they come first among equal heights.
    inner = inner[np.lexsort((-inner, height[inner]))]
    cluster = np.where(tree.task >= 0, tree.task, 0)
    rows = np.zeros((len(inner), 4))
    for row, node in enumerate(inner):
        children = sorted((cluster[tree.left[node]], cluster[tree.right[node]]))
        rows[row] = [*children, height[node], tree.size[node]]
        cluster[node] = tree.tasks + row
    return rows


def render(tree: SignatureTree, names: Sequence[str], annotations: Mapping[str, str]) -> RichTree:
    """A `rich` tree: branches with their number of tasks and mean delta, leaves with name and annotation.

    Names are printed as they are, never read as markup. Raises: DataError for a wrong number of names.
    """
    from rich.text import Text
    from rich.tree import Tree

    _check_names(tree, names)
    branches: dict[int, RichTree] = {}
    for node in range(tree.nodes):
        if tree.left[node] >= 0:
            label = Text(f"{tree.size[node]} tasks", style="bold")
            label.append(f"  diameter {tree.delta[node].mean():.3f}", style="dim")
        else:
            name = names[tree.task[node]]
            label = Text(name)
            if name in annotations:
                label.append(f"  {annotations[name]}", style="dim")
        parent = branches.get(int(tree.parent[node]))
        branches[node] = parent.add(label) if parent is not None else Tree(label)
    return branches[0]


def draw(tree: SignatureTree, path: Path, names: Sequence[str], families: Sequence[str] | None) -> None:
    """Write the dendrogram to `path` as PNG: leaves on the left axis, merges at the branch's mean delta.

    families: one label a task; equal labels share a colour. Raises: DataError for a wrong number of names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    _check_names(tree, names)
    if families is not None:
        _check_names(tree, families)
    height = tree.delta.mean(axis=1)
    order = tree.task[tree.task >= 0]
    place = np.zeros(tree.nodes)
    place[tree.task >= 0] = np.arange(tree.tasks)

    figure = Figure(figsize=(7.0, 1.2 + 0.3 * tree.tasks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for node in np.flatnonzero(tree.left >= 0)[::-1]:
        children = [tree.left[node], tree.right[node]]
        place[node] = place[children].mean()
        axes.plot([height[node]] * 2, place[children], color="0.35", linewidth=1.2)
        for child in children:
            axes.plot([height[child], height[node]], [place[child]] * 2, color="0.35", linewidth=1.2)
    # parse_math=False: a "$" in a task's name is a dollar, not a formula.
    axes.set_yticks(range(tree.tasks), [names[task] for task in order], parse_math=False)
    axes.set_ylim(tree.tasks - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("diameter: largest residual between two tasks below, mean over layers")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if families is not None:
        colour = {family: f"C{index % 10}" for index, family in enumerate(sorted(set(families)))}
        for label, task in zip(axes.get_yticklabels(), order, strict=True):
            label.set_color(colour[families[task]])
        handles = [Line2D([], [], color=colour[family], marker="s", linestyle="") for family in colour]
        figure.legend(handles, list(colour), loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, format="png", dpi=150)


def _check_names(tree: SignatureTree, names: Sequence[str]) -> None:
    if len(names) != tree.tasks:
        raise DataError(f"{len(names)} names for {tree.tasks} tasks: pass one a task, in task order")
