"""What HiDe-Prompt and HiDe-LoRA add to a task's loss on images: features of a batch are spread (arXiv 2310.07234).

Within-task prediction has a contrastive term that keeps the features h of a task's images away from each other and from
the means mu of the classes before. As the authors' code (https://github.com/thu-ml/HiDe-Prompt) has it, each of these
vectors shall be more like itself than like any other:

    lambda * mean over v in {mu_1, .., mu_C, h_1, .., h_B} of -log(exp(v.v / tau) / sum over w of exp(v.w / tau))

with tau = 0.8. Theirs are up to ten centroids a class, ours is the mean that the alignment of the head keeps, so that
the term costs no storage. Text has no features that a head reads, and no such term.

Shapes: B images of a micro-batch, C classes before, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.methods.base import Method, StepMetrics, TaskContext
from treelora.models.vision import head_inputs

if TYPE_CHECKING:
    from treelora.data.batches import Batch

TEMPERATURE = 0.8


class Spreading(Method):
    """Adds the term to whatever loss a method has."""

    spread: float = 0.0
    """Lambda."""
    _means: Tensor | None = None
    _apart: Tensor | None = None
    _last = StepMetrics()

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.resume_task(task, engine, bank)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._means = None if task.class_means is None else task.class_means.to(engine.device)

    def before_step(self, step: int) -> None:
        """See `Method`."""
        super().before_step(step)
        self._apart = None
        self._last = StepMetrics()

    def loss(self, engine: Engine, batch: Batch, normaliser: float) -> Tensor:
        """See `Method`; the term is part of what is tracked as `loss`, and by itself as `penalty_loss`."""
        if not self.spread or "pixel_values" not in batch:
            return super().loss(engine, batch, normaliser)
        with head_inputs(engine.module) as seen:
            learnt = super().loss(engine, batch, normaliser)
        features_BF = seen[0].float()
        apart = self.spread * spread_loss(features_BF, self._means) * len(features_BF) / normaliser
        self._apart = apart.detach() if self._apart is None else self._apart + apart.detach()
        return learnt + apart

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        super().after_backward(engine)
        if self._apart is not None:
            self._last = StepMetrics({"penalty_loss": engine.all_reduce(self._apart, mean=True)})

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last


def spread_loss(features_BF: Tensor, means_CF: Tensor | None) -> Tensor:
    """The term without lambda, a scalar."""
    points_NF = features_BF if means_CF is None else torch.cat([means_CF, features_BF])
    return F.cross_entropy(points_NF @ points_NF.T / TEMPERATURE, torch.arange(len(points_NF), device=points_NF.device))
