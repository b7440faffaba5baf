"""Ray Train's trainer as we use it. Importing this takes a second, and not torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.config import FailureConfig, RunConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from treelora_platform.cluster import owns_ray
from treelora_platform.config import ExperimentConfig
from treelora_platform.group_start import GroupStart
from treelora_platform.no_synchronization import leave_out_synchronization
from treelora_platform.placement import worker_resources
from treelora_platform.process_group import ProcessGroup
from treelora_platform.workers_ahead import worker_variables


class FixedNodes(FixedScalingPolicy):
    """For a cluster that nobody scales. Ray's own makes an actor first, and waits for it, to say what it needs."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Without a request there is no client either, and nothing to cancel."""
        leave_out_synchronization()

    def _maybe_send_resource_request(self) -> None:
        pass


class Trainer(DataParallelTrainer):
    """One group of workers, once: whether to begin again is `attempts.fit`'s to say.

    Args:
        work: What each worker runs.
        job: What it gets.
        config: How many workers, and what each needs.
        run_dir: The run's folder.
        name: Of this group. A name that was used in the folder before would be taken for a run to go on with.
    """

    def __init__(
        self,
        work: Callable[[dict[str, Any]], None],
        job: dict[str, Any],
        config: ExperimentConfig,
        run_dir: Path,
        name: str,
    ) -> None:
        self._run_dir, self._stall_seconds = run_dir, config.cluster.stall_seconds
        run_config: Any = RunConfig(  # of V2, whatever the base class's annotation says
            name=f"{name}-{int(time.time())}",
            storage_path=str(run_dir / "ray"),
            worker_runtime_env={"env_vars": worker_variables(config)},
            # Ray would retry every exception, a mistake in the data too, and on as many workers as before
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        )
        super().__init__(
            work,
            train_loop_config=job,
            backend_config=ProcessGroup("nccl" if config.cluster.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.cluster.workers,
                use_gpu=config.cluster.gpus_per_worker > 0,
                resources_per_worker=worker_resources(config.cluster),
            ),
            run_config=run_config,
        )

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if owns_ray():
            scaling: Any = self.scaling_config  # of V2, too
            parts["scaling_policy"] = FixedNodes(scaling)
        return super()._initialize_and_run_controller(**parts)

    def _create_default_callbacks(self) -> list[Any]:
        # Processes that we need not start and wait for: nothing of ours comes through Ray Data, and the placement
        # groups in a Ray of our own are freed by `attempts.fit`.
        unneeded = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if owns_ray() else set())
        kept = [made for made in super()._create_default_callbacks() if type(made).__name__ not in unneeded]
        return [*kept, GroupStart(self._run_dir, self._stall_seconds)]
