"""Reading what a run directory holds: step, score and task tables, and the tree after each task.

Tracking, summary, figures and report all read a run through this file, so none of them needs the process that
wrote it. The matrix R that `scores.parquet` amounts to is `R[task_index, after_index]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from treelora.data.parquet import opened
from treelora.errors import DataError, one_line

PRECISION_JSON = "precision.json"
STEPS = pa.schema(
    [
        pa.field("global_step", pa.int64(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("task_index", pa.int32(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("time_unix_ms", pa.int64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("lr", pa.float64(), nullable=False),
        pa.field("grad_norm", pa.float64(), nullable=False),
        pa.field("step_seconds", pa.float64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("rows", pa.int32(), nullable=False),
        pa.field("peak_memory_mb", pa.float64()),
        pa.field("data_seconds", pa.float64()),
        pa.field("penalty_loss", pa.float64()),
        pa.field("penalty_ratio", pa.float64()),
        pa.field("sparsity", pa.float64()),
        pa.field("lcb_mean", pa.float64()),
        pa.field("observation_mean", pa.float64()),
        pa.field("arms", pa.list_(pa.int32())),
    ]
)
SCORES = pa.schema(
    [
        pa.field("mode", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("after_task", pa.string()),
        pa.field("task_index", pa.int32(), nullable=False),
        pa.field("after_index", pa.int32(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("rows", pa.int32()),
        pa.field("seconds", pa.float64()),
    ]
)
TASKS = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("task_index", pa.int32(), nullable=False),
        pa.field("family", pa.string()),
        pa.field("vocabulary", pa.string()),
        pa.field("steps", pa.int64()),
        pa.field("train_seconds", pa.float64()),
        pa.field("eval_seconds", pa.float64()),
        pa.field("tokens", pa.int64()),
        pa.field("passes", pa.int64()),
        pa.field("adapter_bytes", pa.int64()),
        pa.field("state_bytes", pa.int64()),
        pa.field("memory_bytes", pa.int64()),
        pa.field("router_accuracy", pa.float64()),
        pa.field("fallback_share", pa.float64()),
        pa.field("mixed_up", pa.list_(pa.list_(pa.int32()))),
    ]
)
_PART = re.compile(r"(\d+)-(\d+)\.parquet")
_TREE = re.compile(r"(\d+)-.*\.json")


@dataclass(frozen=True)
class StepsPart:
    """One Parquet part of the steps table; `first` and `last` are global steps, both inside."""

    path: Path
    first: int
    last: int


@dataclass(frozen=True)
class TreeSnapshot:
    """The tree after a task in array form: node 0 is the root, -1 stands for none."""

    after_index: int
    names: tuple[str, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    parent: tuple[int, ...]
    task: tuple[int, ...]
    delta: tuple[float, ...]


def steps_parts(run_dir: Path) -> list[StepsPart]:
    """The parts in order of their first step; files with other names (half-written ones) are not parts."""
    folder = run_dir / "tables" / "steps"
    found = ((path, _PART.fullmatch(path.name)) for path in (folder.iterdir() if folder.is_dir() else ()))
    parts = [StepsPart(path, int(match[1]), int(match[2])) for path, match in found if match]
    return sorted(parts, key=lambda part: (part.first, part.last))


def read_steps(run_dir: Path, after: int = -1, columns: list[str] | None = None) -> pa.Table:
    """Rows with `global_step > after`, in order of steps, each step once.

    A resumed run may have written steps again in parts that are cut elsewhere; the later part wins.

    Raises:
        DataError: a part that can't be read, or lacks a column, or has another type there.
    """
    schema = STEPS if columns is None else pa.schema([STEPS.field(name) for name in ["global_step", *columns]])
    tables = [read_table(part.path, schema) for part in steps_parts(run_dir) if part.last > after]
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    steps = table["global_step"].to_numpy()
    order = np.argsort(steps, kind="stable")
    sorted_steps = steps[order]
    is_last = np.append(sorted_steps[1:] != sorted_steps[:-1], True)[: len(sorted_steps)]
    return table.take(order[is_last & (sorted_steps > after)])


def read_scores(run_dir: Path) -> pa.Table:
    """`scores.parquet`, empty where there is none yet. Raises `DataError` like `read_steps`."""
    path = run_dir / "tables" / "scores.parquet"
    return read_table(path, SCORES) if path.exists() else SCORES.empty_table()


def read_tasks(run_dir: Path) -> pa.Table:
    """`tasks.parquet` in order of learning, empty where there is none yet. Raises `DataError` like
    `read_steps`.
    """
    path = run_dir / "tables" / "tasks.parquet"
    return read_table(path, TASKS).sort_by("task_index") if path.exists() else TASKS.empty_table()


def task_names(run_dir: Path) -> dict[int, str]:
    """Index to name of every task that the run has met."""
    pairs: Iterator[tuple[int, str]] = (
        (row["task_index"], row["task"])
        for table in (
            read_scores(run_dir),
            read_tasks(run_dir),
            read_steps(run_dir, columns=["task", "task_index"]),
        )
        for row in table.select(["task_index", "task"]).group_by(["task_index", "task"]).aggregate([]).to_pylist()
    )
    return dict(sorted(pairs))


def read_trees(run_dir: Path) -> list[TreeSnapshot]:
    """The tree after each task, in order.

    Raises:
        DataError: a file that is not such a tree; parents must come before the children, so there are no
        cycles.
    """
    folder = run_dir / "tree"
    found = ((path, _TREE.fullmatch(path.name)) for path in (folder.iterdir() if folder.is_dir() else ()))
    trees = [_read_tree(path, int(match[1])) for path, match in found if match]
    return sorted(trees, key=lambda tree: tree.after_index)


def read_task_choices(run_dir: Path) -> dict[str, tuple[str, ...]]:
    """Names of the stream's tasks in order, from `tasks.json`, and what their answers are chosen from; () is free text.

    Empty where a run of an earlier version has none. Raises `DataError` for a file that holds something else.
    """
    path = run_dir / "tasks.json"
    plain = _mapping(path, json.loads)
    try:
        return {str(name): tuple(map(str, task["choices"])) for name, task in plain.items()}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: is not a mapping of tasks to what they are ({error!r})") from None


def read_run_json(run_dir: Path) -> dict[str, Any]:
    """`run.json`, empty where there is none. Raises `DataError` for a file that holds something else."""
    return _mapping(run_dir / "run.json", json.loads)


def read_begun_dtype(run_dir: Path) -> str | None:
    """What the frozen weights of a run are kept in, from `precision.json`; None where it hasn't begun, or doesn't say.

    Raises `DataError` for a file that holds something else.
    """
    path = run_dir / PRECISION_JSON
    plain = _mapping(path, json.loads)
    if plain and plain.get("dtype") not in ("float32", "bfloat16"):
        raise DataError(f"{path}: dtype {plain.get('dtype')!r}, expected float32 or bfloat16")
    return plain.get("dtype")


def read_config_yaml(run_dir: Path) -> dict[str, Any]:
    """`config.yaml` as plain values, empty where there is none. Raises `DataError` if it is no mapping."""
    return _mapping(run_dir / "config.yaml", yaml.safe_load)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`, and no others, from a Parquet file; a missing nullable column is all null.

    Types are looked at before values: an extension type that some package has registered may run code on
    reading.

    Raises:
        DataError: names the file, the column, what was expected and what was found.
    """
    try:
        with opened(path) as file:
            found = file.schema_arrow
            for field in schema:
                _check_field(path, field, found)
            present = [field.name for field in schema if field.name in found.names]
            table = file.read(columns=present)
        for field in schema:
            if field.name not in table.column_names:
                table = table.append_column(field.name, pa.nulls(table.num_rows, field.type))
            elif not field.nullable and table[field.name].null_count:
                raise DataError(f"{path}: column {field.name!r} has empty values; write the table again")
        return table.select(schema.names).cast(pa.schema([field.with_nullable(True) for field in schema]))
    except pa.ArrowException as error:
        raise DataError(f"{path}: can't be read as Parquet ({one_line(error)})") from None


def _check_field(path: Path, field: pa.Field, found: pa.Schema) -> None:
    if field.name not in found.names:
        if not field.nullable:
            raise DataError(f"{path}: has no column {field.name!r}; it has {', '.join(found.names)}")
        return
    kind = found.field(field.name).type
    if _family(kind) not in (_family(field.type), "null" if field.nullable else ""):
        raise DataError(f"{path}: column {field.name!r} is {kind}, expected {field.type}")


def _family(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "string"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list of {_family(kind.value_type)}"
    return "null" if pa.types.is_null(kind) else f"other ({kind})"


def _read_tree(path: Path, after_index: int) -> TreeSnapshot:
    plain = _mapping(path, json.loads)
    try:
        names = tuple(str(name) for name in plain["names"])
        left, right, task = (tuple(int(n) for n in plain[column]) for column in ("left", "right", "task"))
        # a number a node, or a number a node and layer
        delta = tuple(float(np.mean(value)) for value in plain["delta"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is not a tree of arrays names, left, right, task, delta ({error!r})") from None
    if not left or len({len(left), len(right), len(task), len(delta)}) != 1:
        raise DataError(f"{path}: the arrays left, right, task, delta differ in length or are empty")
    parent = [-1] * len(left)
    for node, children in enumerate(zip(left, right, strict=True)):
        leaf = children == (-1, -1)
        # children come after their parent, so there are no cycles
        if not leaf and any(not node < child < len(left) or parent[child] != -1 for child in children):
            raise DataError(f"{path}: node {node} has children {children}; they must follow it and be its own")
        if leaf and not 0 <= task[node] < len(names):
            raise DataError(f"{path}: leaf {node} is task {task[node]}, but there are {len(names)} names")
        for child in () if leaf else children:
            parent[child] = node
    if -1 in parent[1:] or any(left[node] == right[node] != -1 for node in range(len(left))):
        raise DataError(f"{path}: not every node but the first is the child of one node")
    return TreeSnapshot(after_index, names, left, right, tuple(parent), task, delta)


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        plain = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise DataError(f"{path}: can't be read ({one_line(error)})") from None
    if not isinstance(plain, dict):
        raise DataError(f"{path}: holds a {type(plain).__name__}, expected a mapping")
    return plain
