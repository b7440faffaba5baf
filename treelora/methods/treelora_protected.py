"""`treelora` with `protect`: every task in a slice of its own, beside what past tasks read of their inputs.

The first step (`treelora.methods.first_step`) shows what the layers read: the main directions of that, in what past
tasks leave free, become the rows of A, which stays (as in InfLoRA, arXiv 2404.00228). B is trained, and pulled by
`prox` towards where it started, zero. What was measured shows which directions the loss depends on
(`treelora.input_space`); at the end those that hold the share `protect` of it are left to the task, as far as a budget
has room for them (`treelora.protected_spaces`).

Where there are fewer slices than tasks, all but one of them come to hold the past together: before a task that finds
none free their update is cut to the rank that they have (`treelora.adapters.condensed`).

Nothing is searched: no past task has a part in a new slice, and all arms would pull alike. Signatures and their tree
are kept for inference and for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from treelora.adapters import AdapterState, condensed
from treelora.engine import Engine, read_adapter
from treelora.input_space import design
from treelora.methods.base import StepMetrics, TaskContext
from treelora.methods.extra_gradient import flatten, leaf_vector, unflatten
from treelora.methods.first_step import FirstStep
from treelora.methods.reading import Reading, ReadsInputs
from treelora.methods.remembering import Memory, Remembering
from treelora.methods.slices import Accumulating, cut
from treelora.methods.treelora_pull import correct, pulled
from treelora.methods.treelora_signature import SignatureSource
from treelora.options.tree import TreeLoRAOptions
from treelora.protected_spaces import ProtectedSpaces
from treelora.sliced import sliced_factors


class ProtectedTreeLoRA(ReadsInputs, Remembering, Accumulating):
    """TreeLoRA in protected slices; `memory` is used on rank 0 only and may be None elsewhere."""

    name = "treelora"
    preparation = "measuring its signature"
    freezes_a = True

    def __init__(
        self, options: TreeLoRAOptions, memory: Memory | None, seed: int = 0, *, rank: int, room: int | None = None
    ) -> None:
        """With the rank of one task, and the bytes that protected directions may take (None: any number)."""
        super().__init__(options, seed, rank=rank)
        assert options.protect is not None
        self.options, self.memory = options, memory
        self.spaces = ProtectedSpaces(options.protect, room)
        """What past tasks protect."""
        self._resumed: dict[str, Tensor] = {}
        self._step, self._last = 0, StepMetrics()
        self._designed = False

    def open(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Accumulating`."""
        super().open(task, engine, bank)
        self._designed = False

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        slots = min((factor.size for factor in sliced_factors(engine.module).values()), default=0)
        if 0 < slots <= task.index:
            whole = read_adapter(engine)
            mine = condensed(whole, (slots - 1) * self.rank) if engine.rank == 0 else {}
            engine.write_adapter(engine.broadcast(mine))  # not every machine rounds alike
        super().begin_task(task, engine, bank)
        self._watch(task, engine)
        self.source.measure(task)

    def place(self, index: int, slots: int) -> int:
        """See `Accumulating`."""
        return min(index, slots - 1)

    def start_a(self, name: str, part: Tensor) -> Tensor:
        """See `Accumulating`."""
        return torch.zeros_like(part)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        super().resume_task(task, engine, bank)
        self._watch(task, engine)
        self.source.load_state_dict(self._resumed)
        self.seen.load_state_dict(self._resumed)
        self._designed = bool(self._resumed["designed"])

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._step, self._last = step, StepMetrics()
        self.seen.before_step(step)
        self.seen.first = None if self._designed else FirstStep(self.seen.layers, self.seen.moments.another())

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if self.seen.first:
            self._design(self.seen, self.seen.first)
        if self.options.penalty == "prox":
            self._before_D = leaf_vector(engine)

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        self.seen.after_step()
        self._designed = True
        if self.options.penalty == "prox":
            start_D = torch.zeros_like(self._before_D)  # of B alone
            pull = partial(pulled, anchor_D=start_D, lr=lr, strength=self.options.strength)
            self._last = StepMetrics(correct(engine, self._before_D, pull))

    def step_skipped(self) -> None:
        """See `Method`."""
        self.seen.step_skipped()
        self._last = StepMetrics()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        super().end_task(engine)
        self.seen.close()
        sketch_LK, _ = self.source.finish(engine)
        if self.memory:
            self.memory.end_task(self.task.name, sketch_LK.numpy(), float(self.task.sizes[-1]))
        self.spaces.keep(self.seen.shared(self.spaces.grown))
        self.reading = None

    def merge_bank(self, bank: list[AdapterState]) -> None:
        """Let tasks whose slices were condensed share what the newest task has beside its own."""
        if self.task.index > self.slices.index:
            past = {name: tensor.clone() for name, tensor in bank[-1].items()}
            for name, tensor in past.items():
                cut(name, tensor, self.slices.own).zero_()
            bank[:-1] = [past] * (len(bank) - 1)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        if self._step == 0:  # nothing was learnt since the state was loaded
            return dict(self._resumed)
        state = self.source.state_dict() | self.spaces.state_dict()
        if self.reading:
            state |= self.reading.state_dict() | {"designed": torch.tensor(self._designed)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self._resumed = state
        self.spaces.load_state_dict(state)

    def _watch(self, task: TaskContext, engine: Engine) -> None:
        self.task, self.engine = task, engine
        self._step, self._last = 0, StepMetrics()
        if self.memory:
            self.memory.begin_task(task.name, task.steps)
        self.source = SignatureSource(self.options, engine, self.seed, self.rank)
        self.watch(task, engine)

    def _design(self, seen: Reading, first: FirstStep) -> None:
        first.inputs.keep(self.engine)
        rows = seen.shared(lambda layer, inputs: design(inputs, self.spaces.space(layer), self.rank), first.inputs)
        rows = {layer: a_rd.to(self.engine.device) for layer, a_rd in rows.items()}
        self.write(self.engine, {f"{layer}.lora_A.weight": a_rd for layer, a_rd in rows.items()}, self.slices.own)
        gradients = {f"{layer}.lora_B.weight": gradient for layer, gradient in first.gradients(rows).items()}
        shapes = {name: gradient.shape for name, gradient in gradients.items()}
        mean_D = self.engine.all_reduce(flatten(gradients), mean=True)
        self.engine.set_adapter_gradients(unflatten(mean_D, shapes))
