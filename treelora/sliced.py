"""An adapter for a whole stream as the model holds it: one task's slice is trained, and the rest is frozen beside it.

`treelora.methods.slices` says what slices are. Of every factor of the adapter, A and B of each layer, the model has the
whole as a frozen weight, by peft's name, and a parameter of the size of one slice. While a slice is open that parameter
stands in its place: gradients, their exchange and the optimizer's moments are those of an adapter of rank r, whatever
the number of tasks, and slices of tasks to come aren't computed.

Shapes: N tasks, r rank of a task, R = N r, n open slice (from 0), A [R, in], B [out, R], T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora.adapters import ADAPTER, adapter_parameters
from treelora.errors import ConfigError


class Sliced(nn.Linear):
    """One factor; both of a layer are open at the same slice, so that what passes between them is [T, (n + 1) r]."""

    def __init__(self, factor: nn.Linear, rank: int, axis: int, *, trains: bool) -> None:
        """In place of `factor`, whose weight it takes over.

        Args:
            axis: That of the rank: 0 for A, 1 for B.
            trains: Whether the slice has gradients at all.
        """
        super().__init__(factor.in_features, factor.out_features, bias=False, device="meta")
        self.weight = factor.weight.requires_grad_(False)
        self.rank, self.axis = rank, axis
        self.own: nn.Parameter | None = None
        if trains:
            self.own = nn.Parameter(torch.zeros_like(self.part(self.weight, 0), memory_format=torch.contiguous_format))
        self.index: int | None = None
        """The open slice; None: the whole is at work, as peft has it."""
        self.past: Tensor | None = None
        """Of B: what stands for the slices before the open one, [out, n r], where they aren't to be the weight's."""

    @property
    def size(self) -> int:
        """How many slices there are."""
        return (self.in_features if self.axis else self.out_features) // self.rank

    def part(self, whole: Tensor, index: int) -> Tensor:
        """A view of one slice of a tensor of the weight's shape."""
        return whole.narrow(self.axis, index * self.rank, self.rank)

    def whole(self) -> Tensor:
        """The weight with what stands in its place: [R, in] or [out, R], not to be written to."""
        whole = self.weight.detach()
        if self.standing(whole):
            whole = whole.clone()
        for tensor, place in self.standing(whole):
            place.copy_(tensor.detach())
        return whole

    def standing(self, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What stands in the weight's place, and where: views of a tensor of the weight's shape."""
        if self.index is None or self.own is None:
            return []
        found: list[tuple[Tensor, Tensor]] = [(self.own, self.part(whole, self.index))]
        if self.past is not None:
            found.append((self.past, whole.narrow(self.axis, 0, self.index * self.rank)))
        return found

    def forward(self, x_Td: Tensor) -> Tensor:
        """Of the slices up to the open one, or of all."""
        return F.linear(x_Td, self._at_work())

    def _at_work(self) -> Tensor:
        if self.index is None:
            return self.weight
        if self.own is None:
            return self.weight.narrow(self.axis, 0, (self.index + 1) * self.rank)
        if self.index == 0:
            return self.own
        past = self.weight.narrow(self.axis, 0, self.index * self.rank) if self.past is None else self.past
        # one product with the small weights side by side is quicker than two products
        return torch.cat([past, self.own], dim=self.axis)


def slice_adapter(model: nn.Module, rank: int, *, trains_a: bool) -> None:
    """Hold a peft model's adapter in slices of this rank, before an engine takes the model; none is open.

    Raises:
        ConfigError: the adapter's rank isn't a multiple of it.
    """
    from peft.tuners.lora import LoraLayer

    config: Any = model.peft_config
    if config[ADAPTER].r % rank:
        raise ConfigError(f"an adapter of rank {config[ADAPTER].r} has no slices of rank {rank}: make it a multiple")
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        a: Any = layer.lora_A
        b: Any = layer.lora_B
        a[ADAPTER] = Sliced(a[ADAPTER], rank, axis=0, trains=trains_a)
        b[ADAPTER] = Sliced(b[ADAPTER], rank, axis=1, trains=True)


def sliced_factors(model: nn.Module) -> dict[str, Sliced]:
    """The factors by peft's names of their weights; {} where the adapter isn't held in slices."""
    named = model.named_modules()
    return {
        f"{name.removesuffix(f'.{ADAPTER}')}.weight": factor for name, factor in named if isinstance(factor, Sliced)
    }


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of an adapter, by peft's names: slices where it is held in slices, all of it otherwise."""
    factors = sliced_factors(model)
    if not factors:
        return adapter_parameters(model)
    return {name: factor.own for name, factor in factors.items() if factor.own is not None}


def show_slice(model: nn.Module, index: int | None) -> None:
    """Let the slices' parameters stand in this place, with whatever they hold, or in none."""
    for factor in sliced_factors(model).values():
        factor.index, factor.past = index, None
