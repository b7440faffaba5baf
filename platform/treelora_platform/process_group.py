"""The workers' `torch.distributed` group, made as `ray.train.torch.TorchConfig` makes it, but for who imports torch.

With Ray's class driver and controller would import it too, for seconds, on cores where the workers are starting.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

_PATIENCE = timedelta(minutes=30)  # that one worker may be behind another, as when rank 0 alone saves or scores
_LEAVE_S = 30.0


@dataclass
class ProcessGroup(BackendConfig):
    """All workers of a run.

    Args:
        backend: "gloo" or "nccl"; with the latter each worker must have a GPU.
    """

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        """What the controller calls."""
        return _Workers

    def to_dict(self) -> dict[str, Any]:
        """For Ray's own records."""
        return asdict(self)


class _Workers(Backend):
    share_cuda_visible_devices = True  # NCCL's direct ways between GPUs of a node want to see them all

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroup)
        address, port = worker_group.execute_single(0, _free_port)
        worker_group.execute(_join, backend_config.backend, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with suppress(GetTimeoutError):  # then they are ended without it
            ray.get(worker_group.execute_async(_leave), timeout=_LEAVE_S)


def _free_port() -> tuple[str, int]:
    address: str = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as found:
        found.bind(("", 0))
        return address, found.getsockname()[1]


def _join(backend: str, address: str, port: int) -> None:
    import ray.train

    context = ray.train.get_context()
    os.environ |= {  # the names that torchrun gives, which DeepSpeed and others look for
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    import torch.distributed as dist

    if backend == "nccl":
        import torch
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    dist.init_process_group(backend, timeout=_PATIENCE)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
