"""What the methods share that train prompts in place of LoRA (`treelora.models.prompted`), on images only.

    loss = cross-entropy + lambda * mean over images of the sum over their prompts of (1 - cos(query, key))

The query is a forward pass of the frozen model, made anew for each batch, without gradient: two passes a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from treelora.engine import Engine
from treelora.methods.added_term import AddedTerm
from treelora.models.prompted import PromptSpec
from treelora.objective import answer_loss

if TYPE_CHECKING:
    from treelora.data.batches import Batch
    from treelora.models.prompted import PromptedOutput


class Prompting(AddedTerm):
    """Trains prompts, their keys and the head."""

    pull: float = 0.0
    """Lambda; methods with keys set their own."""

    @staticmethod
    def prompts(options: Any, tasks: int) -> PromptSpec:
        """The prompts for a stream of so many tasks."""
        raise NotImplementedError

    def loss(self, engine: Engine, batch: Batch, normaliser: float) -> Tensor:
        """See `Method`."""
        given: list[PromptedOutput] = []

        def model(**inputs: Any) -> PromptedOutput:
            given.append(engine.forward_model()(**inputs))
            return given[0]

        learnt = answer_loss(model, batch, normaliser)
        if not self.pull:
            return learnt
        return learnt + self.added(self.pull * (1 - given[0].similarity).sum() / normaliser)
