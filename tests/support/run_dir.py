"""A synthetic run directory with numbers that are easy to work out by hand."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from treelora_platform.run_tables import SCORES, STEPS, TASKS

START_MS = 1_700_000_000_000
LAYERS = 4


@dataclass
class SyntheticRun:
    """Writes the files that a real run leaves, task by task.

    Step g (from 1, over all tasks): loss 4 / g, 0.5 s, 100 tokens, time START_MS + 1000 g. From the second
    task on layer l pulls the arm (g + l) mod (number of past tasks).
    """

    path: Path
    names: list[str]
    name: str = "synthetic"
    method: str = "treelora"
    steps_per_task: int = 6
    part_rows: int = 3
    scores: list[dict] = field(default_factory=list)

    def __post_init__(self):
        (self.path / "tables" / "steps").mkdir(parents=True)
        (self.path / "tree").mkdir()
        self.write_json(
            "run.json",
            {
                "name": self.name,
                "mlflow_run_id": None,
                "status": "RUNNING",
                "config_hash": "c0ffee",
                "versions": {"python": "3.11.9", "torch": "2.13.0", "commit": "4f70d1d"},
                "created": "2026-01-02T03:04:05Z",
            },
        )
        (self.path / "config.yaml").write_text(
            f"name: {json.dumps(self.name)}\nmethod: {self.method}\nseed: 0\nlora: {{rank: 8, alpha: 32.0}}\n"
        )

    def write_json(self, name, value):
        (self.path / name).write_text(json.dumps(value))

    def step_row(self, step, *, late_ms=0):
        task = (step - 1) // self.steps_per_task
        arms = [(step + layer) % task for layer in range(LAYERS)] if task else None
        return {
            "global_step": step, "task": self.names[task], "task_index": task,
            "step": (step - 1) % self.steps_per_task + 1, "time_unix_ms": START_MS + 1000 * step + late_ms,
            "loss": 4 / step, "lr": 1e-3, "grad_norm": 1.5, "step_seconds": 0.5, "tokens": 100, "rows": 8,
            "peak_memory_mb": 512.0, "penalty_ratio": 0.1 * task if task else None, "sparsity": None,
            "lcb_mean": -0.2 if task else None, "observation_mean": 0.4 if task else None, "arms": arms,
        }  # fmt: skip

    def write_steps(self, first, last, *, late_ms=0):
        rows = [self.step_row(step, late_ms=late_ms) for step in range(first, last + 1)]
        path = self.path / "tables" / "steps" / f"{first:08d}-{last:08d}.parquet"
        half_written = path.with_suffix(".tmp")
        pq.write_table(pa.Table.from_pylist(rows, schema=STEPS), half_written)
        half_written.replace(path)

    def add_score(self, mode, task, after, score):
        """R[task, after] of a mode; `after` -1 is before training."""
        self.scores.append(
            {
                "mode": mode, "task": self.names[task], "after_task": self.names[after] if after >= 0 else "",
                "task_index": task, "after_index": after, "metric": "accuracy", "score": score, "rows": 50,
                "seconds": 1.0,
            }
        )  # fmt: skip
        pq.write_table(pa.Table.from_pylist(self.scores, schema=SCORES), self.path / "tables" / "scores.parquet")

    def write_scores(self, after, columns):
        """`columns`: mode -> scores of the tasks 0, 1, ... after that task."""
        for mode, values in columns.items():
            for task, score in enumerate(values):
                self.add_score(mode, task, after, score)

    def write_tasks(self, learnt):
        rows = [
            {
                "task": name, "task_index": i, "family": f"family {i % 2}", "vocabulary": None,
                "steps": self.steps_per_task, "train_seconds": 0.5 * self.steps_per_task, "eval_seconds": 2.0,
                "tokens": 100 * self.steps_per_task, "passes": self.steps_per_task, "adapter_bytes": 1000 * (i + 1),
                "state_bytes": 0, "memory_bytes": 100 * (i + 1),
                "router_accuracy": 90.0 if i else None,
            }
            for i, name in enumerate(self.names[:learnt])
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows, schema=TASKS), self.path / "tables" / "tasks.parquet")

    def write_tree(self, after):
        """A comb: each new task joins the root of the tree before it."""
        leaves = after + 1
        left, right, task = [-1] * (2 * leaves - 1), [-1] * (2 * leaves - 1), [-1] * (2 * leaves - 1)
        delta = [0.0] * (2 * leaves - 1)
        for i in range(leaves - 1):
            left[2 * i], right[2 * i] = 2 * i + 2, 2 * i + 1
            task[2 * i + 1], delta[2 * i] = leaves - 1 - i, 0.3 + 0.2 * (leaves - 2 - i)
        task[-1] = 0
        parent = [-1] * len(left)
        for node, children in enumerate(zip(left, right, strict=True)):
            for child in children:
                if child >= 0:
                    parent[child] = node
        self.write_json(
            f"tree/{after}-task-{after}.json",
            {
                "names": self.names[:leaves],
                "left": left,
                "right": right,
                "parent": parent,
                "task": task,
                "delta": delta,
            },
        )


def finished_run(path, names=("alpha", "beta", "gamma"), *, drop=10.0, **options):
    """A whole run: each task is learnt at 90 %, and loses `drop` points in mode `last` with every later task.

    Mode `routed` loses a tenth of that. So for three tasks and drop 10: R_last[0] = 90, 80, 70; OP = 80 and
    BWT = 10.
    """
    run = SyntheticRun(Path(path), list(names), **options)
    for after in range(len(run.names)):
        first = after * run.steps_per_task + 1
        for start in range(first, first + run.steps_per_task, run.part_rows):
            run.write_steps(start, min(start + run.part_rows, first + run.steps_per_task) - 1)
        ages = [after - i for i in range(after + 1)]
        run.write_scores(after, {"last": [90 - drop * a for a in ages], "routed": [90 - drop / 10 * a for a in ages]})
        run.write_tasks(after + 1)
        run.write_tree(after)
    return run
