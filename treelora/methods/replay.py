"""`replay`: experience replay from a small reservoir (Rolnick et al., 2019, arXiv 1811.11682; Chaudhry et al., 2019,
arXiv 1902.10486).

At a task's end `share` of its training rows, one at least, goes into the reservoir, each row equally likely. From the
second task on `fraction` of every step's rows is taken from there:

    loss = (sum over own rows + weight * sum over replayed rows of -log p(answer)) / (answer tokens, weighted alike)

**A replayed row takes the place of a row of the step's own**, drawn at random: as many rows, forward passes and, to the
difference of rows' lengths, tokens a step as without replay (the tracked `tokens` are those of the step's own rows), at
the price of seeing the task's own rows less often. Adding them on top would compare unequal budgets.

Where this leaves the papers: their reservoir has a fixed size, here it grows with the rows seen, so that no row leaves
it once it is in; what is kept of a task is a uniform sample without replacement of all its training rows.
Kept: row numbers, 24 bytes each. The rows themselves must remain readable.

Shapes: B rows, T tokens, G rows of a global batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from treelora.data.batches import NO_LOSS, Batch, joined
from treelora.engine import Engine
from treelora.errors import ConfigError
from treelora.methods.episodic import PURPOSE_REPLACED, EpisodicMethod, choose
from treelora.objective import answer_logits
from treelora.options.peers import ReplayOptions


class Replay(EpisodicMethod):
    """Experience replay at equal rows a step."""

    name = "replay"

    def __init__(self, options: ReplayOptions | None = None, seed: int = 0):
        super().__init__(options, seed)
        self.options = options or ReplayOptions()

    def rows_to_keep(self, rows: int) -> int:
        """See `EpisodicMethod`."""
        return max(1, math.floor(self.options.share * rows + 0.5))

    def before_step(self, step: int) -> None:
        """Deal the replayed rows to this worker's micro-batches.

        Raises:
            ConfigError: there is one row a step, which can't be shared.
        """
        if not len(self.memory) or not self.options.fraction:
            return
        task, engine, options = self.task, self.engine, self.options
        batches = task.micro_batches(step - 1)
        rows = len(batches[0]["labels"])
        total = rows * len(batches) * engine.world_size
        count = max(1, round(options.fraction * total))
        if count >= total:
            raise ConfigError(
                f"replay.fraction {options.fraction}: replays all of a step's {total} rows; raise train.global_batch"
            )
        drawn_M3 = self.memory.draw(count, self.seed, task.index, step)
        places_G = sorted(choose(total, count, self.seed, task.index, PURPOSE_REPLACED, block=step))
        self._plan: list[dict[int, tuple[int, int]]] = []
        own_tokens = torch.zeros((), device=engine.device)
        for number, batch in enumerate(batches):
            first = (number * engine.world_size + engine.rank) * rows  # where the loop cut the global batch
            plan = {
                place - first: (int(unit), int(row))
                for place, (unit, row, _) in zip(places_G, drawn_M3, strict=True)
                if first <= place < first + rows
            }
            own_tokens += (batch["labels"] != NO_LOSS)[[i for i in range(rows) if i not in plan]].sum()
            self._plan.append(plan)
        tokens = float(engine.all_reduce(own_tokens)) + options.weight * int(drawn_M3[:, 2].sum())
        self._normaliser = tokens / engine.world_size
        self._place = 0

    def loss(self, engine: Engine, batch: Batch, normaliser: float) -> Tensor:
        """See `Method`."""
        if not len(self.memory) or not self.options.fraction:
            return super().loss(engine, batch, normaliser)
        plan = self._plan[self._place]
        self._place += 1
        rows = len(batch["labels"])
        if plan:
            kept = [row for row in range(rows) if row not in plan]
            batch = joined(batch, kept, self.task.fetch(list(plan.values())))
        logits_BWV, labels_BW = answer_logits(engine.forward_model(), batch)
        losses = F.cross_entropy(
            logits_BWV.flatten(0, 1).float(), labels_BW.flatten(), ignore_index=NO_LOSS, reduction="none"
        )
        weights_B = torch.ones(rows, device=losses.device)
        weights_B[rows - len(plan) :] = self.options.weight
        return (losses.view_as(labels_BW).sum(1) * weights_B).sum() / self._normaliser
