"""`Method`: what a continual-learning method may do, and when. The loop calls; methods that don't care inherit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.objective import answer_loss
from treelora.options import Options

if TYPE_CHECKING:
    from treelora.data.batches import Batch
    from treelora.memory_records import Past


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
    global_batch: int = 1
    """Rows of a step, over all ranks."""
    sizes: tuple[int, ...] = ()
    """Training rows of every unit of the stream up to this one."""
    class_means: Tensor | None = field(default=None, repr=False)
    """Features of the classes of earlier tasks as the head reads them, their means [classes, F], where the head is
    aligned; None where it isn't, and in the first task."""
    fetch: Callable[[Sequence[tuple[int, int]]], Batch] = field(default=lambda rows: _no_rows(rows), repr=False)
    """One batch, on the engine's device, of training rows named by (unit, row); units up to this one."""


@dataclass(frozen=True)
class StepMetrics:
    """What a method tells of a step: scalars (float or 0-d tensor, not read on the step's path) and chosen arms."""

    scalars: dict[str, float | Tensor] = field(default_factory=dict)
    arms: tuple[int, ...] | None = None
    """The chosen past task for each layer; where several share an arm, the first of them."""


class Method:
    """A continual-learning method. The default of every hook is to do nothing: plain sequential training.

    A hook marked collective is called by every rank; what it does to adapter or gradients must be the same on all.
    """

    name: ClassVar[str]
    preparation: ClassVar[str] = "getting ready"
    """What `begin_task` does, as progress shows it."""
    trains: ClassVar[bool] = True
    """Whether weights change at all."""
    joint: ClassVar[bool] = False
    """Whether all tasks are learnt at once, as one."""
    at_once: ClassVar[bool] = False
    """Whether there is one unit for all tasks: nothing happens between them."""
    accumulates: ClassVar[bool] = False
    """Whether every task has its own part of one adapter: rank r of N r (`treelora.methods.slices`), or a prompt."""
    replays: ClassVar[bool] = False
    """Whether rows of earlier tasks are seen again."""

    def __init__(self, options: Options | None = None, seed: int = 0) -> None:
        """Methods with settings of their own name their class of options in place of this one."""
        self.seed = seed

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """Before the first step of a task; `bank` holds the adapters of the earlier tasks."""

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """In place of `begin_task` when a run goes on within a task, after `load_state_dict`."""

    def before_step(self, step: int) -> None:
        """Before the forward pass of a step, counted from 1. Collective."""

    def loss(self, engine: Engine, batch: Batch, normaliser: float) -> Tensor:
        """The loss of one micro-batch, a scalar that `engine.backward` takes. Collective."""
        return answer_loss(engine.forward_model(), batch, normaliser)

    def penalty_loss(self, engine: Engine) -> Tensor | None:
        """A term of the adapter's weights alone, added to the loss of a step's last micro-batch, equal on all ranks."""
        return None

    def after_backward(self, engine: Engine) -> None:
        """Gradients are complete and averaged over ranks, and may be changed. Collective."""

    def after_step(self, engine: Engine, lr: float) -> None:
        """The optimizer has stepped with learning rate `lr`; the adapter may be changed. Collective."""

    def step_skipped(self) -> None:
        """In place of `after_backward` and `after_step` when the loss was not finite."""

    def end_task(self, engine: Engine) -> None:
        """After the last step of a task; the adapter may be changed, then it goes into the bank. Collective."""

    def merge_bank(self, bank: list[AdapterState]) -> None:
        """After `end_task`, with this task's adapter in the bank: entries may be replaced, to save storage.

        Tasks that share one adapter share one object: `bank[i] is bank[j]`. Collective.
        """

    def task_tree(self, engine: Engine) -> Past | None:
        """Tree and groups over the tasks learnt so far, for routed inference; None: the method has none. Collective."""
        return None

    def metrics(self) -> StepMetrics:
        """Of the last step."""
        return StepMetrics()

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept between tasks, and what `load_state_dict` needs to go on within one. Collective."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`. Collective."""


def _no_rows(rows: Sequence[tuple[int, int]]) -> Batch:
    raise NotImplementedError(f"rows {rows} of earlier tasks: this loop doesn't offer any")
