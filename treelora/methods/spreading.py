"""What HiDe-Prompt and HiDe-LoRA add to a task's loss on images: features of a batch are spread (arXiv 2310.07234).

Within-task prediction has a contrastive term that keeps the features h of a task's images away from each other and from
the means mu of the classes before. As the authors' code (https://github.com/thu-ml/HiDe-Prompt) has it, each of these
vectors shall be more like itself than like any other:

    lambda * mean over v in {mu_1, .., mu_C, h_1, .., h_B} of -log(exp(v.v / tau) / sum over w of exp(v.w / tau))

with tau = 0.8, of a worker's micro-batch: how a global batch is split has a part in what is learnt. Theirs are up to
ten centroids a class, ours is the mean that the alignment of the head keeps, so that the term costs no storage. Text
has no features that a head reads, and no such term.

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
from treelora.methods.added_term import AddedTerm
from treelora.methods.base import TaskContext
from treelora.models.vision import head_inputs

if TYPE_CHECKING:
    from treelora.data.batches import Batch

TEMPERATURE = 0.8


class Spreading(AddedTerm):
    """Adds the term to whatever loss a method has."""

    spread: float = 0.0
    """Lambda."""
    _means: Tensor | None = None

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.resume_task(task, engine, bank)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._means = None if task.class_means is None else task.class_means.to(engine.device)

    def loss(self, engine: Engine, batch: Batch, normaliser: float) -> Tensor:
        """See `Method`."""
        if not self.spread or "pixel_values" not in batch:
            return super().loss(engine, batch, normaliser)
        with head_inputs(engine.module) as seen:
            learnt = super().loss(engine, batch, normaliser)
        features_BF = seen[0].float()
        spread = self.spread * spread_loss(features_BF, self._means) * len(features_BF) / normaliser
        return learnt + self.added(spread)


def spread_loss(features_BF: Tensor, means_CF: Tensor | None) -> Tensor:
    """The term without lambda, a scalar."""
    points_NF = features_BF if means_CF is None else torch.cat([means_CF, features_BF])
    return F.cross_entropy(points_NF @ points_NF.T / TEMPERATURE, torch.arange(len(points_NF), device=points_NF.device))
