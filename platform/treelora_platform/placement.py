"""How many workers a cluster has room for, and what a run does where that is fewer than it wants.

The global batch stays: fewer workers take more micro-batches a step each, the same numbers are added in another order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from treelora.errors import ConfigError
from treelora_platform.config import ExperimentConfig
from treelora_platform.config_sections import ClusterSettings

POLL_S = 1.0


def place(config: ExperimentConfig, say: Callable[[str], None]) -> ExperimentConfig:
    """The configuration with as many workers as there is room for, after waiting for all that it asks for.

    Room is counted over whole nodes, busy or not: for nodes that other runs keep busy Ray waits. Nodes that are about
    to be taken away don't count. A cluster that can grow is asked to.

    Args:
        config: With `cluster.workers` as wanted.
        say: Gets a line where something is waited for or gone without.

    Raises:
        ConfigError: need and have, when neither all workers nor `cluster.min_workers` found room in time.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    cluster = config.cluster
    end, asked = time.monotonic() + cluster.wait_seconds, False
    try:
        while (room := room_for(cluster, _living_nodes())) < cluster.workers and time.monotonic() < end:
            if not asked:
                say(f"room for {room} of {cluster.workers} workers; waiting up to {cluster.wait_seconds:g} s for more")
                request_resources(bundles=[worker_resources(cluster)] * cluster.workers)
                asked = True
            time.sleep(POLL_S)
    finally:
        if asked:
            request_resources(bundles=[])
    if room >= cluster.workers:
        return config
    if count := most_workers(config, room):
        say(f"going on with {count} of {cluster.workers} workers, with the same global batch")
        return with_workers(config, count)
    need = ", ".join(f"{amount:g} {kind}" for kind, amount in worker_resources(cluster).items())
    have = ray.cluster_resources()
    least = "" if cluster.min_workers is None else f", {cluster.min_workers} at least,"
    raise ConfigError(
        f"cluster: {cluster.workers} workers{least} of {need} each were asked for, and the cluster has room for "
        f"{room} ({have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU in all); lower cluster.workers or what each "
        "takes, set cluster.min_workers, or add nodes"
    )


def worker_resources(cluster: ClusterSettings) -> dict[str, float]:
    """What Ray reserves for one worker."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


def room_for(cluster: ClusterSettings, nodes: Iterable[Mapping[str, float]]) -> int:
    """Workers that fit on nodes with these resources; a worker lies on one node."""
    need = worker_resources(cluster)
    # shares such as a third of a GPU must not be lost to rounding
    return sum(int(min(node.get(kind, 0.0) / amount for kind, amount in need.items()) + 1e-6) for node in nodes)


def most_workers(config: ExperimentConfig, room: int) -> int | None:
    """The most workers that have room and divide a step evenly; None where that is less than `cluster.min_workers`."""
    least, shares = config.cluster.min_workers, config.cluster.workers * config.train.accumulation
    if least is None:
        return None
    return next(
        (count for count in range(min(room, config.cluster.workers), least - 1, -1) if shares % count == 0), None
    )


def with_workers(config: ExperimentConfig, count: int) -> ExperimentConfig:
    """The same steps on another number of workers: micro-batches stay as they are."""
    accumulation = config.cluster.workers * config.train.accumulation // count
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"workers": count, "min_workers": None}),
            "train": config.train.model_copy(update={"accumulation": accumulation}),
        }
    )


def _living_nodes() -> list[dict[str, Any]]:
    import ray
    from ray._private.state import state  # Ray's public list of nodes doesn't say which of them are being drained

    leaving = state.get_draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
