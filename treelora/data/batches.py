"""Batches: which rows a worker takes at a step, and how rows of text become one left-padded tensor.

Shapes: B rows of a batch, T tokens of the longest row, G rows of a global batch.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypedDict, final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from treelora.data.packing import PackedRows
from treelora.errors import ConfigError

NO_LOSS = -100  # the index that torch's cross-entropy ignores by default
Rows = npt.NDArray[np.int64]


@final
class TextBatch(TypedDict):
    """A left-padded batch of text: all answers end at the right edge.

    Tensors are int64 [B, T]. labels: the answer's tokens in place, -100 elsewhere. answer_width: the longest
    answer; logits at the last ``answer_width + 1`` positions (the last one unused) predict every label.
    packed: the same rows with little padding, where the model takes them so and it pays.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    answer_width: int
    packed: PackedRows | None


@final
class ImageBatch(TypedDict):
    """A batch of images.

    pixel_values: normalised, [B, channels, height, width]. candidates: bool [B, classes], those that a row's class is
    told apart from, its own among them. labels: int64 [B, 1], places in the head.
    """

    pixel_values: torch.Tensor
    candidates: torch.Tensor
    labels: torch.Tensor


Batch = TextBatch | ImageBatch


def collate(rows: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]], pad_id: int) -> TextBatch:
    """One batch of (prompt_ids, answer_ids) rows, padded to its longest row."""
    pairs = [(np.asarray(prompt, np.int64), np.asarray(answer, np.int64)) for prompt, answer in rows]
    if not pairs:
        raise ValueError("a batch needs at least one row")
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    shape = (len(pairs), width)
    input_ids_BT = np.full(shape, pad_id, np.int64)
    attention_mask_BT = np.zeros(shape, np.int64)
    position_ids_BT = np.zeros(shape, np.int64)
    labels_BT = np.full(shape, NO_LOSS, np.int64)
    for b, (prompt, answer) in enumerate(pairs):
        length = len(prompt) + len(answer)
        start = width - length
        input_ids_BT[b, start:] = np.concatenate([prompt, answer])
        attention_mask_BT[b, start:] = 1
        position_ids_BT[b, start:] = np.arange(length)
        labels_BT[b, width - len(answer) :] = answer
    return TextBatch(
        input_ids=torch.from_numpy(input_ids_BT),
        attention_mask=torch.from_numpy(attention_mask_BT),
        position_ids=torch.from_numpy(position_ids_BT),
        labels=torch.from_numpy(labels_BT),
        answer_width=max(len(answer) for _, answer in pairs),
        packed=None,
    )


@lru_cache(maxsize=8)
def epoch_order(seed: int, task_index: int, epoch: int, n: int) -> Rows:
    """A permutation of ``n`` rows, int64 [n], read-only: a pure function of its four arguments.

    Sorts the raw 64-bit output of counter-based Philox (Salmon et al., SC 2011), which numpy keeps stable,
    unlike ``Generator.permutation``.
    """
    key = np.array([seed % 2**64, (task_index << 32) | epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def joined(own: Batch, kept: Sequence[int], others: Batch) -> Batch:
    """The `kept` rows of one batch and all rows of another; text is left-padded to the wider one."""
    rows = list(kept)
    if "pixel_values" in own and "pixel_values" in others:
        return ImageBatch(
            pixel_values=torch.cat([own["pixel_values"][rows], others["pixel_values"]]),
            candidates=torch.cat([own["candidates"][rows], others["candidates"]]),
            labels=torch.cat([own["labels"][rows], others["labels"]]),
        )
    if "pixel_values" in own or "pixel_values" in others:
        raise TypeError("one batch is of images, the other of text")
    width = max(own["labels"].shape[1], others["labels"].shape[1])

    def both(own_BT: torch.Tensor, others_BT: torch.Tensor, fill: int) -> torch.Tensor:
        parts = (own_BT[rows], others_BT)
        return torch.cat([F.pad(part, (width - part.shape[1], 0), value=fill) for part in parts])

    return TextBatch(
        input_ids=both(own["input_ids"], others["input_ids"], 0),
        attention_mask=both(own["attention_mask"], others["attention_mask"], 0),
        position_ids=both(own["position_ids"], others["position_ids"], 0),
        labels=both(own["labels"], others["labels"], NO_LOSS),
        answer_width=max(own["answer_width"], others["answer_width"]),
        packed=None,
    )


def row_draws(seed: int, task_index: int, step: int, rows: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), [rows, count], for what is random about a row at a step.

    Keyed by seed, task, step and row: they depend neither on the number of workers nor on what was drawn before.
    """
    draws = np.empty((len(rows), count))
    for place, row in enumerate(rows):
        bits = np.random.Philox(key=[seed % 2**64, task_index], counter=[row, step, 1, 0]).random_raw(count)
        draws[place] = (bits >> np.uint64(11)) * 2.0**-53
    return draws


class BatchPlan:
    """Which rows make up each step's global batch, and which of them a worker takes.

    The permutations of all epochs are laid end to end and cut every ``global_batch`` rows: an epoch's
    incomplete last batch is filled from the next permutation, so every step is full, the last one too.
    ``epochs`` may be a fraction. With both ``epochs`` and ``max_steps`` the smaller number of steps counts.

    Everything is a pure function of the step, so a run resumes at any step; the global batch doesn't depend
    on the number of workers.
    """

    def __init__(
        self,
        n_rows: int,
        global_batch: int,
        *,
        epochs: float | None = None,
        max_steps: int | None = None,
        seed: int,
        task_index: int,
    ) -> None:
        limits = {"n_rows": n_rows, "global_batch": global_batch, "epochs": epochs, "max_steps": max_steps}
        for key, value in limits.items():
            if value is not None and value <= 0:
                raise ConfigError(f"{key} is {value}; it must be positive")
        if not (0 <= seed < 2**64 and 0 <= task_index < 2**31):
            raise ConfigError(f"seed {seed} or task_index {task_index} is outside 0..2^64 or 0..2^31")
        if epochs is None and max_steps is None:
            raise ConfigError("give epochs or max_steps: a task needs an end")
        by_epochs = math.inf if epochs is None else math.ceil(epochs * n_rows / global_batch)
        self.n_rows = n_rows
        self.global_batch = global_batch
        self.seed = seed
        self.task_index = task_index
        self.steps = int(min(by_epochs, math.inf if max_steps is None else max_steps))

    def rows(self, step: int) -> Rows:
        """Row indices of a step's global batch, int64 [G]. Steps count from 0."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        first = step * self.global_batch
        epochs, places = np.divmod(np.arange(first, first + self.global_batch), self.n_rows)
        parts = [
            epoch_order(self.seed, self.task_index, int(epoch), self.n_rows)[places[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return np.concatenate(parts)

    def micro_batches(
        self, step: int, rank: int, world: int, accumulation: int = 1, lengths: npt.ArrayLike | None = None
    ) -> list[Rows]:
        """This rank's ``accumulation`` micro-batches, each int64 [G / (world * accumulation)].

        With ``lengths`` (tokens of every row of the split) the global batch is first sorted by length: rows
        of like length share a micro-batch, and ranks hold neighbouring ones at the same time, so little is
        padded and nobody waits. Raises ConfigError where ``global_batch`` doesn't divide by
        world * accumulation.
        """
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is not one of {world} workers")
        if accumulation < 1 or self.global_batch % (world * accumulation):
            raise ConfigError(
                f"global batch {self.global_batch} doesn't divide by {world} workers x {accumulation} "
                "accumulation steps; change one of them"
            )
        rows = self.rows(step)
        if lengths is not None:
            rows = rows[np.argsort(np.asarray(lengths)[rows], kind="stable")]
        chunks = rows.reshape(accumulation, world, -1)
        return list(chunks[:, rank])

    def answer_tokens(self, step: int, answer_lengths: npt.ArrayLike) -> int:
        """Tokens that carry loss in the global batch: each rank divides by it without asking the others."""
        return int(np.asarray(answer_lengths)[self.rows(step)].sum())
