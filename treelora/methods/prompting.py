"""What the methods share that train prompts in place of LoRA (`treelora.models.prompted`), on images only.

    loss = cross-entropy + lambda * mean over images of the sum over their prompts of (1 - cos(query, key))

The query is a forward pass of the frozen model, made anew for each batch, without gradient: two passes a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treelora.engine import Engine
from treelora.methods.base import Method, StepMetrics
from treelora.models.prompted import PromptSpec
from treelora.objective import answer_loss

if TYPE_CHECKING:
    from treelora.data.batches import Batch
    from treelora.models.prompted import PromptedOutput


class Prompting(Method):
    """Trains prompts, their keys and the head."""

    pull: float = 0.0
    """Lambda; methods with keys set their own."""

    @staticmethod
    def prompts(options: Any, tasks: int) -> PromptSpec:
        """The prompts for a stream of so many tasks."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._pulled = torch.zeros(())
        self._last = StepMetrics()

    def loss(self, engine: Engine, batch: Batch, normaliser: float) -> Tensor:
        """See `Method`; the keys' term is part of what is tracked as `loss`, and by itself as `penalty_loss`."""
        given: list[PromptedOutput] = []

        def model(**inputs: Any) -> PromptedOutput:
            given.append(engine.forward_model()(**inputs))
            return given[0]

        learnt = answer_loss(model, batch, normaliser)
        if not self.pull:
            return learnt
        away = self.pull * (1 - given[0].similarity).sum() / normaliser
        self._pulled = self._pulled.to(away.device) + away.detach()
        return learnt + away

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if self.pull:
            self._last = StepMetrics({"penalty_loss": engine.all_reduce(self._pulled, mean=True)})

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last
