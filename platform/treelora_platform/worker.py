"""What each Ray Train worker runs: assemble, take up the last commit, and go through the stream."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from treelora.data.task import Task
from treelora.engine import Engine, OptimizerSpec, TorchEngine
from treelora.local_memory import LocalMemory
from treelora.memory import MemoryConfig
from treelora.methods import Memory
from treelora_platform.assemble import assemble, device_for
from treelora_platform.checkpoint import remove_scratch
from treelora_platform.config import ExperimentConfig, parse_config
from treelora_platform.hooks import PlatformHooks
from treelora_platform.precision import settled_together, slow_precision
from treelora_platform.provenance import differing, versions
from treelora_platform.recorder import Recorder
from treelora_platform.storage.node import make_keeper, on_this_node
from treelora_platform.tracking import Uploader
from treelora_platform.watchdog import Watchdog


def run_worker(job: dict[str, Any]) -> None:
    """Entry point of a worker.

    Args:
        job: config (plain values), run_dir, cache, tasks (fields of each `Task`), run_name, tracking_uri,
            mlflow_run_id, attempt (numbers of the driver's attempt and of its group of workers).
    """
    import ray.train

    from treelora_platform.preemption import is_preempted

    rank = ray.train.get_context().get_world_rank()

    def make_memory(settings: MemoryConfig, warn: Callable[[str], None]) -> Memory:
        from treelora_platform.tree_actor import TreeClient

        name, attempt = job["run_name"], tuple(job["attempt"])
        return TreeClient(name, settings, run=name, attempt=attempt, notice=warn)

    _learn(on_this_node(job, rank), rank, make_memory, is_preempted)


def run_here(job: dict[str, Any]) -> None:
    """The same as the only worker, in the driver's process and without Ray."""
    _learn(job, 0, lambda settings, warn: LocalMemory(settings, job["run_name"]), lambda: False)


def _learn(
    job: dict[str, Any],
    rank: int,
    make_memory: Callable[[MemoryConfig, Callable[[str], None]], Memory],
    preempted: Callable[[], bool],
) -> None:
    config = parse_config(job["config"])
    _settle(config)
    device = device_for(config)
    run_dir, tasks = Path(job["run_dir"]), [Task(**fields) for fields in job["tasks"]]
    recorder = uploader = keeper = None
    if rank == 0:
        remove_scratch(run_dir)
        recorder = Recorder(run_dir, tasks)
        recorder.event("stage", unit=0, task="", what="loading the model")
        uploader = Uploader(run_dir, job["tracking_uri"], job["mlflow_run_id"])
        keeper = make_keeper(job, lambda kind, what: recorder.event(kind, what=what))
    # one that ends its process would end the driver
    watchdog = Watchdog(run_dir, f"rank-{rank}", config.cluster.stall_seconds if config.cluster.workers else None)
    hooks = PlatformHooks(run_dir, config.checkpoint.keep, recorder, uploader, watchdog, preempted, keeper)
    config = settled_together(config, device, run_dir, rank)

    def make_engine(module: nn.Module, spec: OptimizerSpec) -> Engine:
        if config.engine.kind == "torch":
            return TorchEngine(module, spec, device)
        from treelora_platform.engine import DeepSpeedEngine

        return DeepSpeedEngine(module, spec, config, device)

    def warn(what: str) -> None:
        if recorder:
            recorder.event("warning", what=what)

    loop = assemble(config, tasks, Path(job["cache"]), hooks, make_engine, lambda made: make_memory(made, warn))
    hooks.take_up(loop)
    if slow := slow_precision(config, device):
        warn(slow)
    for line in differing(loop.engine.gather(versions())):
        if recorder:
            recorder.event("warning", what=line)
    watchdog.watch()  # from here on; to load and to tokenise may take any time
    loop.run()
    watchdog.stop()
    if recorder and uploader:
        recorder.close()
        uploader.close(timeout_s=10.0)
    if keeper:
        keeper.close()


def _settle(config: ExperimentConfig) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(config.cluster.threads_per_worker or max(1, int(config.cluster.cpus_per_worker)))
    torch.use_deterministic_algorithms(config.cluster.gpus_per_worker == 0)
    # nobody reads such memory, and a step spent 6 % of its time on filling it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
