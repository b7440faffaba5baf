"""`lwf`: Learning without Forgetting (Li and Hoiem, ECCV 2016, arXiv 1606.09282).

No old rows are needed: on the new task's own rows the model is asked to go on saying what it said before the task.

    loss = cross-entropy + lambda * mean over answer tokens of KL( p_old^(1/T) || p_w^(1/T) )

where p^(1/T), normalised, is the distribution over the vocabulary of the logits divided by the temperature T, and p_old
comes from the adapter as the last task left it.

Where this leaves the paper: it has an output head for each task and distils the old heads; a language model has one
for all tasks, so that old and new answers compete at the same positions. KL in place of cross-entropy differs by a
constant and is 0 at the old weights. The paper records old outputs once before the task; they are computed anew at
every step here, for a vocabulary of 50,000 times the rows wouldn't be kept. Like the paper's Eq. 3, no factor T^2.
Cost beside plain training, from the second task on: a forward pass without backward of every micro-batch. Kept:
nothing; the old adapter is in the bank anyway.

Shapes: B rows, W answer width, V vocabulary, A answer tokens of a micro-batch.
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
from treelora.methods.episodic import dropout_off
from treelora.objective import answer_logits
from treelora.options.peers import LwFOptions

if TYPE_CHECKING:
    from treelora.data.batches import Batch


def distillation(new_AV: Tensor, old_AV: Tensor, temperature: float) -> Tensor:
    """KL divergence of the new from the old softened distributions, summed over tokens; float32 scalar."""
    new_log_AV = F.log_softmax(new_AV.float() / temperature, dim=-1)
    old_log_AV = F.log_softmax(old_AV.float() / temperature, dim=-1)
    return F.kl_div(new_log_AV, old_log_AV, reduction="sum", log_target=True)


class LwF(AddedTerm):
    """LwF: the new task's rows are answered as before, besides being learnt."""

    name = "lwf"

    def __init__(self, options: LwFOptions | None = None, seed: int = 0):
        super().__init__(options, seed)
        self.options = options or LwFOptions()
        self.old: AdapterState | None = None

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.old = bank[-1] if bank else None

    resume_task = begin_task

    def loss(self, engine: Engine, batch: Batch, normaliser: float) -> Tensor:
        """See `Method`."""
        if self.old is None:
            return super().loss(engine, batch, normaliser)
        # the old outputs first: swapping weights between a forward and its backward pass would falsify gradients
        with engine.using_adapter(self.old), dropout_off(engine.module), torch.no_grad():
            old_BWV, _ = answer_logits(engine.module, batch)
        new_BWV, labels_BW = answer_logits(engine.forward_model(), batch)
        answers_BW = labels_BW != -100
        new_AV, old_AV = new_BWV[answers_BW], old_BWV[answers_BW]
        learnt = F.cross_entropy(new_AV.float(), labels_BW[answers_BW], reduction="sum")
        penalty = self.options.strength * distillation(new_AV, old_AV, self.options.temperature)
        return learnt / normaliser + self.added(penalty / normaliser)
