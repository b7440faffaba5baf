"""`treelora` with `guard`: one adapter for all tasks, and a price on what past tasks' losses would feel of a change.

The price is a quadratic penalty (`treelora.guard`) that holds the adapter as the task found it; what past tasks are
held by is measured in steps that they are learnt in, so that a guarded task takes no pass more than another.

Nothing is searched: a pull towards an arm is one away from what is held, wherever the arm isn't the newest task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora.adapters import ADAPTER, AdapterState, mean_adapter
from treelora.engine import Engine
from treelora.guard import HeldOutputs, factors, take_in
from treelora.methods.base import StepMetrics, TaskContext
from treelora.methods.extra_gradient import flatten
from treelora.methods.reading import Reading
from treelora.methods.remembering import Memory
from treelora.methods.treelora import share
from treelora.methods.treelora_unsearched import UnsearchedTreeLoRA
from treelora.options.tree import TreeLoRAOptions
from treelora.signature import adapted_modules

HALVES, FOUND = "guard/", "found/"


class GuardedTreeLoRA(UnsearchedTreeLoRA):
    """TreeLoRA whose past tasks are guarded."""

    def __init__(self, options: TreeLoRAOptions, memory: Memory | None, seed: int = 0) -> None:
        super().__init__(options, memory, seed)
        assert options.guard is not None
        self.strength = options.guard
        self.halves: dict[str, Tensor] = {}
        """H of each layer, by the tasks so far."""
        self._found: AdapterState = {}
        self._held: dict[str, HeldOutputs] = {}
        self._by_guard_D: Tensor | None = None
        self._ratio: Tensor | None = None
        self._price = torch.zeros(())

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        if self.halves:  # something has been learnt
            self._hold(engine, {name: tensor.clone() for name, tensor in engine.adapter_tensors().items()})
        super().begin_task(task, engine, bank)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        if self.halves:
            self._hold(engine, {name: found.to(engine.device) for name, found in _part(self._resumed, FOUND).items()})
        super().resume_task(task, engine, bank)

    def penalty_loss(self, engine: Engine) -> Tensor | None:
        """Linear in the weights, with the penalty's gradient, which is thereby known by itself."""
        if not self._held:
            return None
        leaves = engine.adapter_leaves()
        pairs = factors({name: leaf.detach() for name, leaf in leaves.items()})
        costs: list[Tensor] = []
        gradients: AdapterState = {}
        for layer, held in self._held.items():
            cost, by_a_rd, by_b_Or = held.cost(*pairs[layer])
            costs.append(cost)
            gradients |= {f"{layer}.lora_A.weight": by_a_rd, f"{layer}.lora_B.weight": by_b_Or}
        self._price = self.strength / 2 * torch.stack(costs).sum()
        self._by_guard_D = self.strength / 2 * flatten({name: gradients[name] for name in leaves})
        weights_D = torch.cat([leaf.reshape(-1) for leaf in leaves.values()])
        return weights_D @ self._by_guard_D

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        super().after_backward(engine)
        if self._by_guard_D is not None:
            by_loss_D = flatten(engine.adapter_gradients()) - self._by_guard_D
            self._ratio = self._by_guard_D.norm() / by_loss_D.norm().clamp_min(1e-30)

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        super().after_step(engine, lr)
        if self._ratio is not None:
            pulled = self._last.scalars
            left = pulled.get("penalty_loss", 0.0)
            self._last = StepMetrics(pulled | {"penalty_ratio": self._ratio, "penalty_loss": left + self._price})

    def start(self) -> Tensor | None:
        """The adapter as the task found it; None in the first task."""
        return self._found_D if self._held else None

    def keep(self, seen: Reading) -> None:
        """See `UnsearchedTreeLoRA`."""
        unit = seen.moments.mean_trace(self.engine)
        self.halves = seen.shared(lambda layer, spectrum: take_in(self.halves.get(layer), spectrum, unit))
        self._held, self._found, self._by_guard_D, self._ratio = {}, {}, None, None
        self.groups = self.engine.broadcast(self.groups)

    def merge_bank(self, bank: list[AdapterState]) -> None:
        """Let tasks of one arm share one adapter, the mean, weighted by rows."""
        share(bank, self.groups, self.task.sizes, mean_adapter)

    def kept(self) -> dict[str, Tensor]:
        """See `UnsearchedTreeLoRA`."""
        found = {FOUND + name: tensor for name, tensor in self._found.items()}
        return found | {HALVES + layer: half_dp for layer, half_dp in self.halves.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        super().load_state_dict(state)
        self.halves = _part(state, HALVES)

    def _hold(self, engine: Engine, found: AdapterState) -> None:
        layers: list[tuple[str, Any]] = adapted_modules(engine.module)
        pairs, scales = factors(found), {name: module.scaling[ADAPTER] for name, module in layers}
        self._held = {
            layer: HeldOutputs(half_dp.to(engine.device), *pairs[layer], scales[layer])
            for layer, half_dp in self.halves.items()
        }
        self._found_D = flatten(found)
        self._found = {name: tensor.cpu() for name, tensor in found.items()}


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
