"""What the stream loop is set to, where it stands, and what it tells: small frozen records, written to tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoopOptions:
    """See `TrainSettings` and `CheckpointSettings` of the platform's configuration."""

    learning_rate: float
    warmup: float = 0.1
    min_lr: float = 0.1
    max_bad_steps: int = 3
    commit_every: int | None = None
    seed: int = 0
    forward: bool = False


@dataclass(frozen=True)
class Position:
    """How far a stream has come: `step` steps of unit `unit` are done, and whether it is trained to its end."""

    unit: int = 0
    step: int = 0
    trained: bool = False
    global_step: int = 0
    train_seconds: float = 0.0
    """Spent on training this unit so far."""
    passes: int = 0
    """Forward passes of training this unit so far."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as tracked; the columns of the table of steps."""

    global_step: int
    task: str
    task_index: int
    step: int
    time_unix_ms: int
    loss: float
    lr: float
    grad_norm: float
    step_seconds: float
    tokens: int
    rows: int
    peak_memory_mb: float
    data_seconds: float | None = None
    """Waiting for the step's rows; part of `step_seconds`."""
    penalty_loss: float | None = None
    """The penalty's value, in the units of the loss; not part of `loss`."""
    penalty_ratio: float | None = None
    """What the penalty did over what the loss did: norms of gradients, or of changes of the adapter."""
    sparsity: float | None = None
    lcb_mean: float | None = None
    observation_mean: float | None = None
    arms: tuple[int, ...] | None = None

    @property
    def good(self) -> bool:
        """Whether weights changed; else the step was skipped, for a loss or gradient that was not finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class TaskRecord:
    """One learnt unit; the columns of the table of tasks that the loop knows."""

    task: str
    task_index: int
    steps: int
    train_seconds: float
    eval_seconds: float
    tokens: int
    passes: int
    """Forward passes on micro-batches of one worker while training; plain training needs one a micro-batch."""
    adapter_bytes: int
    """Of all tasks' adapters, what several share counted once."""
    state_bytes: int
    """What the method keeps beside them."""
    router_accuracy: float | None
    fallback_share: float | None = None
    """Percent of the test prompts that were answered by an average, for want of a margin."""
    mixed_up: tuple[tuple[int, int, int], ...] | None = None
    """(task, the task that the router takes its prompts for, prompts), where these differ."""


def tensor_bytes(state: Mapping[str, Tensor]) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
