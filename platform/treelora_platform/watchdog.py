"""Ends a worker that makes no progress, so that the others needn't wait for it for ever.

A rank that hangs, or whose machine is frozen, leaves all others in a collective that never returns: no exception comes,
and the time-outs of process groups are lost in DeepSpeed's own. A thread of each worker therefore looks at the time
since its last sign of progress. A frozen process can't watch itself: the other ranks end then, and Ray Train ends the
group.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path

FOLDER = "stalls"
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: trying again may help."""
_CHECKS = 20


class Watchdog:
    """Watches from `watch` on; every `feed` is a sign of progress.

    Args:
        run_dir: Where the stacks of all threads are left, as `stalls/WHO.txt`.
        who: Which process this is, such as `rank-0`.
        patience_s: Seconds without a sign; None: for ever.
    """

    def __init__(self, run_dir: Path, who: str, patience_s: float | None):
        self.report, self.patience_s = run_dir / FOLDER / f"{who}.txt", patience_s
        self._fed = time.monotonic()
        self._what = "the start"
        self._stop = threading.Event()

    def watch(self, what: str = "loading") -> None:
        """Begin; `what` is the last that was done."""
        if self.patience_s is not None:
            self.feed(what)
            threading.Thread(target=self._run, args=(self.patience_s,), daemon=True).start()

    def feed(self, what: str) -> None:
        """There is progress; `what` is said should it be the last."""
        self._fed, self._what = time.monotonic(), what

    def stop(self) -> None:
        """Nothing more to watch."""
        self._stop.set()

    def _run(self, patience_s: float) -> None:
        before = time.monotonic()
        while not self._stop.wait(patience_s / _CHECKS):
            now = time.monotonic()
            if now - before > patience_s / 2:
                self._fed = now  # this process was frozen itself: the time that it slept is nobody's fault
            before = now
            if now - self._fed > patience_s:
                self._end(patience_s)

    def _end(self, patience_s: float) -> None:
        self.report.parent.mkdir(parents=True, exist_ok=True)
        with self.report.open("w", encoding="utf-8") as file:
            file.write(f"no progress for {patience_s:g} s after {self._what}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        os._exit(EXIT_CODE)


def stalls(run_dir: Path) -> list[str]:
    """What the workers that ended themselves said, a line each."""
    found = []
    for path in sorted((run_dir / FOLDER).glob("*.txt")):
        with path.open(encoding="utf-8") as file:
            found.append(f"{path.stem.replace('-', ' ')}: {file.readline().strip()} (stacks: {path})")
    return found
