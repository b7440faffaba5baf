"""What a sweep remembers: a line of JSON for each trial that began or ended. With the runs' own folders it is all that
a sweep needs to go on; Ray Tune's own state, which is pickled, is never read back."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from treelora.errors import DataError
from treelora_platform.jsonl import append_line, read_lines

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


@dataclass(frozen=True)
class Journal:
    """An append-only file of entries."""

    path: Path

    def entries(self) -> list[Entry]:
        """All, in order; a last line that was cut off is left out.

        Raises:
            DataError: the file holds something else.
        """
        try:
            return [Entry(**record) for record in read_lines(self.path)]
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.path}: is not a sweep's journal ({error}); move it away") from None

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        append_line(self.path, asdict(entry))

    def latest(self) -> dict[str, Entry]:
        """The last word on each run, in the order in which they first began."""
        found: dict[str, Entry] = {}
        for entry in self.entries():
            found[entry.run] = entry
        return found
