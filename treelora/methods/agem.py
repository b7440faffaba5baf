"""`agem`: Averaged Gradient Episodic Memory (Chaudhry et al., ICLR 2019, arXiv 1812.00420).

A few rows of every past task are kept. At each step a random batch of them gives a reference gradient; where the step's
gradient would increase their loss, that part is taken out (Eq. 11):

    g <- g - (g . r / r . r) r    where g . r < 0

Where this leaves the paper: the optimizer is AdamW, not SGD, so that the guarantee holds for the gradient that the
optimizer is given; the memory is the same number of training rows for every task, drawn uniformly.
Cost beside plain training, from the second task on: a forward and a backward pass on `batch_rows` rows a step. Kept:
row numbers, 24 bytes each.

Shapes: D numbers of the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.methods.base import Method, StepMetrics, TaskContext
from treelora.methods.episodic import EpisodicMemory, memory_gradients
from treelora.methods.extra_gradient import flatten, unflatten
from treelora.options.peers import AGEMOptions


def project(gradient_D: Tensor, reference_D: Tensor) -> Tensor:
    """The nearest vector to the gradient whose inner product with the reference isn't negative (Eq. 11)."""
    product = gradient_D @ reference_D
    square = reference_D.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(product < 0, gradient_D - product / square * reference_D, gradient_D)


class AGEM(Method):
    """A-GEM: the step's gradient never opposes that of a batch of past rows."""

    name = "agem"
    replays = True

    def __init__(self, options: AGEMOptions | None = None, seed: int = 0):
        super().__init__(options, seed)
        self.options = options or AGEMOptions()
        self.memory = EpisodicMemory()
        self._last = StepMetrics()

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.task = task

    resume_task = begin_task

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._step = step

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if not len(self.memory):
            return
        options = self.options
        count = min(options.batch_rows, len(self.memory))
        rows_M3 = self.memory.draw(count, self.seed, self.task.index, self._step)
        [reference_D] = memory_gradients(engine, self.task, [rows_M3], options.micro_rows)
        gradients = engine.adapter_gradients()
        gradient_D = flatten(gradients)
        projected_D = project(gradient_D, reference_D)
        engine.set_adapter_gradients(unflatten(projected_D, {name: g.shape for name, g in gradients.items()}))
        ratio = (projected_D - gradient_D).norm() / gradient_D.norm().clamp_min(1e-30)
        self._last = StepMetrics({"penalty_ratio": ratio})

    def step_skipped(self) -> None:
        """See `Method`."""
        self._last = StepMetrics()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        self.memory.add(self.task, self.options.rows_per_task, self.seed)

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self.memory.load_state_dict(state)
