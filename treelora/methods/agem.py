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

import torch
from torch import Tensor

from treelora.methods.episodic import ProjectingMethod, memory_gradients
from treelora.options.peers import AGEMOptions


def project(gradient_D: Tensor, reference_D: Tensor) -> Tensor:
    """The nearest vector to the gradient whose inner product with the reference isn't negative (Eq. 11)."""
    product = gradient_D @ reference_D
    square = reference_D.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(product < 0, gradient_D - product / square * reference_D, gradient_D)


class AGEM(ProjectingMethod):
    """A-GEM: the step's gradient never opposes that of a batch of past rows."""

    name = "agem"

    def __init__(self, options: AGEMOptions | None = None, seed: int = 0):
        super().__init__(options, seed)
        self.options = options or AGEMOptions()

    def rows_to_keep(self, rows: int) -> int:
        """See `EpisodicMethod`."""
        return self.options.rows_per_task

    def projected(self, gradient_D: Tensor) -> Tensor:
        """See `ProjectingMethod`."""
        count = min(self.options.batch_rows, len(self.memory))
        rows_M3 = self.memory.draw(count, self.seed, self.task.index, self.step)
        [reference_D] = memory_gradients(self.engine, self.task, [rows_M3], self.options.micro_rows)
        return project(gradient_D, reference_D)
