"""`Method`: what a continual-learning method may do, and when. The loop calls; methods that don't care inherit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine

if TYPE_CHECKING:
    from treelora.data.batches import Batch


@dataclass(frozen=True)
class TaskContext:
    """The task that is being learnt, as a method sees it."""

    index: int
    """Place in the stream, from 0."""
    name: str
    steps: int
    """Optimizer steps of this task."""
    micro_batches: Callable[[int], Sequence[Batch]] = field(repr=False)
    """This worker's micro-batches of a step (from 0), on the engine's device."""
    normaliser: Callable[[int], float] = field(repr=False)
    """What `answer_loss` divides a step's sum by, so that the mean over ranks is the mean over the global batch."""


@dataclass(frozen=True)
class StepMetrics:
    """What a method tells of a step: scalars (float or 0-d tensor, not read on the step's path) and chosen arms."""

    scalars: dict[str, float | Tensor] = field(default_factory=dict)
    arms: tuple[int, ...] | None = None
    """Index of the chosen past task for each layer."""


class Method:
    """A continual-learning method. The default of every hook is to do nothing: plain sequential training."""

    name: ClassVar[str]
    trains: ClassVar[bool] = True
    """Whether weights change at all."""
    joint: ClassVar[bool] = False
    """Whether all tasks are learnt at once, as one."""

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """Before the first step of a task; `bank` holds the adapters of the earlier tasks."""

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """In place of `begin_task` when a run goes on within a task, after `load_state_dict`."""

    def before_step(self, step: int) -> None:
        """Before the forward pass of a step, counted from 1."""

    def after_backward(self, engine: Engine) -> None:
        """Gradients are complete and may be changed."""

    def after_step(self, engine: Engine, lr: float) -> None:
        """The optimizer has stepped with learning rate `lr`; the adapter may be changed."""

    def step_skipped(self) -> None:
        """In place of `after_backward` and `after_step` when the loss was not finite."""

    def end_task(self, engine: Engine) -> None:
        """After the last step of a task."""

    def metrics(self) -> StepMetrics:
        """Of the last step."""
        return StepMetrics()

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on within a task. Collective."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`. Collective."""
