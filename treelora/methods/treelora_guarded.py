"""`treelora` with `guard`: one adapter for all tasks, and a price on what past tasks' losses would feel of a change.

The price is a quadratic penalty (`treelora.guard`) that holds the adapter as the task found it. After each step of the
optimizer the adapter is brought back as far as the price asks, as AdamW does with decay: in the gradient a strong price
would be a part of what AdamW divides by. What past tasks are held by is measured in steps that they are learnt in, so
that a guarded task takes no pass more than another.

Nothing is searched: a pull towards an arm is one away from what is held, wherever the arm isn't the newest task.
"""

from __future__ import annotations

from collections import defaultdict
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
from treelora.methods.treelora_pull import Scalars
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
        self._held: list[HeldOutputs] = []

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

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if self._held:
            self._before_D = flatten(engine.adapter_leaves())

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        super().after_step(engine, lr)
        if self._held:
            self._last = StepMetrics(self._guard(engine, lr))

    def keep(self, seen: Reading) -> None:
        """See `UnsearchedTreeLoRA`."""
        unit = seen.moments.mean_trace(self.engine)
        self.halves = seen.shared(lambda layer, spectrum: take_in(self.halves.get(layer), spectrum, unit))
        self._held, self._found = [], {}
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
        pairs, alike = factors(found), defaultdict(list)
        for name, module in layers:
            a_rd, b_Or = pairs[name]
            alike[module.scaling[ADAPTER], a_rd.shape, b_Or.shape].append(name)
        self._held = [
            HeldOutputs({name: self.halves[name].to(engine.device) for name in names}, pairs, scale)
            for (scale, *_), names in alike.items()
        ]
        self._found = {name: tensor.cpu() for name, tensor in found.items()}

    def _guard(self, engine: Engine, lr: float) -> Scalars:
        """Bring the adapter that has just stepped back towards what is held."""
        leaves = {name: leaf.detach() for name, leaf in engine.adapter_leaves().items()}
        pairs, stepped_D = factors(leaves), flatten(leaves)
        guarded: AdapterState = {}
        costs = []
        for held in self._held:
            a_Lrd, b_LOr, cost = held.near(*held.stacked(pairs), lr * self.strength)
            costs.append(cost)
            for layer, a_rd, b_Or in zip(held.layers, a_Lrd, b_LOr, strict=True):
                guarded |= {f"{layer}.lora_A.weight": a_rd, f"{layer}.lora_B.weight": b_Or}
        engine.write_leaves(guarded)
        by_guard, by_loss = flatten({name: guarded[name] for name in leaves}) - stepped_D, stepped_D - self._before_D
        return {
            "penalty_ratio": by_guard.norm() / by_loss.norm().clamp_min(1e-30),
            "penalty_loss": self.strength / 2 * torch.stack(costs).sum(),
        }


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
