"""`treelora` with `guard`: beside the pull towards the tree's arms a price on what past tasks' losses would feel.

The price is a quadratic penalty (`treelora.guard`) that holds the adapter as the task found it. After each step, the
optimizer's and the pull's, the adapter is brought back as far as the price asks, as AdamW does with decay: in the
gradient a strong price would be a part of what AdamW divides by. What past tasks are held by is measured in steps that
they are learnt in (`treelora.methods.reading`), so that a guarded task takes no pass more than another.

Shapes: L layers of one shape, D numbers of the adapter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora.adapters import ADAPTER, AdapterState
from treelora.engine import Engine
from treelora.guard import HeldOutputs, factors, take_in
from treelora.methods.base import TaskContext
from treelora.methods.extra_gradient import flatten, leaves_of
from treelora.methods.reading import ReadsInputs
from treelora.methods.remembering import Memory
from treelora.methods.treelora import TreeLoRA
from treelora.methods.treelora_pull import Scalars
from treelora.options.tree import TreeLoRAOptions
from treelora.signature import adapted_modules

HALVES, FOUND = "guard/", "found/"


class GuardedTreeLoRA(ReadsInputs, TreeLoRA):
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
        super().begin_task(task, engine, bank)
        self.watch(task, engine)
        if self.halves:  # something has been learnt
            self._hold(engine, {name: tensor.clone() for name, tensor in engine.adapter_tensors().items()})

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        super().resume_task(task, engine, bank)
        self.watch(task, engine).load_state_dict(self._resumed)
        if self.halves:
            self._hold(engine, {name: found.to(engine.device) for name, found in _part(self._resumed, FOUND).items()})

    def before_step(self, step: int) -> None:
        """See `Method`."""
        super().before_step(step)
        self.seen.before_step(step)

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        super().after_step(engine, lr)
        self.seen.after_step()

    @property
    def corrects(self) -> bool:
        """See `TreeLoRA`."""
        return bool(self._held) or super().corrects

    def corrected(self, stepped_D: Tensor, lr: float) -> tuple[Tensor, Scalars]:
        """See `TreeLoRA`: pulled, then brought back towards what is held as far as the price asks."""
        pulled_D, scalars = super().corrected(stepped_D, lr) if super().corrects else (stepped_D, {})
        if not self._held:
            return pulled_D, scalars
        leaves = leaves_of(self.engine, pulled_D)
        pairs = factors(leaves)
        guarded: AdapterState = {}
        costs = []
        for held in self._held:
            a_Lrd, b_LOr, cost = held.near(*held.stacked(pairs), lr * self.strength)
            costs.append(cost)
            for layer, a_rd, b_Or in zip(held.layers, a_Lrd, b_LOr, strict=True):
                guarded |= {f"{layer}.lora_A.weight": a_rd, f"{layer}.lora_B.weight": b_Or}
        price = self.strength / 2 * torch.stack(costs).sum()
        guarded_D = flatten({name: guarded[name] for name in leaves})
        return guarded_D, scalars | {"penalty_loss": scalars.get("penalty_loss", 0.0) + price}

    def step_skipped(self) -> None:
        """See `Method`."""
        super().step_skipped()
        self.seen.step_skipped()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        super().end_task(engine)
        seen = self.seen
        seen.close()
        unit = seen.moments.mean_trace()
        self.halves = seen.shared(lambda layer, spectrum: take_in(self.halves.get(layer), spectrum, unit))
        self._held, self._found, self.reading = [], {}, None

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        if self._step == 0:  # nothing was learnt since the state was loaded
            return super().state_dict()
        learning = self.reading.state_dict() if self.reading else {}
        found = {FOUND + name: tensor for name, tensor in self._found.items()}
        halves = {HALVES + layer: half_dp for layer, half_dp in self.halves.items()}
        return super().state_dict() | learning | found | halves

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


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
