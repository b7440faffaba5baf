"""`ewc`: online Elastic Weight Consolidation (Schwarz et al., ICML 2018, arXiv 1805.06370).

After a task the adapter's weights are weighed by how much the task's answers depend on them, and later tasks pay for
moving them. EWC (Kirkpatrick et al., 2017, arXiv 1612.00796) keeps one penalty a task; the online form one in all.

    F_n = mean over rows of (d log p(answer | prompt) / d w)^2        at w*_n, the adapter after task n, row by row
    F   = gamma F + F_n
    penalty = lambda / 2 * sum_i F_i (w_i - w*_i)^2                    w*: the adapter after the last task

Where this leaves the paper: the Fisher information is the empirical one (the row's own answer, not a sample of the
model's), on at most `fisher_rows` training rows, dropout off; it isn't scaled to equal size for every task. The
data's loss is a mean over answer tokens while F belongs to whole answers, so lambda = 1 isn't the Bayesian choice.
Cost beside plain training: `fisher_rows` passes of one row a task, none a step. Kept: F, as large as the adapter; w* is
the adapter of the last task, which is in the bank anyway.

Shapes: D numbers of the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.methods.base import Method, StepMetrics, TaskContext
from treelora.methods.episodic import PURPOSE_FISHER, choose, row_gradients
from treelora.methods.extra_gradient import flatten
from treelora.options.peers import EWCOptions


class EWC(Method):
    """Online EWC: one quadratic penalty for all past tasks."""

    name = "ewc"

    def __init__(self, options: EWCOptions | None = None, seed: int = 0):
        super().__init__(options, seed)
        self.options = options or EWCOptions()
        self.fisher_D: Tensor | None = None
        self._last = StepMetrics()

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.task = task
        if self.fisher_D is not None:
            self.fisher_D = self.fisher_D.to(engine.device)
            names = engine.adapter_leaves()
            self._star_D = flatten({name: bank[-1][name] for name in names}).to(engine.device)

    resume_task = begin_task

    def penalty_loss(self, engine: Engine) -> Tensor | None:
        """See `Method`."""
        if self.fisher_D is None:
            return None
        weights_D = torch.cat([tensor.reshape(-1) for tensor in engine.adapter_leaves().values()])
        penalty = self.options.strength / 2 * (self.fisher_D * (weights_D - self._star_D).square()).sum()
        self._penalty = penalty.detach()
        return penalty

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if self.fisher_D is None:
            return
        moved_D = flatten(engine.adapter_tensors()) - self._star_D
        by_penalty_D = self.options.strength * self.fisher_D * moved_D
        by_loss_D = flatten(engine.adapter_gradients()) - by_penalty_D
        ratio = by_penalty_D.norm() / by_loss_D.norm().clamp_min(1e-30)
        self._last = StepMetrics({"penalty_loss": self._penalty, "penalty_ratio": ratio})

    def step_skipped(self) -> None:
        """See `Method`."""
        self._last = StepMetrics()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        options, index = self.options, self.task.index
        chosen = choose(self.task.sizes[index], options.fisher_rows, self.seed, index, PURPOSE_FISHER)
        rows = [(index, row) for row in chosen]
        total_D = torch.zeros_like(flatten(engine.adapter_tensors()))
        used = total_D.new_zeros(1)
        for _, gradient_D, weight in row_gradients(engine, self.task, rows):
            finite = gradient_D.isfinite().all()  # one row that overflows mustn't spoil all later tasks
            total_D += weight * torch.where(finite, gradient_D, 0.0).square()
            used += weight * finite
        total_D, used = engine.all_reduce(torch.cat([total_D, used])).split([len(total_D), 1])
        fisher_D = total_D / used.clamp_min(1)
        self.fisher_D = fisher_D if self.fisher_D is None else options.gamma * self.fisher_D + fisher_D

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        return {} if self.fisher_D is None else {"fisher": self.fisher_D.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self.fisher_D = state.get("fisher")
