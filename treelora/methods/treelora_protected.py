"""`treelora` with `protect`: every task in a slice of its own, beside what past tasks read of their inputs.

The pass that measures a task's signature also shows what its layers read: the main directions of the inputs, in what
past tasks leave free, become the rows of its A, which stays (as in InfLoRA, arXiv 2404.00228). B is trained, and pulled
by `prox` towards where it started, zero. In `MEASURED` of the task's own backward passes it is seen which directions
the loss depends on (`treelora.input_space`); at the end those that hold the share `protect` of it are left to the task.
So there is no pass more than TreeLoRA takes anyway. Nor is there anything to search: no past task has a part in a new
slice, and all arms would pull alike. Signatures and their tree are kept for inference and for people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from treelora.adapters import AdapterState, layer_of
from treelora.engine import Engine
from treelora.input_space import InputMoments, Spaces, Spectrum, design, protect
from treelora.methods.base import StepMetrics, TaskContext
from treelora.methods.extra_gradient import flatten, unflatten
from treelora.methods.remembering import Memory, Remembering
from treelora.methods.slices import Accumulating, cut
from treelora.methods.treelora_signature import SignatureSource
from treelora.options.tree import TreeLoRAOptions
from treelora.penalty import prox
from treelora.signature import adapted_modules, observed

COLUMNS = 64
"""K of the sketches: no task protects more directions of a layer than so many."""
MEASURED = 4
"""Steps of a task that show what its loss reads; each costs a few per cent more than others."""
UNREAD = 1e-6
"""Tokens whose |g|^2 is less than this share of the mean don't count as inputs: padding, and what is zero but for
rounding, as for the query of a row's first token."""
T = TypeVar("T")


class ProtectedTreeLoRA(Remembering, Accumulating):
    """TreeLoRA in protected slices; `memory` is used on rank 0 only and may be None elsewhere."""

    name = "treelora"
    preparation = "measuring its signature"
    freezes_a = True

    def __init__(self, options: TreeLoRAOptions, memory: Memory | None, seed: int = 0, *, rank: int) -> None:
        """With the rank of one task."""
        super().__init__(options, seed, rank=rank)
        assert options.protect is not None
        self.options, self.memory, self.share = options, memory, options.protect
        self.spaces: Spaces = {}
        """What past tasks protect."""
        self.read: InputMoments | None = None
        """What the current task's loss reads, while it is learnt."""
        self._designed: dict[str, Tensor] = {}
        self._resumed: dict[str, Tensor] = {}
        self._step = 0
        self._last = StepMetrics()

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        seen = self._begin(task, engine)
        self.source.measure(task, lambda layer, x_Sd, g_SO: seen.add(layer, x_Sd, _read_at_all(g_SO)))
        seen.keep()
        self._designed = self._on_rank_0(
            engine, seen, lambda layer, spectrum: design(spectrum, self.spaces.get(layer), self.rank)
        )
        seen.clear()
        super().begin_task(task, engine, bank)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        read = self._begin(task, engine)
        self.source.load_state_dict(self._resumed)
        if engine.rank == 0:  # the sum over ranks
            read.sums.copy_(self._resumed["read"])
        super().resume_task(task, engine, bank)

    def open(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Accumulating`."""
        super().open(task, engine, bank)
        for layer, (_, module) in enumerate(adapted_modules(engine.module)):
            self._handles.append(module.register_forward_hook(observed(layer, self._read)))

    def start_a(self, name: str, part: Tensor) -> Tensor:
        """See `Accumulating`."""
        return self._designed[layer_of(name)]

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._step = step
        self._measured = step * MEASURED // self.task.steps > (step - 1) * MEASURED // self.task.steps

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        assert self.read
        if self._measured:
            self.read.keep()
        self._last = StepMetrics()
        if self.options.penalty == "prox":
            tensors = engine.adapter_tensors().items()
            own = {name: cut(name, tensor, self.slices.own) for name, tensor in tensors if ".lora_B." in name}
            stepped_D = flatten(own)
            pulled_D, zeros = prox(stepped_D, torch.zeros_like(stepped_D), lr * self.options.strength)
            pulled = unflatten(pulled_D, {name: part.shape for name, part in own.items()})
            self.write(engine, pulled, self.slices.own)
            self._last = StepMetrics({"sparsity": zeros / len(pulled_D)})

    def step_skipped(self) -> None:
        """See `Method`."""
        assert self.read
        self.read.drop()
        self._last = StepMetrics()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        super().end_task(engine)
        assert self.read
        sketch_LK, _ = self.source.finish(engine)
        if self.memory:
            self.memory.end_task(self.task.name, sketch_LK.numpy(), float(self.task.sizes[-1]))
        self.spaces = self._on_rank_0(
            engine, self.read, lambda layer, spectrum: protect(spectrum, self.spaces.get(layer), self.share)
        )
        self.read = None

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        if self._step == 0:  # nothing was learnt since the state was loaded
            return dict(self._resumed)
        spaces = {f"protected/{layer}": space for layer, space in self.spaces.items()}
        read = {"read": self.engine.all_reduce(self.read.sums.clone()).cpu()} if self.read else {}
        return self.source.state_dict() | spaces | read

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self._resumed = state
        prefix = "protected/"
        self.spaces = {key.removeprefix(prefix): space for key, space in state.items() if key.startswith(prefix)}

    def _begin(self, task: TaskContext, engine: Engine) -> InputMoments:
        self.task, self.engine = task, engine
        self._step, self._measured, self._last = 0, False, StepMetrics()
        if self.memory:
            self.memory.begin_task(task.name, task.steps)
        self.source = SignatureSource(self.options, engine, self.seed, self.rank)
        modules: list[tuple[str, Any]] = adapted_modules(engine.module)
        widths = {name: int(module.in_features) for name, module in modules}
        self.read = InputMoments(widths, COLUMNS, self.seed, engine.device)
        return self.read

    def _read(self, layer: int, x_Sd: Tensor, g_SO: Tensor) -> None:
        if self._measured and self.read:
            # a worker's loss is so many times its part of the global batch's
            self.read.add(layer, x_Sd, (g_SO.float() / self.engine.world_size).square().sum(-1))

    def _on_rank_0(self, engine: Engine, moments: InputMoments, compute: Callable[[str, Spectrum], T]) -> dict[str, T]:
        """Something of each layer's spectrum; not every machine rounds alike."""
        spectra = moments.spectra(engine)
        return engine.broadcast({layer: compute(layer, spectrum) for layer, spectrum in spectra.items()})


def _read_at_all(g_SO: Tensor) -> Tensor:
    """Which tokens the loss depends on: [S]."""
    squares_S = g_SO.float().square().sum(-1)
    return squares_S > UNREAD * squares_S.mean()
