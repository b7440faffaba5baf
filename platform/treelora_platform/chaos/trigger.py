"""When a fault that is to come is due, told by what rank 0 writes down: `events.jsonl`, and the folder of a commit."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from treelora_platform.chaos.outline import Event, Outline, moment_of
from treelora_platform.chaos.schedule import Fault

_COMMIT_PATIENCE_S = 5.0


class Tail:
    """New events of a file that others append to; a line that a killed writer left torn is passed over."""

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0

    def read(self) -> list[Event]:
        """Whole lines since the last call."""
        events: list[Event] = []
        if not self.path.exists():
            return events
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict) and {"kind", "time"} <= event.keys():
                        events.append(event)
        return events


@dataclass
class Trigger:
    """A fault on its way. All times are of one monotonic clock, in s."""

    fault: Fault
    outline: Outline
    due_at: float | None = None
    """When to strike; None while its window hasn't come."""
    watching_until: float | None = None
    """A commit is about to be written: strike as soon as its folder is there, or then at the latest."""
    exact: bool = True
    """False where that folder was never seen."""

    def begun(self, now: float) -> None:
        """The driver was started for the first time."""
        if self.fault.moment == "start":
            self._arm(now)

    def see(self, event: Event, now: float) -> None:
        """An event has just been written."""
        if self.watching_until is not None and event["kind"] == "commit":
            self.exact = False  # it was quicker than we
            self.look(True, now)
        if self.due_at is not None or self.watching_until is not None or not self._opens(event):
            return
        if self.fault.moment == "commit":
            self.watching_until = now + _COMMIT_PATIENCE_S
        else:
            self._arm(now)

    def look(self, writing: bool, now: float) -> None:
        """Whether a commit is being written just now."""
        if self.watching_until is not None and (writing or now >= self.watching_until):
            self.exact &= writing
            self.watching_until = None
            self._arm(now)

    def _arm(self, now: float) -> None:
        self.due_at = now + self.fault.delay * self.outline.lengths_s[self.fault.moment]

    def _opens(self, event: Event) -> bool:
        fault, moment = self.fault, moment_of(event, len(self.outline.units))
        if fault.moment in ("step", "commit"):
            return moment == "step" and (event["unit"], event["step"]) == (fault.unit, fault.step)
        return moment == fault.moment and (moment in ("loading", "closing") or event["unit"] == fault.unit)


def is_writing(run_dir: Path) -> bool:
    """Whether a commit's hidden folder is there."""
    return any((run_dir / "checkpoints").glob(".writing-*"))
