"""What the terminal shows of runs, streams and tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from treelora.errors import DataError
from treelora_platform.run_tables import (
    TreeSnapshot,
    read_run_json,
    read_scores,
    read_steps,
    read_tasks,
    read_trees,
)
from treelora_platform.summary import modes_of, render_comparison, summarise

if TYPE_CHECKING:
    from treelora.data.sources import ImportReport
    from treelora.data.task import Task
    from treelora_platform.prepare import PreparedStream


def show_run(run_dir: Path, console: Console) -> None:
    """Matrices, OP and BWT, tree, arms, and where to look next.

    Raises:
        DataError: there is no run.
    """
    summary = summarise(run_dir)
    record = read_run_json(run_dir)
    console.rule(f"{escape(summary.name)} · {summary.method} · {record.get('status', 'unknown')}")
    show_matrices(run_dir, console)
    console.print(render_comparison([summary]))
    show_tree(run_dir, console)
    show_arms(run_dir, console)
    console.print(f"report: {run_dir / 'report.html'}", highlight=False)


def show_matrices(run_dir: Path, console: Console, modes: Sequence[str] | None = None) -> None:
    """The accuracy matrix of each inference mode."""
    from treelora.evaluation.matrix import matrix_from_table, render_matrix
    from treelora.evaluation.matrix import task_names as names_of

    scores = read_scores(run_dir)
    for mode in modes or modes_of(scores):
        part = matrix_from_table(scores, mode)
        console.print(render_matrix(part, names_of(scores), title=f"Score (%) after each task, inference {mode}"))


def show_tree(run_dir: Path, console: Console) -> None:
    """The tree after the last task, leaves labelled with family and vocabulary where they are known."""
    trees = read_trees(run_dir)
    if not trees:
        return
    labels = {
        row["task"]: " · ".join(filter(None, (row["family"], row["vocabulary"])))
        for row in read_tasks(run_dir).to_pylist()
    }
    console.print(tree_view(trees[-1], labels))


def tree_view(tree: TreeSnapshot, labels: dict[str, str]) -> Tree:
    """A tree as the terminal draws it; a node's number is its diameter, the distance of its farthest tasks."""

    def title(node: int) -> str:
        if tree.left[node] < 0:
            name = tree.names[tree.task[node]]
            label = labels.get(name)
            return f"[bold]{escape(name)}[/]" + (f"  [dim]{escape(label)}[/]" if label else "")
        return f"[cyan]δ {tree.delta[node]:.2f}[/]"

    def grow(node: int, branch: Tree) -> None:
        for child in (tree.left[node], tree.right[node]):
            if child >= 0:
                grow(child, branch.add(title(child)))

    root = Tree(f"[bold]Gradient-similarity tree[/]  {title(0)}")
    grow(0, root)
    return root


def show_arms(run_dir: Path, console: Console) -> None:
    """For each task, which past tasks its layers were compared with, as a share of all pulls."""
    from treelora.evaluation.matrix import shorten

    steps = read_steps(run_dir, columns=["task", "arms"])
    tasks = [row["task"] for row in read_tasks(run_dir).to_pylist()]
    pulls: dict[str, Counter[int]] = {}
    for task, arms in zip(steps["task"].to_pylist(), steps["arms"].to_pylist(), strict=True):
        if arms:
            pulls.setdefault(task, Counter()).update(arms)
    if not pulls:
        return
    title = "Arms pulled: share (%) of the past tasks, over layers and steps"
    table = Table(title=title, caption="a column a past task, numbered as the rows")
    table.add_column("task", no_wrap=True)
    for number in range(1, len(tasks)):
        table.add_column(str(number), justify="right")
    for task, counts in pulls.items():
        total = counts.total()
        shares = [f"{100 * counts[i] / total:.0f}" if i in counts else "" for i in range(len(tasks) - 1)]
        label = f"{tasks.index(task) + 1} {shorten(task, 24)}" if task in tasks else task
        table.add_row(escape(label), *shares)
    console.print(table)


def show_stream(prepared: PreparedStream, console: Console) -> None:
    """The tasks of a stream in order."""
    table = Table(title=f"Stream of {len(prepared.stream)} tasks")
    for column in ("#", "task", "kind", "metric", "choices", "rows left out"):
        table.add_column(column)
    for number, task in enumerate(prepared.stream, start=1):
        left_out = ", ".join(f"{count} {reason}" for reason, count in prepared.skipped.get(task.name, {}).items())
        table.add_row(str(number), escape(task.name), task.kind, task.metric, escape(", ".join(task.choices)), left_out)
    console.print(table)


def show_imports(reports: Sequence[ImportReport], console: Console) -> None:
    """What an import made, and which rows it could not use."""
    table = Table(title="Imported tasks")
    for column in ("task", "rows", "rows left out", "folder"):
        table.add_column(column)
    for report in reports:
        rows = ", ".join(f"{split} {count}" for split, count in report.rows.items())
        left_out = ", ".join(f"{count} {reason}" for reason, count in report.skipped.items())
        table.add_row(escape(report.task.name), rows, escape(left_out), str(Path(report.task.path("train")).parent))
    console.print(table)


def show_tasks(folder: Path, rows: int, console: Console) -> None:
    """Tasks in a folder, with some rows.

    Raises:
        DataError: no task is there.
    """
    from treelora.data import open_task

    found = (
        [folder] if (folder / "train.parquet").exists() else sorted(p.parent for p in folder.glob("*/train.parquet"))
    )
    if not found:
        raise DataError(f"{folder}: no task is there; `treelora data import` makes some")
    for place in found:
        task = open_task(place)
        protocol = f" ({task.protocol})" if task.protocol else ""
        choices = escape(", ".join(task.choices))
        console.print(f"[bold]{escape(task.name)}[/]  {task.kind}{protocol}, {task.metric}; {choices}")
        if task.kind == "image":
            show_images(task, rows, console)
            continue
        for split in task.splits:
            examples = task.read(split)
            console.print(f"  {split}: {len(examples)} rows")
            for example in examples[:rows]:
                console.print(
                    f"    {escape(repr(example.prompt[:200]))} -> {escape(repr(example.answer))}",
                    highlight=False,
                )


def show_images(task: Task, rows: int, console: Console) -> None:
    """Each split of an image task: images, classes, bytes and sizes, and the first rows.

    Raises:
        DataError: a file is damaged, or an image can't be decoded.
    """
    from treelora.data.images.summary import describe_images

    for split in task.splits:
        found = describe_images(task.path(split), rows)
        sizes = ", ".join(f"{width} x {height}: {count}" for (height, width), count in found.sizes)
        others = f", {found.other_sizes} of other sizes" if found.other_sizes else ""
        console.print(
            f"  {split}: {found.images} images of {found.classes} classes, {found.bytes:,} bytes; "
            f"pixels wide x high: {sizes}{others}",
            highlight=False,
        )
        for place, label, size in found.first:
            console.print(f"    {escape(place)} ({size:,} bytes) -> {escape(repr(label))}", highlight=False)
