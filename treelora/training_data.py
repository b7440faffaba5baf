"""What the loop learns from and is judged on: chosen rows of splits, as batches on a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from treelora.data.batches import Batch, BatchPlan, TextBatch, collate, row_draws
from treelora.data.packing import pack
from treelora.data.schema import Example
from treelora.data.task import Task
from treelora.errors import DataError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Chosen rows of a split: `TokenizedRows`, or the images of a task."""

    rows: Any
    chosen: Indices

    def __len__(self) -> int:
        return len(self.chosen)


class Collator(Protocol):
    """Makes a batch of rows' items."""

    @property
    def draws(self) -> int:
        """Random numbers that a row takes at each step, for augmentation."""
        ...

    @property
    def prefetched(self) -> bool:
        """Whether making a batch takes so long that the next step's should be made meanwhile."""
        ...

    def __call__(self, items: Sequence[Any], device: torch.device, draws_Bd: npt.NDArray[np.float64] | None) -> Batch:
        """A batch on a device; without draws nothing is augmented."""
        ...


@dataclass(frozen=True)
class TextCollator:
    """Pads pairs of (prompt ids, answer ids), and packs them where `packs` is the dtype of the model's mask."""

    pad_id: int
    packs: torch.dtype | None = None
    by_row: bool = False
    """Whether packed rows will attend each by itself."""
    draws = 0
    prefetched = False

    def __call__(self, items: Sequence[Any], device: torch.device, draws_Bd: npt.NDArray[np.float64] | None) -> Batch:
        """See `Collator`."""
        batch = collate(items, self.pad_id)
        if self.packs:
            batch["packed"] = pack(items, self.pad_id, self.packs, by_row=self.by_row)
        return on_device(batch, device)


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


def test_split(task: Task, rows: Any, limit: int | None, seed: int) -> TestSplit:
    """The test rows of a task, balanced over its answers where `limit` leaves some out."""
    by_id = {example.id: example for example in task.read("test")}
    texts = [by_id[rows.row_id(i)] for i in range(len(rows))]
    answers = {answer: place for place, answer in enumerate(task.choices)}
    chosen = choose_rows([answers.get(e.answer, -1) for e in texts], limit, seed)
    return TestSplit(rows, chosen, task, [texts[i] for i in chosen])


test_split.__test__ = False  # type: ignore[attr-defined]


def image_test_split(task: Task, rows: Any, limit: int | None, seed: int) -> TestSplit:
    """The test images of a task, balanced over its classes where `limit` leaves some out; their answers are classes."""
    chosen = choose_rows(rows.labels, limit, seed)
    return TestSplit(
        rows,
        chosen,
        task,
        [Example(rows.row_id(int(i)), "", task.choices[rows.labels[i]], task.choices) for i in chosen],
    )


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
    collator: Collator
    accumulation: int = 1

    def __post_init__(self) -> None:
        if not sum(len(split) for split in self.splits):
            raise DataError(f"task {self.name!r}: no training row is left")

    def micro_batches(self, step: int, rank: int, world: int, device: torch.device) -> list[Batch]:
        """A worker's micro-batches of a step (from 0)."""
        deal = self.plan.micro_batches(step, rank, world, self.accumulation, lengths=self._lengths)
        return [self.batch(rows, device, step) for rows in deal]

    def batch(self, rows: Iterable[int], device: torch.device, step: int | None = None) -> Batch:
        """One batch of rows, counted through all splits; augmented as of a step, or not at all."""
        rows = [int(row) for row in rows]
        draws = None
        if step is not None and self.collator.draws:
            draws = row_draws(self.plan.seed, self.plan.task_index, step, rows, self.collator.draws)
        return self.collator([self.item(row) for row in rows], device, draws)

    def normaliser(self, step: int, world: int) -> float:
        """Answers' tokens (or images) of the global batch a worker: the mean over workers is then that over tokens."""
        return self.plan.answer_tokens(step, self._answer_lengths) / world

    def tokens(self, step: int) -> int:
        """Tokens (or images) of the global batch, padding left out."""
        return int(self._lengths[self.plan.rows(step)].sum())

    @cached_property
    def _lengths(self) -> Indices:
        return np.concatenate([split.rows.lengths[split.chosen] for split in self.splits])

    @cached_property
    def _answer_lengths(self) -> Indices:
        return np.concatenate([split.rows.answer_lengths[split.chosen] for split in self.splits])

    def item(self, row: int) -> Any:
        """What the collator takes of a row; rows count through all splits."""
        for split in self.splits:
            if row < len(split):
                return split.rows.item(int(split.chosen[row]))
            row -= len(split)
        raise IndexError(row)


def on_device(batch: TextBatch, device: torch.device) -> TextBatch:
    """The batch with its tensors on a device."""

    def moved(values: Mapping[str, Any]) -> Any:
        return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    there: TextBatch = moved(batch)
    if batch["packed"]:
        there["packed"] = moved(batch["packed"])
    return there
