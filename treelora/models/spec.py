"""Which model is loaded, and what is said where it can't be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is ARM's


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded."""

    name: str
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    random_weights: bool = False
    seed: int = 0


def fitting_dtype(device: torch.device) -> str:
    """`bfloat16` where the device multiplies in it, else `float32`, which is many times as fast as to emulate it."""
    if device.type == "cuda":
        fits = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fits = torch.backends.mkldnn.is_available() and any(map(_cpu_capabilities().get, _CPU_BFLOAT16))
    return "bfloat16" if fits else "float32"


def cannot_load(what: str, name: str, error: Exception) -> str:
    """One line for a user whose model's name leads nowhere."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    folder = Path(os.path.expanduser(name))
    hint = "the folder lacks model files" if folder.is_dir() else "no such folder; a Hugging Face id needs the network"
    return f"model.name {name!r}: the {what} can't be loaded, {hint} ({reason})"


def _cpu_capabilities() -> Mapping[str, Any]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}  # of an older torch
