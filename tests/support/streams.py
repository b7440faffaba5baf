"""A stream of built-in tasks on the tiny model, in one process: plain torch engine, local memory, real files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from treelora.adapters import AdapterState
from treelora.data.task import Task
from treelora.engine import TorchEngine
from treelora.evaluation.matrix import Score
from treelora.local_memory import LocalMemory
from treelora.loop import StreamLoop
from treelora.loop_records import Position, StepRecord, TaskRecord
from treelora_platform.assemble import MakeEngine, assemble
from treelora_platform.config import ExperimentConfig, parse_config
from treelora_platform.hooks import PlatformHooks
from treelora_platform.prepare import prepare_stream
from treelora_platform.recorder import Recorder

TASKS = ("time-colours", "mood-directions", "subject-colours")
STEPS = 4
ONE_TASK_MIB = 0.0027
"""Room for one of the tiny model's adapters, not for two."""


def tiny_config(folder: Path, **changes: Any) -> ExperimentConfig:
    """Three tasks of four steps; `changes` replace or extend the sections."""
    plain: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder),
        "model": {"name": "tiny", "dtype": "float32", "template": "plain"},
        "stream": {"order": list(TASKS), "train_rows": 24, "test_rows": 6},
        "lora": {"rank": 2, "alpha": 8, "dropout": 0.1},
        "treelora": {"sketch_size": 8, "probe_batches": 2},
        "train": {"global_batch": 4, "steps": STEPS, "learning_rate": 0.02},
        "engine": {"kind": "torch"},
        "evaluation": {"modes": ["last", "merged", "routed"], "router_rows": 8, "batch_rows": 4},
        "checkpoint": {"every_steps": 1, "keep": 1000},
    }
    for key, value in changes.items():
        plain[key] = plain.get(key, {}) | value if isinstance(value, dict) else value
    return parse_config(plain)


class Recorded:
    """`treelora.loop.Hooks` that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.scores: list[Score] = []
        self.tasks: list[TaskRecord] = []
        self.positions: list[Position] = []
        self.stages: list[str] = []

    def stage(self, unit: int, name: str, what: str) -> None:
        self.stages.append(what)

    def stepped(self, record: StepRecord, steps: int) -> None:
        self.steps.append(record)

    def scored(self, scores: Sequence[Score], task: TaskRecord) -> None:
        self.scores += scores
        self.tasks.append(task)

    def commit(self, position: Position, loop: StreamLoop) -> None:
        self.positions.append(position)

    def leaving(self) -> bool:
        return False

    def leave(self) -> None:
        raise AssertionError("nobody asked to leave")


VARIANTS: dict[str, dict[str, Any]] = {
    "probe_b prox": {"treelora": {"guard": None, "signature": "probe_b", "penalty": "prox"}},
    "gradient soft": {"treelora": {"guard": None, "signature": "gradient", "penalty": "soft", "search": "flat_lcb"}},
    "gradient sign full": {"treelora": {"guard": None, "signature": "gradient", "penalty": "sign", "search": "full"}},
    "value fresh": {"treelora": {"signature": "adapter_value", "penalty": "prox", "start": "fresh"}},
    "official": {"treelora": {"preset": "official"}, "train": {"steps": None, "epochs": 0.6}},
    "query exact": {"treelora": {"preset": "paper", "search": "flat_lcb"}},
    "query soft full": {"treelora": {"guard": None, "signature": "query", "penalty": "soft", "search": "full"}},
    "tree_node pooled": {"treelora": {"start": "tree_node", "noise": "pooled"}},
    "budget": {"treelora": {"budget_mib": ONE_TASK_MIB, "start": "tree_node"}},
    "protected": {"treelora": {"protect": 0.9}},
    "protected bounds": {"treelora": {"protect": 0.9, "max_slices": 2, "budget_mib": 0.0055}},
    "guarded": {"treelora": {"guard": 1e4}},
    "guarded alone": {"treelora": {"guard": 1e4, "penalty": "none", "budget_mib": 0.018}},
    "guarded soft": {"treelora": {"guard": 1e4, "signature": "gradient", "penalty": "soft"}},
    "budget soft": {
        "treelora": {"guard": None, "signature": "gradient", "penalty": "soft", "budget_mib": ONE_TASK_MIB}
    },
    "sequential": {"method": "sequential", "evaluation": {"forward": True}},
    "joint": {"method": "joint"},
}


def build_loop(
    config: ExperimentConfig,
    hooks: Any = None,
    make_engine: MakeEngine | None = None,
    tasks: Sequence[Task] | None = None,
) -> StreamLoop:
    """A loop at the start of the stream, which is prepared here unless it is given."""
    torch.set_num_threads(1)
    tasks = list(tasks or prepare_stream(config).stream)
    cache, engine = Path(config.output_dir) / "tokens", make_engine or TorchEngine
    return assemble(config, tasks, cache, hooks or Recorded(), engine, LocalMemory)


def same_adapter(one: AdapterState, other: AdapterState) -> bool:
    """Whether two adapters are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def outcome(scores: Sequence[Score]) -> dict[tuple[str, int, int], float]:
    """(mode, task, after) -> score."""
    return {(s.mode, s.task_index, s.after_index): s.score for s in scores}


def build_run(config: ExperimentConfig, run_dir: Path) -> tuple[StreamLoop, Recorder]:
    """A loop that writes a run's folder, at the newest commit there; what a worker does, without Ray."""
    torch.set_num_threads(1)
    tasks = list(prepare_stream(config).stream)
    recorder = Recorder(run_dir, tasks)
    hooks = PlatformHooks(run_dir, config.checkpoint.keep, recorder, None)
    loop = build_loop(config, hooks, tasks=tasks)
    hooks.take_up(loop)
    return loop, recorder


def execute(config: ExperimentConfig, run_dir: Path) -> StreamLoop:
    """Go on to the end of the stream from the newest commit in a folder."""
    loop, recorder = build_run(config, run_dir)
    loop.run()
    recorder.close()
    return loop


def digests(commit: Path) -> dict[str, str]:
    """SHA-256 of everything that a commit holds: adapter, memory, router, answers, and the bank's adapters."""
    manifest = json.loads((commit / "manifest.json").read_text())
    return manifest["files"] | manifest["adapters"]


def commits(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").iterdir() if path.name[0].isdigit())


def recorded(loop: StreamLoop) -> Recorded:
    assert isinstance(loop.hooks, Recorded)
    return loop.hooks
