"""What the loop learns from and is judged on: chosen rows of tokenised splits, as batches on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from treelora.data.batches import Batch, BatchPlan, collate
from treelora.data.schema import Example
from treelora.data.task import Task
from treelora.data.tokenize import TokenizedRows
from treelora.errors import DataError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Chosen rows of a tokenised split."""

    rows: TokenizedRows
    chosen: Indices

    def __len__(self) -> int:
        return len(self.chosen)

    def prompts(self, limit: int | None = None) -> list[list[int]]:
        """Token ids of the prompts."""
        return [self.rows.prompt_ids(int(i)).tolist() for i in self.chosen[:limit]]


@dataclass(frozen=True)
class TestSplit(Split):
    """Rows to be judged on, with their texts."""

    task: Task
    examples: Sequence[Example]
    """The examples of `chosen`, in that order."""

    __test__ = False  # not a test case, whatever pytest thinks of the name


def choose_rows(labels: npt.ArrayLike, limit: int | None, seed: int) -> Indices:
    """At most `limit` rows, in file order: as many of each label as can be, the seed deciding which.

    Rows without labels (all equal) are drawn uniformly. A pure function of its arguments.
    """
    labels = np.asarray(labels)
    if limit is None or limit >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    ranks = np.argsort(np.argsort(np.random.Philox(key=[seed, len(labels)]).random_raw(len(labels)), kind="stable"))
    place_in_label = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        place_in_label[mine[np.argsort(ranks[mine])]] = np.arange(len(mine))
    return np.sort(np.lexsort((ranks, place_in_label))[:limit]).astype(np.int64)


def test_split(task: Task, rows: TokenizedRows, limit: int | None, seed: int) -> TestSplit:
    """The test rows of a task, balanced over its answers where `limit` leaves some out."""
    by_id = {example.id: example for example in task.read("test")}
    texts = [by_id[rows.row_id(i)] for i in range(len(rows))]
    answers = {answer: place for place, answer in enumerate(task.choices)}
    chosen = choose_rows([answers.get(e.answer, -1) for e in texts], limit, seed)
    return TestSplit(rows, chosen, task, [texts[i] for i in chosen])


test_split.__test__ = False  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Unit:
    """What is learnt as one: a task, or all tasks at once for the joint bound.

    Raises:
        DataError: there is no row to learn from.
    """

    name: str
    tasks: tuple[int, ...]
    """Places of its tasks in the stream."""
    splits: tuple[Split, ...]
    plan: BatchPlan
    pad_id: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        if not sum(len(split) for split in self.splits):
            raise DataError(f"task {self.name!r}: no training row is left")

    def micro_batches(self, step: int, rank: int, world: int, device: torch.device) -> list[Batch]:
        """A worker's micro-batches of a step (from 0)."""
        deal = self.plan.micro_batches(step, rank, world, self.accumulation, lengths=self._lengths)
        return [on_device(collate([self.pair(int(row)) for row in rows], self.pad_id), device) for rows in deal]

    def normaliser(self, step: int, world: int) -> float:
        """Answer tokens of the global batch a worker, so that the mean over workers is the mean over tokens."""
        return self.plan.answer_tokens(step, self._answer_lengths) / world

    def tokens(self, step: int) -> int:
        """Tokens of the global batch, padding left out."""
        return int(self._lengths[self.plan.rows(step)].sum())

    @cached_property
    def _lengths(self) -> Indices:
        return np.concatenate([split.rows.lengths[split.chosen] for split in self.splits])

    @cached_property
    def _answer_lengths(self) -> Indices:
        return np.concatenate([split.rows.answer_lengths[split.chosen] for split in self.splits])

    def pair(self, row: int) -> tuple[npt.ArrayLike, npt.ArrayLike]:
        """Token ids of a row's prompt and answer; rows count through all splits."""
        for split in self.splits:
            if row < len(split):
                index = int(split.chosen[row])
                return split.rows.prompt_ids(index), split.rows.answer_ids(index)
            row -= len(split)
        raise IndexError(row)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    tensors = {name: v.to(device, non_blocking=True) for name, v in batch.items() if isinstance(v, torch.Tensor)}
    return Batch(answer_width=batch["answer_width"], **tensors)  # type: ignore[typeddict-item]
