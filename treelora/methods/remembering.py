"""Methods with a memory of past tasks' signatures, and that memory as they see it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from treelora.engine import Engine
from treelora.memory_records import Groups, Past
from treelora.methods.base import Method, StepMetrics


class Memory(Protocol):
    """The shared memory as a worker's rank 0 sees it: `TaskMemory` in process, or a client of the tree actor."""

    def begin_task(self, task: str, horizon: int) -> Past:
        """What the task is compared with."""
        ...

    def submit(self, step: int, observation: np.ndarray | None) -> None:
        """Ask for the arms of a step, and tell the losses seen with the arms of the step before."""
        ...

    def collect(self) -> tuple[np.ndarray, np.ndarray]:
        """Answer of the last `submit`: arms int64 [L] and their bounds float32 [L]."""
        ...

    def past(self) -> Past:
        """What the next task will be compared with."""
        ...

    def describe(self) -> dict[str, Any]:
        """Tree, pulls and bounds as JSON values, for logs and pictures."""
        ...

    def end_task(self, task: str, sketch: np.ndarray, mass: float) -> Groups:
        """Record the signature of the task, float32 [L, K], which stands for `mass` rows; the tasks behind each arm."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go back to `state_dict`."""
        ...


class Remembering(Method):
    """What they share; `memory` is used on rank 0 only and may be None elsewhere."""

    memory: Memory | None
    _last: StepMetrics

    def task_tree(self, engine: Engine) -> Past | None:
        """See `Method`."""
        return engine.broadcast(self.memory.past() if self.memory else None)

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last
