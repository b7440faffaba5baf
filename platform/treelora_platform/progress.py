"""Progress of a run as its driver shows it: the events that rank 0 appends, followed from another process.

The file is the channel, so that a run on a cluster, a run in a job, and a run that somebody looks at later are all
watched in the same way.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

POLL_S = 0.2
QUIET_S = 15.0


def clock(seconds: float) -> str:
    """`75` as `1:15`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Eta:
    """Time left, from measured seconds a step and seconds a judged (unit, task) pair.

    Judging unit u scores u + 1 tasks, so its cost grows along the stream; both rates are taken from what was seen.
    """

    def __init__(self, steps: list[int], done_steps: int = 0):
        self.steps, self.done_steps = steps, done_steps
        ends = list(accumulate(steps))
        self.judged = sum(end <= done_steps for end in ends) if done_steps else 0
        self.step_seconds = self.judge_seconds = 0.0
        self.seen_steps = self.seen_pairs = 0

    def stepped(self, seconds: float | None) -> None:
        """One more step took so long; None where that isn't known."""
        self.done_steps += 1
        if seconds is not None:
            self.seen_steps += 1
            self.step_seconds += seconds

    def was_judged(self, unit: int, seconds: float) -> None:
        """Unit `unit` was judged in so many seconds."""
        self.judged = unit + 1
        self.seen_pairs += unit + 1
        self.judge_seconds += seconds

    def left(self) -> float | None:
        """Seconds left; None before anything was measured."""
        if not self.seen_steps:
            return None
        per_step = self.step_seconds / self.seen_steps
        per_pair = self.judge_seconds / self.seen_pairs if self.seen_pairs else 4 * per_step
        pairs = sum(range(self.judged + 1, len(self.steps) + 1))
        return per_step * max(0, sum(self.steps) - self.done_steps) + per_pair * pairs


class Watcher:
    """Follows `events.jsonl` in a thread and draws it; a context manager."""

    def __init__(self, path: Path, console: Console, label: str):
        self.path, self.console, self.label = path, console, label
        self.warnings: list[str] = []
        self._offset = path.stat().st_size if path.exists() else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._eta: Eta | None = None
        self._last_time = self._judge_begin = time.time()
        self._printed = 0.0
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[label]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[what]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, label=label, what="starting Ray and the workers", eta="")

    def __enter__(self) -> Watcher:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.stop()

    def _follow(self) -> None:
        while not self._stop.is_set():
            self._take_all()
            self._stop.wait(POLL_S)
        self._take_all()

    def _take_all(self) -> None:
        for event in self._new_events():
            self._take(event)

    def _new_events(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                with contextlib.suppress(ValueError):  # torn by a worker that was killed as it wrote
                    yield json.loads(line)

    def _take(self, event: dict[str, Any]) -> None:
        kind, when = event["kind"], event["time"]
        if kind == "begin":
            self._eta = Eta(event["steps"], event["global_step"])
            self._show("the first task", total=sum(event["steps"]), completed=event["global_step"])
        elif kind == "stage":
            self._judge_begin = when if event["what"].startswith("teaching") else self._judge_begin
            self._show(f"{event['task']}: {event['what']}" if event["task"] else event["what"])
        elif kind == "step" and self._eta:
            # before a task's first step its signature was measured
            self._eta.stepped(when - self._last_time if event["step"] > 1 else None)
            what = f"{event['task']} {event['step']}/{event['steps']}  loss {event['loss']:.3f}"
            self._show(what, completed=self._eta.done_steps)
        elif kind == "scored" and self._eta:
            self._eta.was_judged(event["unit"], when - self._judge_begin)
            means = ", ".join(f"{mode} {value:.1f}" for mode, value in event["scores"].items())
            self.console.print(
                f"  [dim]{clock(self._elapsed())}[/]  after [bold]{event['task']}[/]: mean score {means}"
            )
        elif kind == "note":
            self.console.print(f"  [dim]{event['what']}[/]")
        elif kind == "warning":
            self.warnings.append(event["what"])
            self.console.print(f"  [yellow]warning:[/] {event['what']}")
        self._last_time = when

    def _show(self, what: str, **fields: Any) -> None:
        left = self._eta.left() if self._eta else None
        eta = f"ETA {clock(left)}" if left is not None else ""
        self._bar.update(self._task, what=what, eta=eta, **fields)
        if not self.console.is_terminal and time.monotonic() - self._printed > QUIET_S:
            self._printed = time.monotonic()
            done = f"{self._eta.done_steps}/{sum(self._eta.steps)} steps" if self._eta else ""
            self.console.print(f"  {clock(self._elapsed())}  {self.label}: {what}  {done}  {eta}".rstrip())

    def _elapsed(self) -> float:
        return self._bar.tasks[self._task].elapsed or 0.0
