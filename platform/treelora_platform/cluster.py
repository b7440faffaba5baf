"""Ray as the driver uses it: connect, and keep the tree actor."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from treelora.errors import TreeLoRAError
from treelora_platform.config import ExperimentConfig
from treelora_platform.guardian import start_guardian
from treelora_platform.lean_head import lean_head

CONNECT_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)
_own = threading.Event()

# Read by Ray at import and handed on to its processes.
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "ERROR",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's tables; a sweep prints its own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # every report of a trial as CSV, JSON and TensorBoard
}
# Of a Ray of our own only: no machine of it can be taken away, nobody collects its metrics, and a worker that starts
# before it is asked for gets nothing to do. Each idle process of Ray's wakes some 150 times a second, and where workers
# use all cores, they wait for it (`benchmarks.training`).
_ENVIRONMENT_ALONE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's, which would else set it for its controller only
}
_HEALTH_CHECK = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
# Ray's own messages would break the progress display; errors reach the user through our exceptions.
_QUIET = ("ray", "ray.train", "ray.tune", "ray.data")


def connect(config: ExperimentConfig, meanwhile: Sequence[str] = ()) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine; does nothing when connected.

    Args:
        config: How many CPUs a Ray of our own needs.
        meanwhile: Modules to import in a thread while the processes of a Ray of our own start.

    Raises:
        TreeLoRAError: no cluster answers at that address.
    """
    address = os.environ.get("RAY_ADDRESS")
    for key, value in (_ENVIRONMENT if address else _ENVIRONMENT | _ENVIRONMENT_ALONE).items():
        os.environ.setdefault(key, value)
    if config.cluster.stall_seconds:
        os.environ[_HEALTH_CHECK] = str(config.cluster.stall_seconds)  # for workers whose whole process is frozen
    import ray

    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    if address:
        _expect_answer(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise TreeLoRAError(f"RAY_ADDRESS {address!r}: {error}") from None
        _warn_of_open_doors(address)
        return
    cluster = config.cluster
    cpus = max(os.cpu_count() or 1, round(cluster.workers * cluster.cpus_per_worker))
    threading.Thread(target=lambda: [import_module(name) for name in meanwhile], daemon=True).start()
    with lean_head():
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    _own.set()
    start_guardian()


def owns_ray() -> bool:
    """Whether this process has started the Ray that it uses, which then ends with it."""
    return _own.is_set()


def free_placement_groups() -> None:
    """Give back what a lost controller of Ray Train has reserved; in a Ray of our own nothing else reserves."""
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    for name, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _warn_of_open_doors(address: str) -> None:
    # Without a token we would have been let in by such a cluster only.
    host = address.removeprefix("ray://").rpartition(":")[0].strip("[]")
    if os.environ.get("RAY_AUTH_MODE") != "token" and host not in ("", "localhost", "127.0.0.1", "::1"):
        _log.warning(
            "Ray at %s runs without token authentication: whoever reaches it can run code there; set "
            "RAY_AUTH_MODE=token on its nodes (docs/cluster.md)",
            address,
        )


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
def tree_actor(name: str, wanted: bool, run_dir: Path | None = None) -> Iterator[None]:
    """The run's tree actor for as long as it is needed; with the run's folder, its state outlives its process."""
    if not wanted:
        yield
        return
    import ray

    from treelora_platform.tree_actor import FOLDER, launch_tree_actor

    folder = run_dir / FOLDER if run_dir else None
    if folder:  # of a driver that was killed; workers begin with what their commit holds
        shutil.rmtree(folder, ignore_errors=True)
    actor = launch_tree_actor(name, folder)
    try:
        yield
    finally:
        ray.kill(actor)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
