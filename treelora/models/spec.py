"""Which model is loaded, and what is said where it can't be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded."""

    name: str
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    random_weights: bool = False
    seed: int = 0


def cannot_load(what: str, name: str, error: Exception) -> str:
    """One line for a user whose model's name leads nowhere."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    folder = Path(os.path.expanduser(name))
    hint = "the folder lacks model files" if folder.is_dir() else "no such folder; a Hugging Face id needs the network"
    return f"model.name {name!r}: the {what} can't be loaded, {hint} ({reason})"
