"""`treelora` with preset `official`: a step as TreeLoRA's released code takes it (formulas: `treelora.official`).

Every rank computes the same from the same adapter, so neither the tree actor nor a message is needed. One call is made
an optimizer step, where the released code makes one a micro-batch and worker: the same with one worker and
accumulation 1. Optimizer and schedule are this project's.

Shapes: L layers, N past tasks, D numbers of a layer's LoRA A.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treelora.adapters import AdapterState
from treelora.data.batches import Batch
from treelora.engine import Engine
from treelora.methods.base import Method, StepMetrics, TaskContext
from treelora.objective import answer_loss
from treelora.official import Accumulator, OfficialSearch, epoch_place, official_penalty, ramp, stack_values
from treelora.official_tree import OfficialTree
from treelora.options.tree import TreeLoRAOptions
from treelora.sketch import PURPOSE_OFFICIAL, keyed_bits

NO_ARMS = np.empty(0, np.int64)


class OfficialTreeLoRA(Method):
    """The released code's behaviour: search, tree and penalty `official` on values of A."""

    name = "treelora"

    def __init__(self, options: TreeLoRAOptions, seed: int = 0):
        self.options, self.seed = options, seed
        self.past: list[Tensor] = []
        """What each past task left behind, c [L, D] float32."""
        self._accumulator = Accumulator()
        self._search: OfficialSearch | None = None
        self.arms_L: np.ndarray = NO_ARMS
        self._loss: Tensor | None = None
        self._last = StepMetrics()

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._task, self._engine = task, engine
        self._epochs = max(1, min(task.steps, round(task.steps * task.global_batch / task.sizes[-1])))
        self._accumulator, self._search, self.arms_L, self._last = Accumulator(), None, NO_ARMS, StepMetrics()
        if self.past:
            past_NLD = torch.stack(self.past).to(engine.device)
            self._search = OfficialSearch(past_NLD, OfficialTree.build(past_NLD), 1)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.begin_task(task, engine, bank)
        parts: dict[str, dict[str, np.ndarray]] = {"sum": {}, "search": {}}
        for key, tensor in self._resumed.items():
            part, _, name = key.partition("/")
            if part in parts:
                parts[part][name] = tensor.numpy()
        self._accumulator.load_state_dict(parts["sum"], engine.device)
        if self._search:
            self._search.load_state_dict(parts["search"])

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._loss = None
        call, calls = epoch_place(step, self._task.steps, self._epochs)
        if call == 0:
            self._accumulator.begin_epoch(calls)
            if self._search:
                self._search.begin_epoch(calls)
        self._weight = ramp(self.options.strength, call, calls)
        accumulated_LD = self._accumulator.add(stack_values(list(self._values().values())))
        if self._search:
            bits = keyed_bits(
                self.seed, self._task.index, len(accumulated_LD) + 1, purpose=PURPOSE_OFFICIAL, block=step
            )
            self.arms_L = self._search.select((bits >> np.uint64(11)) * 2.0**-53)
            self._search.observe(self.arms_L, accumulated_LD)

    def loss(self, engine: Engine, batch: Batch, normaliser: float) -> Tensor:
        """See `Method`."""
        loss = answer_loss(engine.forward_model(), batch, normaliser)
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        return loss

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if self._search is None or self._loss is None:
            return
        values = self._values()
        anchors = [self._search.past_NLD[arm, layer] for layer, arm in enumerate(self.arms_L)]
        loss = engine.all_reduce(self._loss, mean=True)
        penalty, pulls = official_penalty(list(values.values()), anchors, loss, self._weight)
        gradients = engine.adapter_gradients()
        changed = {name: gradients[name] + pull for name, pull in zip(values, pulls, strict=True)}
        engine.set_adapter_gradients(changed)
        by_penalty = torch.stack([pull.norm() for pull in pulls]).norm()
        by_loss = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().clamp_min(1e-30)
        scalars: dict[str, float | Tensor] = {"penalty_loss": penalty, "penalty_ratio": by_penalty / by_loss}
        self._last = StepMetrics(scalars, tuple(int(arm) for arm in self.arms_L))

    def step_skipped(self) -> None:
        """See `Method`."""
        self._last = StepMetrics()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        assert self._accumulator.sum_LD is not None
        self.past.append(self._accumulator.sum_LD.float().cpu().clone())
        self._accumulator, self._search, self.arms_L = Accumulator(), None, NO_ARMS

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        state = {f"past/{k:05d}": c_LD for k, c_LD in enumerate(self.past)}
        parts = {"sum": self._accumulator.state_dict(), "search": self._search.state_dict() if self._search else {}}
        for part, arrays in parts.items():
            state |= {f"{part}/{name}": torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self._resumed = state
        self.past = [state[key] for key in sorted(state) if key.startswith("past/")]

    def _values(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._engine.adapter_tensors().items() if ".lora_A." in name}
