"""What each Ray Train worker runs: assemble, take up the last commit, and go through the stream."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from treelora.data.task import Task
from treelora.engine import Engine, OptimizerSpec, TorchEngine
from treelora.memory import MemoryConfig
from treelora_platform.assemble import assemble, device_for
from treelora_platform.checkpoint import remove_scratch
from treelora_platform.config import ExperimentConfig, parse_config
from treelora_platform.hooks import PlatformHooks
from treelora_platform.preemption import is_preempted
from treelora_platform.provenance import differing, versions
from treelora_platform.recorder import Recorder
from treelora_platform.storage.node import make_keeper, on_this_node
from treelora_platform.tracking import Uploader
from treelora_platform.tree_actor import TreeClient
from treelora_platform.watchdog import Watchdog


def run_worker(job: dict[str, Any]) -> None:
    """Entry point of a worker.

    Args:
        job: config (plain values), run_dir, cache, tasks (fields of each `Task`), run_name, tracking_uri,
            mlflow_run_id, attempt (numbers of the driver's attempt and of its group of workers).
    """
    import ray.train

    context = ray.train.get_context()
    job = on_this_node(job, context.get_world_rank())
    config = parse_config(job["config"])
    _settle(config)
    run_dir, tasks = Path(job["run_dir"]), [Task(**fields) for fields in job["tasks"]]
    recorder = uploader = keeper = None
    if context.get_world_rank() == 0:
        remove_scratch(run_dir)
        recorder = Recorder(run_dir, tasks)
        recorder.event("stage", unit=0, task="", what="loading the model")
        uploader = Uploader(run_dir, job["tracking_uri"], job["mlflow_run_id"])
        keeper = make_keeper(job, lambda kind, what: recorder.event(kind, what=what))
    watchdog = Watchdog(run_dir, f"rank-{context.get_world_rank()}", config.cluster.stall_seconds)
    hooks = PlatformHooks(run_dir, config.checkpoint.keep, recorder, uploader, watchdog, is_preempted, keeper)
    device = device_for(config)

    def make_engine(module: nn.Module, spec: OptimizerSpec) -> Engine:
        if config.engine.kind == "torch":
            return TorchEngine(module, spec, device)
        from treelora_platform.engine import DeepSpeedEngine

        return DeepSpeedEngine(module, spec, config, device)

    def warn(what: str) -> None:
        if recorder:
            recorder.event("warning", what=what)

    def make_memory(settings: MemoryConfig) -> TreeClient:
        name, attempt = job["run_name"], tuple(job["attempt"])
        return TreeClient(name, settings, run=name, attempt=attempt, notice=warn)

    loop = assemble(config, tasks, Path(job["cache"]), hooks, make_engine, make_memory)
    hooks.take_up(loop)
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
