"""Runs of a study that nobody trained: folders as real runs leave them, with scores that can be worked out by hand."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from tests.support.run_dir import SyntheticRun
from treelora_platform.config import ExperimentConfig
from treelora_platform.prepare import run_folder

STUDY = """
name: small
recipe: demo
reference: treelora
variants:
  treelora: {method: treelora}
  routed: {method: treelora, set: {treelora.preset: plus}, mode: routed}
  sequential: {method: sequential}
  joint: {method: joint}
  frozen: {method: frozen}
orders:
  - [time-colours, mood-directions]
  - [mood-directions, time-colours]
seeds: [0, 1]
steps: [4, 8]
quality: [treelora, sequential]
ablation: {neither: sequential, both: treelora}
tuning:
  orders: [[subject-colours, mood-colours]]
  seeds: [7]
  grid:
    train.learning_rate: [0.001, 0.002, 0.004]
  extra:
    treelora: {treelora.strength: [0.1, 0.5]}
"""


def fake_run(score: Callable[[ExperimentConfig], float], seen: list[str] | None = None):
    """A stand-in for `run_experiment`: each task is learnt at `score` percent and loses 10 points with each later one.

    Routed, it loses nothing. `seen` gets the names of the runs.
    """

    def run(config, console):
        if seen is not None:
            seen.append(config.name)
        names, top = list(config.stream.order), score(config)
        tasks = len(names)
        made = SyntheticRun(
            run_folder(config), names, name=config.name, method=config.method, steps_per_task=config.train.steps
        )
        if config.method == "frozen":
            for task in range(tasks):
                made.add_score("last", task, -1, top)
        elif config.method == "joint":
            made.write_scores(tasks - 1, {"last": [top] * tasks, "routed": [top] * tasks})
        else:
            for after in range(tasks):
                ages = [after - task for task in range(after + 1)]
                made.write_scores(after, {"last": [top - 10 * age for age in ages], "routed": [top] * (after + 1)})
        if config.method != "frozen":
            made.write_steps(1, tasks * config.train.steps)
            made.write_tasks(tasks)
        record = {"name": config.name, "status": "FINISHED", "config_hash": config.digest()}
        made.write_json("run.json", record | {"versions": {"commit": "4f70d1d"}})

    return run


def break_run(config: ExperimentConfig) -> None:
    """Make a complete run look interrupted."""
    path = run_folder(config) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "KILLED"}))


def lane_run(config: ExperimentConfig, console: object) -> None:
    """Runs for lanes, which take what can be pickled: `ewc` fails, `joint` kills its process, others end at 80 %.

    `sequential` says that it has begun, and then waits to be interrupted, as long as there is a file `wait`.
    """
    folder = run_folder(config).parent
    if config.method == "ewc":
        raise RuntimeError("the disk is full")
    if config.method == "joint":
        os._exit(9)
    if config.method == "sequential" and (folder / "wait").exists():
        (folder / f"begun-{config.name}").touch()
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            (folder / f"stopped-{config.name}").touch()
            raise
    fake_run(lambda config: 80)(config, console)
