"""What rank 0 writes while a run goes on: tables, adapters, trees, events; the files that everything else reads.

The tables of a commit hold exactly the steps up to it. Steps after it may be there as well after a crash; `rewind`
removes them, because the resumed run makes them again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from treelora.data.names import slugify
from treelora.data.task import Task
from treelora.evaluation.matrix import Score
from treelora.loop_records import Position, StepRecord, TaskRecord
from treelora_platform.run_tables import (
    SCORES,
    STEPS,
    TASKS,
    read_scores,
    read_table,
    read_tasks,
    steps_parts,
)

FLUSH_S = 5.0


class Recorder:
    """Tables and events of one run; owned by rank 0."""

    def __init__(self, run_dir: Path, tasks: Sequence[Task]):
        self.run_dir, self.tasks = run_dir, {task.name: task for task in tasks}
        for folder in ("tables/steps", "tree", "adapters"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)
        self._write_tasks()
        self._steps: list[StepRecord] = []
        self._flushed = time.monotonic()
        self._events = (run_dir / "events.jsonl").open("a", encoding="utf-8")
        if self._events.tell() and not (run_dir / "events.jsonl").read_bytes().endswith(b"\n"):
            self._events.write("\n")  # ends the line that a killed worker left torn

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line that the driver shows as progress."""
        self._events.write(json.dumps({"time": time.time(), "kind": kind, **fields}) + "\n")
        self._events.flush()

    def rewind(self, position: Position, units: Sequence[str]) -> None:
        """Forget what lies after a commit."""
        for part in steps_parts(self.run_dir):
            if part.last > position.global_step:
                part.path.unlink()
        done = set(units[: position.unit])
        for name, read in (("scores", read_scores), ("tasks", read_tasks)):
            table = read(self.run_dir)
            if name == "scores":  # rows of before training were written when the task before theirs was judged
                after = zip(table["after_task"].to_pylist(), table["task_index"].to_pylist(), strict=True)
                kept = [unit in done or (not unit and task <= position.unit and bool(done)) for unit, task in after]
            else:
                kept = [unit in done for unit in table["task"].to_pylist()]
            if table.num_rows:
                _write(table.filter(pa.array(kept)), self._table(name))
        for path in (self.run_dir / "tree").glob("*.json"):
            if int(path.name.split("-")[0]) >= position.unit + position.trained:
                path.unlink()

    def add_step(self, record: StepRecord) -> bool:
        """Keep a step; true where rows have just reached the disk."""
        self._steps.append(record)
        if time.monotonic() - self._flushed > FLUSH_S:
            return self.flush()
        return False

    def flush(self) -> bool:
        """Write the steps kept so far as one part."""
        self._flushed = time.monotonic()
        if not self._steps:
            return False
        rows = [asdict(record) for record in self._steps]
        first, last = rows[0]["global_step"], rows[-1]["global_step"]
        path = self.run_dir / "tables" / "steps" / f"{first:09d}-{last:09d}.parquet"
        _write(pa.Table.from_pylist(rows, schema=STEPS), path)
        self._steps = []
        return True

    def add_scores(self, scores: Sequence[Score], record: TaskRecord, memory_bytes: int | None) -> None:
        """Append a judged unit to the tables of scores and of tasks."""
        _append([asdict(score) for score in scores], SCORES, self._table("scores"))
        task = self.tasks.get(record.task)
        labels = {"family": task.family, "vocabulary": task.vocabulary} if task else {}
        _append([asdict(record) | labels | {"memory_bytes": memory_bytes}], TASKS, self._table("tasks"))

    def write_tree(self, unit: int, name: str, description: dict[str, Any]) -> None:
        """Write the tree as it is after a unit."""
        tree = description["tree"]
        if tree is None:
            return
        path = self.run_dir / "tree" / f"{unit:04d}-{slugify(name)}.json"
        plain = {"names": description["tasks"], **tree}
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(plain), encoding="utf-8")
        os.replace(scratch, path)

    def _write_tasks(self) -> None:
        """What must be known of the tasks to answer their prompts, when their data may be gone."""
        tasks = {name: {"kind": t.kind, "choices": t.choices, "metric": t.metric} for name, t in self.tasks.items()}
        scratch = self.run_dir / ".tasks.json"
        scratch.write_text(json.dumps(tasks, indent=1), encoding="utf-8")
        os.replace(scratch, self.run_dir / "tasks.json")

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._events.close()

    def _table(self, name: str) -> Path:
        return self.run_dir / "tables" / f"{name}.parquet"


def _append(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    if path.exists():
        table = pa.concat_tables([read_table(path, schema).cast(schema), table])
    _write(table, path)


def _write(table: pa.Table, path: Path) -> None:
    scratch = path.with_suffix(".tmp")
    pq.write_table(table, scratch)
    os.replace(scratch, path)
