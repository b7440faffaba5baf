"""`ogd`: Orthogonal Gradient Descent (Farajtabar et al., AISTATS 2020, arXiv 1910.07104), variant OGD-GTL.

After a task the gradients of what the model says of some of its rows are kept, orthonormalised with those of earlier
tasks, and later tasks only move at right angles to them: to first order, the past rows' answers stay as likely as they
were.

    v_i = d log p(answer_i | prompt_i) / d w      at the adapter after the task, for each of a few rows
    g   <- g - V^T V g                            V: an orthonormal basis of all v_i

The paper's GTL takes the logit of the true class. An answer of several tokens has no one logit; its log-likelihood is
the same up to the normaliser. The paper's step is plain gradient descent: AdamW scales coordinates one by one, which
turns the projected gradient out of its subspace again, so that `project_step` projects the step that AdamW made, too.
The basis is bounded: where more directions come together than `basis_rows`, the strongest singular ones of all
unit-length gradients stay, in place of Gram and Schmidt's first ones.
Cost beside plain training: `rows_per_task` passes of one row a task, none a step. Kept: up to `basis_rows` times the
adapter's size.

Shapes: K basis vectors, R rows, D numbers of the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.methods.base import Method, StepMetrics, TaskContext
from treelora.methods.episodic import PURPOSE_BASIS, choose, row_gradients
from treelora.methods.extra_gradient import flatten, leaf_vector, unflatten, write_leaf_vector
from treelora.options.peers import OGDOptions


def extend(basis_KD: Tensor, strength_K: Tensor, gradients_RD: Tensor, at_most: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the old directions and new gradients, and its singular values, the largest first.

    Gradients count alike, whatever their length; one that isn't finite is left out. Directions below 1e-5 of the
    strongest are rounding.
    """
    gradients_RD = gradients_RD[gradients_RD.isfinite().all(dim=1)]
    unit_RD = gradients_RD / gradients_RD.norm(dim=1, keepdim=True).clamp_min(1e-30)
    stacked = torch.cat([strength_K[:, None] * basis_KD, unit_RD])
    _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
    kept = min(at_most, int((values > 1e-5 * values.max()).sum())) if len(values) else 0
    return vectors[:kept].contiguous(), values[:kept]


class OGD(Method):
    """OGD: steps at right angles to what past rows' answers depend on."""

    name = "ogd"

    def __init__(self, options: OGDOptions | None = None, seed: int = 0):
        super().__init__(options, seed)
        self.options = options or OGDOptions()
        self.basis_KD, self.strength_K = torch.zeros(0, 0), torch.zeros(0)
        self._last = StepMetrics()

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.task = task
        self.basis_KD, self.strength_K = self.basis_KD.to(engine.device), self.strength_K.to(engine.device)

    resume_task = begin_task

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if not len(self.basis_KD):
            return
        gradients = engine.adapter_gradients()
        gradient_D = flatten(gradients)
        forbidden_D = self.within(gradient_D)
        shapes = {name: gradient.shape for name, gradient in gradients.items()}
        engine.set_adapter_gradients(unflatten(gradient_D - forbidden_D, shapes))
        self._last = StepMetrics({"penalty_ratio": forbidden_D.norm() / gradient_D.norm().clamp_min(1e-30)})
        if self.options.project_step:
            self._before_D = leaf_vector(engine)

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        if self.options.project_step and len(self.basis_KD):
            now_D = leaf_vector(engine)
            write_leaf_vector(engine, now_D - self.within(now_D - self._before_D))

    def within(self, vector_D: Tensor) -> Tensor:
        """The part of a vector that lies in the span of the basis."""
        return (self.basis_KD @ vector_D) @ self.basis_KD

    def step_skipped(self) -> None:
        """See `Method`."""
        self._last = StepMetrics()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        options, index = self.options, self.task.index
        chosen = choose(self.task.sizes[index], options.rows_per_task, self.seed, index, PURPOSE_BASIS)
        numbers = len(leaf_vector(engine))
        gradients_RD = torch.zeros(len(chosen), numbers, device=engine.device)
        for place, gradient_D, weight in row_gradients(engine, self.task, [(index, row) for row in chosen]):
            gradients_RD[place] += weight * gradient_D
        gradients_RD = engine.all_reduce(gradients_RD)
        basis_KD = self.basis_KD.reshape(-1, numbers)  # before the first task it has no width yet
        self.basis_KD, self.strength_K = extend(basis_KD, self.strength_K, gradients_RD, options.basis_rows)

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        return {"basis": self.basis_KD.cpu(), "strength": self.strength_K.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self.basis_KD, self.strength_K = state["basis"], state["strength"]
