"""One adapter for a whole stream: rank R = N r, of which every task learns its own rank r and keeps the rest.

Task n owns the rows [n r, (n + 1) r) of A and those columns of B, its slice. The slices of past tasks stay at work and
don't change; those of tasks to come have B = 0 and do nothing. With alpha scaled as the rank is, the adapter's update
is the sum of the slices' updates, each with the scale alpha / r of an ordinary adapter. How a model holds such an
adapter, and trains one slice alone: `treelora.sliced`.

Shapes: N tasks, r rank of a task, R = N r, A [R, in], B [out, R].
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.errors import ConfigError
from treelora.methods.base import Method, TaskContext
from treelora.options import Options
from treelora.sketch import keyed_bits
from treelora.sliced import show_slice, sliced_factors

PURPOSE_SLICE = 10


@dataclass(frozen=True)
class Slices:
    """Where a task's own numbers and those of the tasks before it lie."""

    rank: int
    index: int

    @property
    def own(self) -> slice:
        """The task's own place."""
        return slice(self.index * self.rank, (self.index + 1) * self.rank)

    @property
    def past(self) -> slice:
        """All earlier tasks' places together."""
        return slice(0, self.index * self.rank)


def cut(name: str, tensor: Tensor, part: slice) -> Tensor:
    """A view of some slices: rows of an A, columns of a B."""
    return tensor[part] if ".lora_A." in name else tensor[:, part]


def fresh_rows(name: str, shape: torch.Size, index: int, seed: int) -> Tensor:
    """Where the A of a task starts: [r, in], uniform as in peft, different for each tensor and task.

    It doesn't depend on N, so that a longer stream begins as a shorter one.
    """
    rank, width = shape
    bits = keyed_bits(seed, zlib.crc32(name.encode()), rank * width, purpose=PURPOSE_SLICE, block=index)
    unit = torch.from_numpy((bits >> 40).astype("float32")) * 2**-24  # the 24 bits that a float32 can hold
    return ((2 * unit - 1) / math.sqrt(width)).reshape(rank, width)


class Accumulating(Method):
    """What accumulating methods share: the task's place, its start, and that nothing else is trained."""

    accumulates = True
    freezes_a: ClassVar[bool] = False
    """Whether A is designed and not trained."""

    def __init__(self, options: Options | None = None, seed: int = 0, *, rank: int) -> None:
        """With the rank of one task; the adapter's is N times that, held in slices (`treelora.sliced`)."""
        super().__init__(options, seed)
        self.rank = rank
        self.slices = Slices(rank, 0)

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.open(task, engine, bank)
        own: dict[str, Tensor] = {}
        for name, tensor in engine.adapter_tensors().items():
            part = cut(name, tensor, self.slices.own)
            own[name] = self.start_a(name, part) if ".lora_A." in name else torch.zeros_like(part)
        self.write(engine, own, self.slices.own)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.open(task, engine, bank)

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        self._close(engine)

    def open(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """Before the first step after a start or a resumption.

        Raises:
            ConfigError: the adapter isn't held in slices of this rank, or has none for this task.
        """
        factors = sliced_factors(engine.module)
        held = {(factor.size, factor.rank) for factor in factors.values()} or {(0, 0)}
        place = self.place(task.index, min(size for size, _ in held))
        if place < 0 or any(rank != self.rank or size <= place for size, rank in held):
            found = ", ".join(f"{size} slices of rank {rank}" for size, rank in sorted(held))
            raise ConfigError(
                f"method {self.name}: task {task.index + 1} ({task.name}) has no slice of rank {self.rank} in an "
                f"adapter of {found}; attach one of rank lora.rank x number of tasks, in slices of lora.rank"
            )
        self._close(engine)
        self.slices = Slices(self.rank, place)
        tensors = engine.adapter_tensors()
        show_slice(engine.module, place)
        engine.write_leaves({name: cut(name, tensors[name], self.slices.own) for name in engine.adapter_leaves()})

    def place(self, index: int, slots: int) -> int:
        """Which of so many slices a task takes."""
        return index

    def start_a(self, name: str, part: Tensor) -> Tensor:
        """The task's A at its start, of the shape of `part`."""
        raise NotImplementedError

    def write(self, engine: Engine, parts: Mapping[str, Tensor], where: slice) -> None:
        """Set some slices of some tensors of the adapter. Collective."""
        tensors, whole = engine.adapter_tensors(), {}
        for name, part in parts.items():
            whole[name] = tensors[name].clone()
            cut(name, whole[name], where).copy_(part)
        engine.write_adapter(whole)

    def _close(self, engine: Engine) -> None:
        if any(factor.index is not None for factor in sliced_factors(engine.module).values()):
            engine.write_adapter(engine.adapter_tensors())
            show_slice(engine.module, None)
