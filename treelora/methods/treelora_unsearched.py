"""What `protect` and `guard` share: TreeLoRA that leaves alone what past tasks' losses depend on, and searches nothing.

What a task's loss reads is measured in steps that it is learnt in (`treelora.methods.reading`). Signatures and their
tree are kept for inference and for people, for which a quarter of a batch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.memory_records import Groups
from treelora.methods.base import StepMetrics, TaskContext
from treelora.methods.reading import Reading
from treelora.methods.remembering import Memory, Remembering
from treelora.methods.treelora_signature import SignatureSource
from treelora.options.tree import TreeLoRAOptions


class UnsearchedTreeLoRA(Remembering):
    """Their base; `memory` is used on rank 0 only and may be None elsewhere."""

    name = "treelora"
    preparation = "measuring its signature"
    probe_rank: int | None = None
    """Rank of the probes; None: the adapter's."""

    def __init__(self, options: TreeLoRAOptions, memory: Memory | None, seed: int = 0, **more: Any) -> None:
        super().__init__(options, seed, **more)
        self.options, self.memory = options, memory
        self.reading: Reading | None = None
        """What the current task's loss reads, while it is learnt."""
        self.groups: Groups = ()
        """On rank 0: the tasks behind each arm of the memory."""
        self._resumed: dict[str, Tensor] = {}
        self._step, self._last = 0, StepMetrics()

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        super().begin_task(task, engine, bank)
        self._watch(task, engine)
        if self.options.probe_batches:
            self.source.measure(task)
        else:
            self.source.measure_rows(task)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        super().resume_task(task, engine, bank)
        self._watch(task, engine)
        self.source.load_state_dict(self._resumed)
        self.seen.load_state_dict(self._resumed)

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._step, self._last = step, StepMetrics()
        self.seen.before_step(step)

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        self.seen.after_step()

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
            self.groups = self.memory.end_task(self.task.name, sketch_LK.numpy(), float(self.task.sizes[-1]))
        self.keep(self.seen)
        self.reading = None

    def keep(self, seen: Reading) -> None:
        """Take in what the task that was just learnt reads. Collective."""
        raise NotImplementedError

    def kept(self) -> dict[str, Tensor]:
        """What past tasks left, and what else is needed within a task, beside signature and reading."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        if self._step == 0:  # nothing was learnt since the state was loaded
            return dict(self._resumed)
        learning = self.reading.state_dict() if self.reading else {}
        return self.source.state_dict() | learning | self.kept()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self._resumed = state

    @property
    def seen(self) -> Reading:
        """What the current task's loss reads."""
        assert self.reading, "no task is being learnt"
        return self.reading

    def _watch(self, task: TaskContext, engine: Engine) -> None:
        self.task, self.engine = task, engine
        self._step, self._last = 0, StepMetrics()
        if self.memory:
            self.memory.begin_task(task.name, task.steps)
        self.source = SignatureSource(self.options, engine, self.seed, self.probe_rank)
        if self.reading:
            self.reading.close()
        self.reading = Reading(engine, task.steps, self.seed)
