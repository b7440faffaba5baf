"""Gradients beside those of the step: on other rows, or at other weights, without touching the engine's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from treelora.adapters import adapter_parameters
from treelora.engine import Engine


def adapter_gradient(engine: Engine, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Gradient of the summed losses with respect to the adapter, mean over ranks, float32. Collective.

    Args:
        engine: Its `.grad` fields, reductions and optimizer are left alone.
        losses: Each computes one scalar with `engine.module` when called; a rank may have several, every rank as many.

    Returns:
        A gradient a tensor of the adapter, of its shape; zero where the losses don't depend on it.
    """
    parameters = list(adapter_parameters(engine.module).values())
    # asked of the engine, because a parameter that ZeRO-3 has put away is empty
    shapes = {name: tensor.shape for name, tensor in engine.adapter_tensors().items()}
    flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=engine.device)
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        flat += torch.cat(
            [
                flat.new_zeros(shape.numel()) if gradient is None else gradient.detach().reshape(-1).float()
                for shape, gradient in zip(shapes.values(), gradients, strict=True)
            ]
        )
    return unflatten(engine.all_reduce(flat, mean=True), shapes)


def flatten(tensors: dict[str, Tensor]) -> Tensor:
    """All numbers as one vector, in the order of the names."""
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors.values()])


def unflatten(flat: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Inverse of `flatten`, as views."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
