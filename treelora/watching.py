"""What adapted layers read, and how the loss depends on what they give, token by token, as a model's passes go by.

Shapes: S tokens of a micro-batch in a row, d inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from treelora.adapters import ADAPTER
from treelora.signature import adapted_modules


class Seen(NamedTuple):
    """Of one layer, in one backward pass."""

    x: Tensor
    """Its inputs, [S, d]."""
    entered: Tensor
    """What of them came to its A: they themselves, or what dropout left; [S, d]."""
    g: Tensor
    """The loss's gradients at its outputs, [S, O]."""


def watch(model: nn.Module, wanted: Callable[[], bool], saw: Callable[[int, Seen], None]) -> list[RemovableHandle]:
    """Tell `saw` a layer's number and what is seen of it in each backward pass whose forward pass was `wanted`.

    Inputs are kept from one to the other, as an A that is trained keeps them, too. Returns the hooks, to be removed.
    """
    handles = []
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        entered[:] = [args[0].detach().flatten(0, -2)] if wanted() else []

    def leave(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], y_BTO: Tensor) -> None:
            if entered and y_BTO.requires_grad:
                x_Sd, [entered_Sd] = args[0].detach().flatten(0, -2), entered
                y_BTO.register_hook(lambda g_BTO: saw(layer, Seen(x_Sd, entered_Sd, g_BTO.detach().flatten(0, -2))))
            entered.clear()

        return hook

    modules: list[tuple[str, Any]] = adapted_modules(model)
    for layer, (_, module) in enumerate(modules):
        handles.append(module.lora_A[ADAPTER].register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave(layer)))
    return handles
