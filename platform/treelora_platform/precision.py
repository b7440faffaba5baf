"""In which numbers the frozen weights are kept, where `model.dtype` leaves that to the hardware."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from treelora.data.files import write_bytes_atomically
from treelora.models.spec import DTYPES, fitting_dtype
from treelora_platform.config import ExperimentConfig
from treelora_platform.run_tables import PRECISION_JSON, read_begun_dtype


def settled(config: ExperimentConfig, device: torch.device) -> ExperimentConfig:
    """With the dtype that fits the device in place of `auto`."""
    return _with_dtype(config, fitting_dtype(device) if config.model.dtype == "auto" else config.model.dtype)


def settled_together(config: ExperimentConfig, device: torch.device, run_dir: Path, rank: int) -> ExperimentConfig:
    """With one dtype for all workers in place of `auto`: the run's so far, else `bfloat16` if it fits all. Collective.

    Rank 0 notes it in the run's folder, so that a run that goes on elsewhere computes as before.

    Raises:
        DataError: on rank 0, what is noted can't be read.
    """
    mine: str = settled(config, device).model.dtype
    all_of_them = [(read_begun_dtype(run_dir) if rank == 0 else None, mine)]
    if dist.is_initialized():
        all_of_them *= dist.get_world_size()
        dist.all_gather_object(all_of_them, all_of_them[0])
    dtype = mine
    if config.model.dtype == "auto":
        begun, _ = all_of_them[0]
        dtype = begun or min((fits for _, fits in all_of_them), key=list(DTYPES).index)
    if rank == 0:
        write_bytes_atomically(run_dir / PRECISION_JSON, json.dumps({"dtype": dtype}).encode())
    return _with_dtype(config, dtype)


def slow_precision(config: ExperimentConfig, device: torch.device) -> str | None:
    """What to tell a user whose device only emulates the dtype that is asked for; None: nothing."""
    if config.model.dtype == "bfloat16" and fitting_dtype(device) == "float32":
        return (
            f"model.dtype bfloat16: this {'GPU' if device.type == 'cuda' else 'CPU'} only emulates it, and steps take "
            "many times as long as in float32; `auto` chooses what fits"
        )
    return None


def _with_dtype(config: ExperimentConfig, dtype: str) -> ExperimentConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
