"""Ray as the driver uses it: connect, keep the tree actor, fit the workers."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treelora.errors import LostError, TreeLoRAError
from treelora_platform.checkpoint import newest_name
from treelora_platform.config import ExperimentConfig
from treelora_platform.guardian import start_guardian

CONNECT_TIMEOUT_S = 10.0

# Read by Ray at import and handed on to its processes.
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "ERROR",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's tables; a sweep prints its own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # every report of a trial as CSV, JSON and TensorBoard
}
# Ray's own messages would break the progress display; errors reach the user through our exceptions.
_QUIET = ("ray", "ray.train", "ray.tune", "ray.data")


def connect(config: ExperimentConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine; does nothing when connected.

    Raises:
        TreeLoRAError: no cluster answers at that address.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _expect_answer(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise TreeLoRAError(f"RAY_ADDRESS {address!r}: {error}") from None
        return
    cluster = config.cluster
    cpus = max(os.cpu_count() or 1, round(cluster.workers * cluster.cpus_per_worker))
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    start_guardian()


def _expect_answer(address: str) -> None:
    import socket

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # `auto` and the like are Ray's to resolve
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise TreeLoRAError(f"RAY_ADDRESS {address!r}: nothing answers there ({error}); is the cluster up?") from None


@contextmanager
def tree_actor(name: str, wanted: bool) -> Iterator[None]:
    """The run's tree actor for as long as it is needed."""
    if not wanted:
        yield
        return
    import ray

    from treelora_platform.tree_actor import launch_tree_actor

    actor = launch_tree_actor(name)
    try:
        yield
    finally:
        ray.kill(actor)


def fit(config: ExperimentConfig, job: dict[str, Any], run_dir: Path, attempt: int) -> str | None:
    """Run the workers to the end of the stream.

    Returns:
        None, or why they failed.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from treelora_platform.worker import run_worker

    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    failure = stands = ""
    for failures in range(cluster.max_failures + 1):
        trainer = TorchTrainer(
            run_worker,
            train_loop_config=job,
            torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                # a name of its own for each attempt: Ray would silently take an old one for a run to resume
                name=f"attempt-{attempt}.{failures}-{int(time.time())}",
                storage_path=str(run_dir / "ray"),
                # Ray would retry every exception, a mistake in the data too; we begin again only where it may help
                failure_config=ray.train.FailureConfig(max_failures=0),
            ),
        )
        with _interruptible():
            try:
                trainer.fit()
            except TrainingFailedError as error:
                before, failure = failure, explain(error)
                stood, stands = stands, newest_name(run_dir)
                if ours(error) or (failures and (before, stood) == (failure, stands)):
                    break  # it would come again
            else:
                return None
    return failure


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the workers in order and arrive as KeyboardInterrupt.

    Ray Train takes SIGINT over, aborts the workers and then exits the process with 0, as if all were well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def causes(error: BaseException) -> dict[int, BaseException]:
    """What each failed worker raised, by rank."""
    failures = getattr(error, "worker_failures", None) or {}
    return {rank: getattr(cause, "cause", None) or cause for rank, cause in sorted(failures.items())}


def ours(error: BaseException) -> TreeLoRAError | None:
    """Our own error behind a failure, if it is one that would come again after a restart."""
    mistakes = (c for c in causes(error).values() if isinstance(c, TreeLoRAError) and not isinstance(c, LostError))
    return next(mistakes, None)


def explain(error: BaseException) -> str:
    """The innermost cause of a failure on the workers, in a line or two; our own errors speak for themselves."""
    if own := ours(error):
        return str(own)
    for rank, cause in causes(error).items():
        text = str(cause).strip()
        last = text.splitlines()[-1] if text else type(cause).__name__
        return f"worker {rank} failed: {last}" + (f"\n{text}" if "\n" in text else "")
    return f"training failed: {error}"
