"""Is the penalty on a sensible scale? Said once a task, when it is not."""

from __future__ import annotations

import math

from treelora.loop_records import StepRecord

TOO_STRONG, TOO_WEAK = 10.0, 1e-6


class PenaltyWatch:
    """Follows `penalty_ratio`: what the penalty did over what the loss did."""

    def __init__(self) -> None:
        self._task = ""
        self._warned = False

    def see(self, record: StepRecord, steps: int) -> str | None:
        """A warning, where this step or the task that it ends gives reason for one."""
        if record.task != self._task:
            self._task, self._warned, self._largest = record.task, False, -1.0
        ratio = record.penalty_ratio
        if ratio is None:
            return None
        self._largest = max(self._largest, ratio)
        problem = None
        if not math.isfinite(ratio) or ratio > TOO_STRONG:
            problem = f"is {ratio:.3g} times what the loss does; lower the method's strength"
        elif record.step == steps and self._largest < TOO_WEAK:
            problem = f"was at most {self._largest:.1g} times what the loss does, so it does nothing"
        if problem is None or self._warned:
            return None
        self._warned = True
        return f"{record.task}, step {record.step}: what the penalty does {problem}"
