"""Workers' processes of a Ray of our own, begun before anybody asks for them.

They import what workers need while MLflow opens its run and Ray Train starts its controller, which is half of a start.
A node keeps such a process for whoever asks for one with the very same environment; Ray has no function for that in
Python, but its node answers the call, and what makes it is there.
"""

from __future__ import annotations

import json
import logging
import os
from importlib import import_module
from typing import Any

from treelora.errors import one_line
from treelora_platform.cluster import owns_ray
from treelora_platform.config import ExperimentConfig

HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""Ray's variable for what a process calls before it takes work."""
_KEEP_S = 120
"""How long a node keeps a process that nobody has asked for; Ray Train asks within seconds."""
_PATIENCE_S = 5.0
_log = logging.getLogger(__name__)


def worker_variables(config: ExperimentConfig) -> dict[str, str]:
    """Environment of workers that import ahead; none on a cluster, and none with GPUs, seen only once there is work."""
    if config.cluster.gpus_per_worker or not owns_ray():
        return {}
    # Ray counts threads when a worker gets its work, in the same way; by then torch has looked
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(config.cluster.cpus_per_worker)))
    ahead = import_ahead_deepspeed if config.engine.kind == "deepspeed" else import_ahead
    return {HOOK: f"{__name__}.{ahead.__name__}", "OMP_NUM_THREADS": threads}


def start_ahead(config: ExperimentConfig) -> None:
    """Have this node start the processes of workers that import ahead; doesn't wait for them."""
    variables = worker_variables(config)
    if not variables:
        return
    try:
        _ask_node(config.cluster.workers, variables)
    # of a Ray whose inner parts are others; then workers begin when they are asked for, as on a cluster
    except (ImportError, AttributeError, ConnectionError) as error:
        _log.warning("Ray's node has started no worker ahead: %s", one_line(error))


def _ask_node(workers: int, variables: dict[str, str]) -> None:
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.worker import global_worker
    from ray.core.generated.common_pb2 import Language
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    request = PrestartWorkersRequest(language=Language.PYTHON, num_workers=workers, keep_alive_duration_secs=_KEEP_S)
    # byte for byte what Ray makes of a worker's environment and its controller's
    environment = {"env_vars": get_env_vars_to_propagate() | variables}
    request.runtime_env_info.serialized_runtime_env = json.dumps(environment, sort_keys=True, separators=(",", ":"))
    node: Any = global_worker.node
    with init_grpc_channel(f"{node.node_ip_address}:{node.node_manager_port}") as channel:
        try:
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_PATIENCE_S)
        except grpc.RpcError as error:
            raise ConnectionError(str(error)) from None


def import_ahead() -> None:
    """What a worker needs, in a process that waits to become one."""
    for name in ("treelora_platform.worker", "transformers.models.auto.modeling_auto", "peft"):
        import_module(name)


def import_ahead_deepspeed() -> None:
    """The same, and the engine."""
    import_ahead()
    import_module("treelora_platform.engine")
