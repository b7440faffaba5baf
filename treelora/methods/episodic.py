"""Rows of earlier tasks that a method keeps, by number only, and gradients on chosen rows.

Shapes: M rows kept, S sets of rows, D numbers of the adapter, all tensors one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.methods.base import Method, StepMetrics, TaskContext
from treelora.methods.extra_gradient import flatten, local_gradient, unflatten
from treelora.objective import answer_loss
from treelora.options import Options
from treelora.sketch import keyed_bits

Row = tuple[int, int]
"""Unit of the stream, and training row of it."""

# One purpose, one stream: which rows are kept must not tell which are drawn (`treelora.sketch` has 1 to 3).
PURPOSE_KEPT, PURPOSE_DRAWN, PURPOSE_FISHER, PURPOSE_BASIS, PURPOSE_REPLACED = 15, 16, 17, 18, 19


def choose(size: int, count: int, seed: int, stream: int, purpose: int, block: int = 0) -> list[int]:
    """`count` of the numbers 0 .. `size` - 1, or all where there are fewer, in random order; all sets are as likely.

    The smallest of counter-based random keys: what a reservoir would hold that sees the numbers one by one.
    """
    keys = keyed_bits(seed, stream, size, purpose=purpose, block=block)
    return [int(number) for number in np.argsort(keys, kind="stable")[:count]]


class EpisodicMemory:
    """Rows of earlier tasks. Their text stays in the data; what is kept is int64 [M, 3]: unit, row, answer tokens."""

    def __init__(self) -> None:
        self.rows_M3 = torch.zeros(0, 3, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows_M3)

    def add(self, task: TaskContext, count: int, seed: int) -> None:
        """Keep `count` training rows of a task, drawn uniformly without replacement; a pure function of the seed."""
        numbers = sorted(choose(task.sizes[task.index], count, seed, task.index, PURPOSE_KEPT))
        rows = [(task.index, number) for number in numbers]
        tokens_M = (task.fetch(rows)["labels"] != -100).sum(1).cpu()
        new_M3 = torch.cat([torch.tensor(rows), tokens_M[:, None]], dim=1)
        self.rows_M3 = torch.cat([self.rows_M3, new_M3])

    def of_each_task(self) -> list[Tensor]:
        """The rows of each task in turn, each int64 [., 3]."""
        return [self.rows_M3[self.rows_M3[:, 0] == unit] for unit in self.rows_M3[:, 0].unique()]

    def draw(self, count: int, seed: int, task: int, step: int) -> Tensor:
        """`count` rows for a step, int64 [count, 3]: without replacement, anew from the whole where they run out."""
        order = choose(len(self), len(self), seed, task, PURPOSE_DRAWN, block=step)
        return self.rows_M3[[order[i % len(order)] for i in range(count)]]

    def state_dict(self) -> dict[str, Tensor]:
        """All that is kept."""
        return {"rows": self.rows_M3}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self.rows_M3 = state["rows"]


class EpisodicMethod(Method):
    """A method that keeps rows of every task it has learnt."""

    replays = True

    def __init__(self, options: Options | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.memory = EpisodicMemory()

    def rows_to_keep(self, rows: int) -> int:
        """How many of a task's training rows to keep, given how many it has."""
        raise NotImplementedError

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.task, self.engine = task, engine

    resume_task = begin_task

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        self.memory.add(self.task, self.rows_to_keep(self.task.sizes[self.task.index]), self.seed)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self.memory.load_state_dict(state)


class ProjectingMethod(EpisodicMethod):
    """One that changes the step's gradient by what the kept rows would lose by it."""

    def __init__(self, options: Options | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._last = StepMetrics()

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self.step = step

    def projected(self, gradient_D: Tensor) -> Tensor:
        """The gradient to take instead; the same object where it may stay. Collective."""
        raise NotImplementedError

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if not len(self.memory):
            return
        gradients = engine.adapter_gradients()
        gradient_D = flatten(gradients)
        projected_D = self.projected(gradient_D)
        if projected_D is not gradient_D:
            engine.set_adapter_gradients(unflatten(projected_D, {name: g.shape for name, g in gradients.items()}))
        ratio = (projected_D - gradient_D).norm() / gradient_D.norm().clamp_min(1e-30)
        self._last = StepMetrics({"penalty_ratio": ratio})

    def step_skipped(self) -> None:
        """See `Method`."""
        self._last = StepMetrics()

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last


def deal(rows: Sequence[Row], rank: int, world: int, at_most: int) -> Iterator[tuple[Sequence[Row], float]]:
    """This rank's groups of at most `at_most` rows and their weight: 1, or 0 for a stand-in.

    All ranks get as many groups, for sharded models need every rank at every forward pass; one that has no rows left is
    given the first row with weight 0.
    """
    size = min(at_most, -(-len(rows) // world))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    for first in range(0, len(groups), world):
        mine = first + rank
        yield (groups[mine], 1.0) if mine < len(groups) else (rows[:1], 0.0)


def row_gradients(engine: Engine, task: TaskContext, rows: Sequence[Row]) -> Iterator[tuple[int, Tensor, float]]:
    """Gradient of -log p(answer | prompt) for each of this rank's rows: its place in `rows`, [D], and its weight.

    The log-likelihood is that of the whole answer: a sum over its tokens. Dropout is off.
    """
    with dropout_off(engine.module):
        places = {row: place for place, row in enumerate(rows)}
        for (row, *_), weight in deal(rows, engine.rank, engine.world_size, 1):
            yield places[row], local_gradient(engine, _loss_on(engine, task, [row], 1.0)), weight


def memory_gradients(engine: Engine, task: TaskContext, sets: Sequence[Tensor], at_most: int) -> Tensor:
    """Gradient of the mean answer loss on each set of rows, at the current weights, float32 [S, D]. Collective.

    Args:
        sets: Each int64 [., 3] as in `EpisodicMemory`.
        at_most: Rows of one forward pass.
    """
    numbers = sum(leaf.numel() for leaf in engine.adapter_leaves().values())
    total_SD = torch.zeros(len(sets), numbers, device=engine.device)
    for place, rows_M3 in enumerate(sets):
        normaliser = int(rows_M3[:, 2].sum()) / engine.world_size
        rows: list[Row] = [(int(unit), int(row)) for unit, row, _ in rows_M3]
        for group, weight in deal(rows, engine.rank, engine.world_size, at_most):
            loss = _loss_on(engine, task, group, normaliser)
            total_SD[place] += weight * local_gradient(engine, loss)
    return engine.all_reduce(total_SD, mean=True)


@contextmanager
def dropout_off(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in evaluation mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _loss_on(engine: Engine, task: TaskContext, rows: Sequence[Row], normaliser: float) -> Callable[[], Tensor]:
    return partial(answer_loss, engine.module, task.fetch(rows), normaliser)
