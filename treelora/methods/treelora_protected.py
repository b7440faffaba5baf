"""`treelora` with `protect`: every task in a slice of its own, beside what past tasks read of their inputs.

The first step (`treelora.methods.first_step`) shows what the layers read: the main directions of that, in what past
tasks leave free, become the rows of A, which stays (as in InfLoRA, arXiv 2404.00228). B is trained, and pulled by
`prox` towards where it started, zero. `MEASURED` of the backward passes show which directions the loss depends on
(`treelora.input_space`); at the end those that hold the share `protect` of it are left to the task, as far as a budget
has room for them (`treelora.protected_spaces`).

Where there are fewer slices than tasks, all but one of them come to hold the past together: before a task that finds
none free their update is cut to the rank that they have (`treelora.adapters.condensed`).

Nothing is searched: no past task has a part in a new slice, and all arms would pull alike. Signatures and their tree
are kept for inference and for people, for which a quarter of a batch does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from treelora.adapters import AdapterState, condensed
from treelora.engine import Engine, read_adapter
from treelora.input_space import InputMoments, Spectrum, design
from treelora.methods.base import StepMetrics, TaskContext
from treelora.methods.extra_gradient import flatten, unflatten
from treelora.methods.first_step import FirstStep
from treelora.methods.remembering import Memory, Remembering
from treelora.methods.slices import Accumulating, cut
from treelora.methods.treelora_pull import pull_adapter
from treelora.methods.treelora_signature import SignatureSource
from treelora.options.tree import TreeLoRAOptions
from treelora.protected_spaces import ProtectedSpaces
from treelora.signature import adapted_modules
from treelora.sliced import sliced_factors
from treelora.watching import Seen, watch

COLUMNS = 64
"""K of the sketches: no task protects more directions of a layer than so many."""
MEASURED = 4
"""Steps of a task that show what its loss reads; each costs a few per cent more than others."""
T = TypeVar("T")


class ProtectedTreeLoRA(Remembering, Accumulating):
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
        self.read: InputMoments
        """What the current task's loss reads, while it is learnt."""
        self._first: FirstStep | None = None
        self._resumed: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._step, self._learning, self._measured, self._designed = 0, False, False, False
        self._last = StepMetrics()

    def open(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Accumulating`."""
        super().open(task, engine, bank)
        self.task, self.engine = task, engine
        self._step, self._last, self._learning, self._designed = 0, StepMetrics(), True, False
        if self.memory:
            self.memory.begin_task(task.name, task.steps)
        self.source = SignatureSource(self.options, engine, self.seed, self.rank)
        layers: list[tuple[str, Any]] = adapted_modules(engine.module)
        self._layers = layers
        widths = {name: module.in_features for name, module in layers}
        self.read = InputMoments(widths, COLUMNS, self.seed, engine.device)
        self._unhook()
        self._handles = watch(engine.module, lambda: self._measured or self._first is not None, self._saw)

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        slots = min((factor.size for factor in sliced_factors(engine.module).values()), default=0)
        if 0 < slots <= task.index:
            whole = read_adapter(engine)
            mine = condensed(whole, (slots - 1) * self.rank) if engine.rank == 0 else {}
            engine.write_adapter(engine.broadcast(mine))  # not every machine rounds alike
        super().begin_task(task, engine, bank)
        if self.options.probe_batches:
            self.source.measure(task)
        else:
            self.source.measure_rows(task)

    def place(self, index: int, slots: int) -> int:
        """See `Accumulating`."""
        return min(index, slots - 1)

    def start_a(self, name: str, part: Tensor) -> Tensor:
        """See `Accumulating`."""
        return torch.zeros_like(part)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        super().resume_task(task, engine, bank)
        self.source.load_state_dict(self._resumed)
        if engine.rank == 0:  # the sum over ranks
            self.read.sums.copy_(self._resumed["read"])
        self._designed = bool(self._resumed["designed"])

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._step = step
        self._measured = step * MEASURED // self.task.steps > (step - 1) * MEASURED // self.task.steps
        self._first = None if self._designed else FirstStep(self._layers, self.read.another())

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if self._first:
            self._design(self._first)
        if self.options.penalty == "prox":
            self._before_D = flatten(engine.adapter_leaves())

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        self._first, self._designed = None, True
        if self._measured:
            self.read.keep()
        self._last = StepMetrics()
        if self.options.penalty == "prox":
            zero_D = torch.zeros_like(self._before_D)
            self._last = StepMetrics(pull_adapter(engine, self._before_D, zero_D, lr, self.options.strength))

    def step_skipped(self) -> None:
        """See `Method`."""
        self.read.drop()
        self._last = StepMetrics()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        super().end_task(engine)
        self._unhook()
        sketch_LK, _ = self.source.finish(engine)
        if self.memory:
            self.memory.end_task(self.task.name, sketch_LK.numpy(), float(self.task.sizes[-1]))
        self.spaces.keep(self._shared(self.read, self.spaces.grown))
        self._learning = False

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
        learning = {}
        if self._learning:
            learning["read"] = self.engine.all_reduce(self.read.sums.clone()).cpu()
            learning["designed"] = torch.tensor(self._designed)
        return self.source.state_dict() | self.spaces.state_dict() | learning

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self._resumed = state
        self.spaces.load_state_dict(state)

    def _saw(self, layer: int, seen: Seen) -> None:
        if self._first:
            self._first.saw(layer, seen)
        if self._measured:
            # a worker's loss is so many times its part of the global batch's
            weights_S = (seen.g.float() / self.engine.world_size).square().sum(-1)
            self.read.add(layer, seen.x, weights_S)

    def _design(self, first: FirstStep) -> None:
        first.inputs.keep()
        rows = self._shared(first.inputs, lambda layer, inputs: design(inputs, self.spaces.space(layer), self.rank))
        rows = {layer: a_rd.to(self.engine.device) for layer, a_rd in rows.items()}
        self.write(self.engine, {f"{layer}.lora_A.weight": a_rd for layer, a_rd in rows.items()}, self.slices.own)
        gradients = {f"{layer}.lora_B.weight": gradient for layer, gradient in first.gradients(rows).items()}
        shapes = {name: gradient.shape for name, gradient in gradients.items()}
        mean_D = self.engine.all_reduce(flatten(gradients), mean=True)
        self.engine.set_adapter_gradients(unflatten(mean_D, shapes))

    def _shared(self, moments: InputMoments, compute: Callable[[str, Spectrum], T]) -> dict[str, T]:
        """Something of each layer's spectrum, computed by one worker: not every machine rounds alike. Collective."""
        mine = {layer: compute(layer, spectrum) for layer, spectrum in moments.spectra(self.engine).items()}
        found = {layer: value for part in self.engine.gather(mine) for layer, value in part.items()}
        return {layer: found[layer] for layer in moments.layers}

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
