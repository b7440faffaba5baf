"""What methods share that add a term to a task's loss, micro-batch by micro-batch: what is told of it."""

from __future__ import annotations

from torch import Tensor

from treelora.engine import Engine
from treelora.methods.base import Method, StepMetrics


class AddedTerm(Method):
    """The term is part of what is tracked as `loss`, and by itself as `penalty_loss`, where a step has it."""

    _term: Tensor | None = None
    _last = StepMetrics()

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._term, self._last = None, StepMetrics()

    def added(self, term: Tensor) -> Tensor:
        """The term of a micro-batch, divided as its loss is; to be called on every rank or on none."""
        seen = term.detach()
        self._term = seen if self._term is None else self._term + seen
        return term

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if self._term is not None:
            self._last = StepMetrics({"penalty_loss": engine.all_reduce(self._term, mean=True)})

    def step_skipped(self) -> None:
        """See `Method`."""
        self._last = StepMetrics()

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last
