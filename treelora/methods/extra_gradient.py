"""Gradients beside those of the step: on other rows, or at other weights, without touching the engine's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from treelora.engine import Engine


def local_gradient(engine: Engine, loss: Callable[[], Tensor]) -> Tensor:
    """This rank's gradient of one scalar with respect to the adapter, float32 [D]; zero where it doesn't depend on it.

    The engine's `.grad` fields, reductions and optimizer are left alone. Collective.
    """
    leaves = list(engine.adapter_leaves().values())
    shapes = [leaf.shape for leaf in leaves]  # before the forward pass, after which ZeRO-3 may put them away
    gradients = torch.autograd.grad(loss(), leaves, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(shape.numel(), device=engine.device) if gradient is None else gradient.reshape(-1).float()
            for shape, gradient in zip(shapes, gradients, strict=True)
        ]
    )


def adapter_gradient(engine: Engine, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Gradient of the summed losses with respect to the adapter, mean over ranks, float32. Collective.

    Args:
        engine: Its `.grad` fields, reductions and optimizer are left alone.
        losses: Each computes one scalar with `engine.module` when called; a rank may have several, every rank as many.

    Returns:
        A gradient a tensor of the adapter, of its shape.
    """
    shapes = {name: leaf.shape for name, leaf in engine.adapter_leaves().items()}
    flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=engine.device)
    for loss in losses:
        flat += local_gradient(engine, loss)
    return unflatten(engine.all_reduce(flat, mean=True), shapes)


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """All numbers as one vector, in the order of the names."""
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors.values()])


def unflatten(flat: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Inverse of `flatten`, as views."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def leaf_vector(engine: Engine) -> Tensor:
    """A copy of what is trained of the adapter, `flatten`ed. Collective."""
    return flatten(engine.adapter_leaves())


def leaves_of(engine: Engine, vector_D: Tensor) -> dict[str, Tensor]:
    """What is trained of the adapter, by name, as views of such a vector. Collective."""
    return unflatten(vector_D, {name: leaf.shape for name, leaf in engine.adapter_leaves().items()})


def write_leaf_vector(engine: Engine, vector_D: Tensor) -> None:
    """Set what is trained of the adapter. Collective."""
    engine.write_leaves(leaves_of(engine, vector_D))
