"""`Engine`: what a method needs of whatever computes a step, and the plain torch engine in one process.

Names of adapter tensors are peft's (`...lora_A.weight`); an adapter's state holds float32 CPU tensors. Of an adapter in
slices (`treelora.sliced`) one slice is trained: leaves and gradients are the slice's, all else is of the whole.

An image classifier's head is trained beside the adapter and is no part of it: methods act on the adapter, and all
adapters of a stream share the one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from treelora.adapters import AdapterState, adapter_parameters, head_parameters
from treelora.sliced import Sliced, own_parameters, sliced_factors

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW (Loshchilov and Hutter, 2019) with gradient clipping; `clip` is a norm."""

    weight_decay: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class Engine(Protocol):
    """One data-parallel worker's view of the model under training.

    Methods marked collective must be called by every rank, in the same order.
    """

    module: nn.Module
    """The peft model, for reading and for evaluation."""
    rank: int
    world_size: int
    device: torch.device

    def forward_model(self) -> Callable[..., Any]:
        """The callable that a training forward pass must go through."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss' gradient; summed over micro-batches, and averaged over ranks at the last one. Collective."""
        ...

    def adapter_gradients(self) -> dict[str, Tensor]:
        """The leaves' averaged gradients after the last backward, before the step; float32, on the device.

        Collective.
        """
        ...

    def set_adapter_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Replace them. Collective."""
        ...

    def step(self, lr: float) -> Tensor | float:
        """Clip, update the adapter, forget the gradients; returns the norm before clipping. Collective.

        Where the norm isn't finite nothing is updated.
        """
        ...

    def drop_gradients(self) -> None:
        """Forget the gradients without an update."""
        ...

    def reset_optimizer(self) -> None:
        """Forget the moments: a new task starts a new AdamW."""
        ...

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The current adapter on the device, not to be written to. Collective."""
        ...

    def adapter_leaves(self) -> dict[str, nn.Parameter]:
        """The parameters themselves, whole, for autograd to reach: for penalties and gradients beside the step's.

        They stay whole until the next forward pass has ended. Collective.
        """
        ...

    def head_tensors(self) -> dict[str, Tensor]:
        """The classifier's head, not to be written to; {} for language models. Collective."""
        ...

    def write_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapter under training, or its head; names that are left out stay. Collective."""
        ...

    def write_leaves(self, state: Mapping[str, Tensor]) -> None:
        """Set what is trained of the adapter: the open slice of one in slices. Collective."""
        ...

    def using_adapter(self, state: Mapping[str, Tensor] | None) -> Any:
        """Context in which the module computes with another adapter (None: the current one). Collective."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments and step count, unsharded, float32, on the CPU. Collective."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `optimizer_state`, whatever the number of workers was. Collective."""
        ...

    def all_reduce(self, tensor: Tensor, mean: bool = False) -> Tensor:
        """Sum or mean over ranks. Collective."""
        ...

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank. Collective."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every rank's value on every rank, in rank order. Collective."""
        ...


def read_adapter(engine: Engine) -> AdapterState:
    """A copy of the current adapter as float32 CPU tensors. Collective."""
    return {name: tensor.detach().float().cpu().clone() for name, tensor in engine.adapter_tensors().items()}


def read_head(engine: Engine) -> dict[str, Tensor]:
    """A copy of the head, if there is one, as float32 CPU tensors. Collective."""
    return {name: tensor.detach().float().cpu().clone() for name, tensor in engine.head_tensors().items()}


def whole_tensors(weights: Mapping[str, nn.Parameter], factors: Mapping[str, Sliced]) -> dict[str, Tensor]:
    """An adapter as it is now, with the open slice of one in slices; not to be written to."""
    return {name: factors[name].whole() if name in factors else weight.detach() for name, weight in weights.items()}


def destinations(
    weights: Mapping[str, nn.Parameter], factors: Mapping[str, Sliced], state: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The tensors that an adapter's state goes to, and what each gets; also what stands in a weight's place."""
    found: list[tuple[Tensor, Tensor]] = []
    for name, tensor in state.items():
        found.append((weights[name], tensor))
        if name in factors:
            found += factors[name].standing(tensor)
    return found


def make_optimizer(parameters: Sequence[nn.Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW over adapter and head; the learning rate is set at every step."""
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, foreach=True
    )


class TorchEngine:
    """One process, no DeepSpeed: notebooks, benchmarks, unit tests, machines where DeepSpeed isn't."""

    rank = 0
    world_size = 1

    def __init__(self, module: nn.Module, spec: OptimizerSpec, device: torch.device | None = None):
        self.device = device or next(module.parameters()).device
        self.module = module.to(self.device)
        self.spec = spec
        self.parameters, self.head = adapter_parameters(module), head_parameters(module)
        self.factors, self.leaves = sliced_factors(module), own_parameters(module)
        self.trained = self.leaves | self.head
        self.optimizer = make_optimizer(list(self.trained.values()), spec)

    def forward_model(self) -> Callable[..., Any]:
        """See `Engine`."""
        return self.module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine`."""
        loss.backward()

    def adapter_gradients(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in self.leaves.items()}

    def set_adapter_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        for name, gradient in gradients.items():
            self.leaves[name].grad = gradient.to(self.device, torch.float32)

    def step(self, lr: float) -> Tensor | float:
        """See `Engine`."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.spec.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if norm.isfinite():
            self.optimizer.step()
        self.drop_gradients()
        return norm

    def drop_gradients(self) -> None:
        """See `Engine`."""
        self.optimizer.zero_grad(set_to_none=True)

    def reset_optimizer(self) -> None:
        """See `Engine`."""
        self.optimizer.state.clear()

    def adapter_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return whole_tensors(self.parameters, self.factors)

    def adapter_leaves(self) -> dict[str, nn.Parameter]:
        """See `Engine`."""
        return self.leaves

    def head_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: parameter.detach() for name, parameter in self.head.items()}

    def write_adapter(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        for target, tensor in destinations(self.parameters | self.head, self.factors, state):
            target.data.copy_(tensor)

    def write_leaves(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        for name, tensor in state.items():
            self.leaves[name].data.copy_(tensor)

    @contextmanager
    def using_adapter(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """See `Engine`."""
        if state is None:
            yield
            return
        kept = read_adapter(self)
        self.write_adapter(state)
        try:
            yield
        finally:
            self.write_adapter(kept)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        saved: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            state = self.optimizer.state.get(parameter)
            if state:
                saved |= {f"{moment}/{name}": state[moment].cpu().clone() for moment in MOMENTS}
                saved["step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu().clone().reshape(1)
        return saved

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        self.reset_optimizer()
        if not state:
            return
        for name, parameter in self.trained.items():
            moments = {moment: state[f"{moment}/{name}"].to(self.device, copy=True) for moment in MOMENTS}
            self.optimizer.state[parameter] = {"step": state["step"].reshape(()).clone(), **moments}

    def all_reduce(self, tensor: Tensor, mean: bool = False) -> Tensor:
        """See `Engine`."""
        return tensor

    def broadcast(self, value: T) -> T:
        """See `Engine`."""
        return value

    def gather(self, value: T) -> list[T]:
        """See `Engine`."""
        return [value]
