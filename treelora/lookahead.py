"""The next step's batches are made while this step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Lookahead(Generic[T]):
    """Calls a function of the step in a thread, one step ahead of who asks; any order of steps gives the same values.

    Args:
        make: Must not draw from a global random number generator.
        steps: Of the task; nothing is made ahead behind them, nor with 0.
    """

    def __init__(self, make: Callable[[int], T], steps: int):
        self._make, self._steps = make, steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lookahead") if steps else None
        self._next: tuple[int, Future[T]] | None = None

    def __call__(self, step: int) -> T:
        """The value of a step, from 0."""
        if self._pool is None:
            return self._make(step)
        ahead, self._next = self._next, None
        value = ahead[1].result() if ahead and ahead[0] == step else self._make(step)
        if step + 1 < self._steps:
            self._next = (step + 1, self._pool.submit(self._make, step + 1))
        return value

    def close(self) -> None:
        """End the thread."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
