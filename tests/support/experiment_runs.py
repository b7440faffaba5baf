"""An experiment that nobody trained: run folders with scores, arms and trees that look like real ones, and a history
that reads them instead of MLflow.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np

from tests.support.run_dir import START_MS, SyntheticRun
from treelora_platform.experiments.records import RunRecord, record_from
from treelora_platform.run_points import final_points, score_points
from treelora_platform.run_tables import read_scores
from treelora_platform.tracking import TrackingError

TASKS = ("time-colours", "mood-colours", "mood-directions", "time-directions", "subject-colours")
LAYERS = 12
# What a task's adapter shares with the tasks before it: colours go with colours, directions with directions.
FAMILIES = (0, 0, 1, 1, 0)


class LikelyRun(SyntheticRun):
    """A run whose layers settle on the newest past task of the same family, the deeper the later."""

    def step_row(self, step, *, late_ms=0):
        row = super().step_row(step, late_ms=late_ms)
        task, within = row["task_index"], row["step"]
        rng = np.random.default_rng([step, len(self.names), sum(map(ord, self.name))])
        row["loss"] = 0.4 + 2.2 * math.exp(-within / 6) + 0.08 * float(rng.standard_normal())
        if task == 0 or self.method != "treelora":
            return row | {"arms": None, "penalty_ratio": None, "lcb_mean": None, "observation_mean": None}
        kin = [past for past in range(task) if FAMILIES[past] == FAMILIES[task]] or [task - 1]
        settled = rng.random(LAYERS) < np.clip(within / 14 + 0.3 - np.arange(LAYERS) / 40, 0, 0.95)
        arms = np.where(settled, kin[-1], rng.integers(0, task, LAYERS))
        return row | {"arms": arms.tolist(), "penalty_ratio": 0.2 + 0.25 * math.exp(-within / 9) + 0.03 * task}


def likely_run(
    path: Path, method: str, seed: int, level: float, kept: float, *, tasks=TASKS, name=None
) -> SyntheticRun:
    """A whole run: tasks are learnt at about `level` percent; what is above 20 % shrinks by `kept` with each later one.

    The seed shifts the scores, alike for all methods; the method adds a little noise of its own.
    """
    run = LikelyRun(
        path, list(tasks), name=name or f"{method}-seed{seed}", method=method, steps_per_task=18, part_rows=18
    )
    shared, own = np.random.default_rng(seed), np.random.default_rng([seed, sum(map(ord, method))])
    routed = 0.6 + 0.2 * float(own.random())
    levels = level + 4 * shared.standard_normal(len(tasks)) + 0.7 * own.standard_normal(len(tasks))
    for after in range(len(tasks)):
        run.write_steps(after * 18 + 1, after * 18 + 18)
        last = [20 + (levels[i] - 20) * kept ** (after - i) for i in range(after + 1)]
        run.write_scores(after, {"last": last, "routed": [levels[i] - routed * (after - i) for i in range(after + 1)]})
        run.write_tasks(after + 1)
        if method == "treelora":
            run.write_tree(after)
    return run


def metrics_of(run: SyntheticRun) -> dict[str, list[tuple[int, float]]]:
    """What tracking sends of a run: curves of scores, and the numbers of its end."""
    found: dict[str, list[tuple[int, float]]] = {}
    for point in [*score_points(read_scores(run.path), {}), *final_points(run.path)]:
        found.setdefault(point.key, []).append((point.step, point.value))
    return found


class FolderHistory:
    """Stands in for `History`: the runs are folders. `broken` are ids whose artifacts can't be had."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.metrics: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self.broken: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.records: list[RunRecord] = []

    def add(self, run: SyntheticRun | None, params, tags=None, *, name="run", status="FINISHED", metrics=None):
        """Take a run up, and return its record; None: a run without artifacts."""
        run_id = f"{len(self.folders):032x}"
        self.metrics[run_id] = (metrics_of(run) if run else {}) | (metrics or {})
        self.folders[run_id] = run.path if run else Path("nowhere")
        record = record_from(
            run_id=run_id, name=run.name if run else name, status=status, start_unix_ms=START_MS + len(self.folders),
            end_unix_ms=None if status == "RUNNING" else START_MS + 60_000 + len(self.folders),
            params={key: str(value) for key, value in params.items()}, tags=tags or {},
            metrics={key: points[-1][1] for key, points in self.metrics[run_id].items()}, artifact_uri="file:none",
        )  # fmt: skip
        self.records.append(record)
        return record

    def runs(self, experiment: str) -> list[RunRecord]:
        return self.records

    def curve(self, run_id: str, key: str) -> list[tuple[int, float]]:
        self.asked.append((run_id, key))
        return self.metrics[run_id].get(key, [])

    def download(self, run_id: str, folder: Path, parts=("config.yaml", "run.json", "tables", "tree")) -> Path:
        self.asked.extend((run_id, part) for part in parts)
        if run_id in self.broken:
            raise TrackingError("MLflow at http://nowhere: connection refused")
        for part in parts:
            source, target = self.folders[run_id] / part, folder / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy(source, target)
        return folder


def params_of(method: str, seed: int, **more) -> dict[str, object]:
    """A configuration as tracking records it, with dots for two underscores."""
    base = {"method": method, "seed": seed, "lora.rank": 8, "train.learning_rate": 0.001, "model.name": "tiny"}
    return base | {key.replace("__", "."): value for key, value in more.items()}


def tags_of(method: str, seed: int, tasks=TASKS) -> dict[str, str]:
    """The tags of a run that `run.py` sets."""
    return {
        "method": method, "seed": str(seed), "order": ", ".join(tasks), "stream": "builtin", "data_hash": "5eed",
        "version.torch": "2.13.0", "version.commit": "4f70d1d",
    }  # fmt: skip


def methods_experiment(folder: Path, history: FolderHistory, seeds=(0, 1, 2, 3)) -> list[RunRecord]:
    """Three methods, paired by seed: one keeps much more than the others and costs a little more, two are alike."""
    made = {"treelora": (78.0, 0.96, 52.0), "ewc": (76.0, 0.86, 74.0), "sequential": (76.0, 0.855, 45.0)}
    records = []
    for seed in seeds:
        for method, (level, kept, seconds) in made.items():
            run = likely_run(folder / f"{method}-{seed}", method, seed, level, kept)
            took = seconds * (1 + 0.05 * float(np.random.default_rng([seed, len(method)]).standard_normal()))
            end = {"final/seconds": [(len(TASKS), took)]}
            records.append(history.add(run, params_of(method, seed), tags_of(method, seed), metrics=end))
    return records
