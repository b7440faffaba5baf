"""Ends a start of workers that doesn't come to its end: Ray Train's controller would wait for a frozen one for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from treelora_platform.watchdog import Watchdog

LEAST_S = 60.0


class GroupStart(WorkerGroupCallback):
    """Runs in the controller, and ends it where its workers take too long; `attempts.fit` then begins again.

    Args:
        run_dir: As for `Watchdog`.
        patience_s: Seconds from asking for workers until all of them work, `LEAST_S` at the least; None: for ever.
    """

    def __init__(self, run_dir: Path, patience_s: float | None):
        self.run_dir, self.patience_s = run_dir, patience_s and max(patience_s, LEAST_S)
        self._watchdog: Watchdog | None = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Begin to wait."""
        self._over()
        self._watchdog = Watchdog(self.run_dir, "controller", self.patience_s)
        self._watchdog.watch("asking for workers")

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """All work, and watch themselves from now on."""
        self._over()

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """There is none any more."""
        self._over()

    after_worker_group_abort = after_worker_group_shutdown

    def _over(self) -> None:
        if self._watchdog:
            self._watchdog.stop()
