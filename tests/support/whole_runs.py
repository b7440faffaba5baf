"""Whole runs of three small tasks on a local Ray, what they left, and what kills their workers."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from tests.support.streams import commits, digests, tiny_config
from tests.support.waiting import wait_for
from treelora_platform.config import ExperimentConfig
from treelora_platform.run_tables import read_run_json, read_scores, read_steps
from treelora_platform.tracking import resolve_tracking_uri

TRAIN_WORKER = "RayTrainWorker"
STEPS = 6


def config_in(folder: Path, **changes: Any) -> ExperimentConfig:
    settings: dict[str, Any] = {
        "engine": {"kind": "deepspeed", "zero_stage": 2},
        "cluster": {"workers": 2},
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 2, "keep": 2},
    }
    return tiny_config(folder, **settings | changes)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@dataclass(frozen=True)
class Result:
    """What a finished run left, read at once."""

    digests: dict[str, str]
    trees: dict[str, str]
    scores: Any
    losses: list[float]
    arms: list[Any]

    @classmethod
    def of(cls, run_dir: Path) -> Result:
        steps = read_steps(run_dir).to_pylist()
        return cls(
            digests=digests(commits(run_dir)[-1]),
            trees={path.name: path.read_text() for path in sorted((run_dir / "tree").glob("*.json"))},
            scores=read_scores(run_dir).drop_columns(["seconds"]).to_pylist(),
            losses=[step["loss"] for step in steps],
            arms=[step["arms"] for step in steps],
        )


def adapters(run_dir: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (run_dir / "adapters").glob("*/adapter_model.safetensors")}


def points(run_dir: Path, metric: str = "loss") -> list[int]:
    client = MlflowClient(resolve_tracking_uri(None, run_dir.parent))
    names = client.get_run(read_run_json(run_dir)["mlflow_run_id"]).data.metrics
    [name] = [name for name in names if name.split("/")[-1] == metric]
    return [point.step for point in client.get_metric_history(read_run_json(run_dir)["mlflow_run_id"], name)]


def ray_processes(title: str = TRAIN_WORKER) -> list[psutil.Process]:
    """The processes under this one that Ray has given such a title."""
    return [p for p in psutil.Process().children(recursive=True) if any(title in part for part in command(p))]


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def striking(
    run_dir: Path, step: int, strike: Callable[[psutil.Process], None] = psutil.Process.kill, title: str = TRAIN_WORKER
) -> Iterator[list[int]]:
    """Strikes one train worker, or what has that title, as soon as a step is done; yields the pids of the struck."""
    struck: list[int] = []

    def watch() -> None:
        wait_for(lambda: [e for e in events(run_dir, "step") if e["step"] + STEPS * e["unit"] >= step], 300, "step")
        victim = random.choice(ray_processes(title))
        struck.append(victim.pid)
        strike(victim)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield struck
    finally:
        thread.join()
