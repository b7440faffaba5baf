"""What all evaluators share: batches of rows of similar length, padding, and a model put in evaluation
mode.

Shapes: B rows of a batch, T padded length in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from treelora.errors import ConfigError, DataError


def batches_by_length(lengths: Sequence[int], batch_rows: int) -> list[list[int]]:
    """Row indices, longest rows first, in ceil(len(lengths) / batch_rows) batches.

    The number of batches depends on nothing but the number of rows and `batch_rows`: under ZeRO-3 each
    forward is a collective, so ranks with equally many rows must run equally many. Longest first, so that a
    batch that does not fit in memory fails at once. Ties keep the input order.
    """
    if batch_rows < 1:
        raise ConfigError(f"batch_rows is {batch_rows}; it must be at least 1")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch_rows] for i in range(0, len(order), batch_rows)]


def pad(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    *,
    side: Literal["left", "right"] = "right",
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and their attention mask [B, T].

    Right padding is exact for every causal model with its default positions, because no token looks ahead:
    also for ALiBi, recurrent and local layers, and behind the virtual tokens of prompt learning. Left padding
    is what `generate` needs.
    """
    width = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    for b, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids_BT[b, where] = torch.as_tensor(row, dtype=torch.int64)
        mask_BT[b, where] = 1
    return ids_BT.to(device), mask_BT.to(device)


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts without tokens.

    Raises:
        DataError: a prompt is empty; the message gives its row.
    """
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"prompt {i} has no tokens; every prompt needs at least one")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own training flag is restored afterwards."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    model.eval()
    try:
        # Not inference_mode: ZeRO-3 gathers parameters in a forward and keeps small ones. As inference
        # tensors they'd make later training fail ("cannot be saved for backward", seen with two ranks).
        with torch.no_grad():
            yield
    finally:
        for module, was_training in zip(modules, training, strict=True):
            module.training = was_training


def model_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """`device` if given, else where the model's first parameter is."""
    return torch.device(device) if device is not None else next(model.parameters()).device
