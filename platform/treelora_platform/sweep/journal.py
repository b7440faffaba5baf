"""What a sweep remembers: a line of JSON for each trial that began or ended. With the runs' own folders it is all that
a sweep needs to go on; Ray Tune's own state, which is pickled, is never read back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from treelora_platform.jsonl import JsonLog

Status = Literal["begun", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Entry:
    """What became of a trial; `stopped` is what a scheduler ended early."""

    run: str
    """Name of the run, which is the digest of its configuration."""
    values: dict[str, Any]
    status: Status
    tasks: int = 0
    scores: dict[str, float | None] = field(default_factory=dict)
    """Objectives and the like after so many tasks; None where not measured."""
    mlflow_run_id: str = ""
    message: str = ""
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""


class Journal(JsonLog[Entry]):
    """The entries of a sweep."""

    kind = Entry
    what = "a sweep's journal"

    def latest(self) -> dict[str, Entry]:
        """The last word on each run, in the order in which they first began."""
        found: dict[str, Entry] = {}
        for entry in self.entries():
            found[entry.run] = entry
        return found
