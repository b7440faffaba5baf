"""What a run looks like in time: the reference run's units, steps, and how long each of its windows is."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from treelora.errors import DataError

Event = Mapping[str, Any]
Moment = Literal["start", "loading", "task-begin", "step", "commit", "scoring", "task-end", "closing"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
# Where the reference shows no such window; and the width of those that are not bounded by two events.
_LENGTHS_S: dict[Moment, float] = {
    "start": 10.0, "loading": 3.0, "task-begin": 0.2, "step": 0.5, "commit": 0.02, "scoring": 0.5, "task-end": 0.05,
    "closing": 5.0,
}  # fmt: skip
LOADING = "loading the model"
_JUDGING = ("teaching", "scoring")


@dataclass(frozen=True)
class Outline:
    """Shape of a run without faults.

    Args:
        units: Names of the tasks in order.
        steps: Steps of each; zeros where the method trains nothing.
        commit_every: Steps between commits within a task; None: at its end only.
        lengths_s: Seconds that each window takes.
    """

    units: tuple[str, ...]
    steps: tuple[int, ...]
    commit_every: int | None
    lengths_s: Mapping[Moment, float]

    @classmethod
    def of(cls, events: Sequence[Event], commit_every: int | None, started: float, ended: float) -> Outline:
        """Outline of a run that began and ended at these times (s since 1970) and was not interrupted.

        Raises:
            DataError: the events are those of no run.
        """
        begin = next((event for event in events if event["kind"] == "begin"), None)
        if begin is None:
            raise DataError("the reference run wrote no event `begin`; see its log")
        lengths = _LENGTHS_S | {
            moment: statistics.median(found) for moment, found in _windows(events, started, ended).items() if found
        }
        return cls(tuple(begin["units"]), tuple(begin["steps"]), commit_every, lengths)

    def committed_steps(self, unit: int) -> list[int]:
        """Steps of a unit that a commit follows."""
        every, last = self.commit_every, self.steps[unit]
        within = range(every, last, every) if every else range(0)
        return [*within, last] if last else []

    def global_step(self, unit: int, step: int) -> int:
        """Steps done after `step` steps of a unit."""
        return sum(self.steps[:unit]) + step

    @property
    def total_steps(self) -> int:
        """Of all units."""
        return sum(self.steps)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Outline | None:
        """What `save` wrote; None where there is nothing of that kind."""
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            found = cls(**plain)
            return replace(found, units=tuple(found.units), steps=tuple(found.steps))
        except (OSError, ValueError, TypeError):
            return None


def moment_of(event: Event, units: int) -> Moment | None:
    """Window that begins with an event of a run of so many units."""
    kind = event["kind"]
    if kind == "stage":
        if event["what"] == LOADING:
            return "loading"
        return "scoring" if event["what"].startswith(_JUDGING) else "task-begin"
    if kind == "step":
        return "step"
    if kind == "scored":
        return "task-end"
    return "closing" if kind == "commit" and event["unit"] == units else None


def _windows(events: Sequence[Event], started: float, ended: float) -> dict[Moment, list[float]]:
    """Seconds from the event that begins a window to the next event."""
    lengths: dict[Moment, list[float]] = {moment: [] for moment in MOMENTS}
    units = max((len(event["units"]) for event in events if event["kind"] == "begin"), default=0)
    lengths["start"] = [event["time"] - started for event in events[:1]]
    judging: float | None = None
    for event, following in _pairs(events):
        moment = moment_of(event, units)
        if moment == "scoring":  # several stages: from the first of a unit to its scores
            judging = event["time"] if judging is None else judging
        elif moment == "step" and (following is None or following["kind"] != "step"):
            continue  # a commit follows, which is a window of its own
        elif moment:
            lengths[moment].append(max(0.0, (following["time"] if following else ended) - event["time"]))
        if moment == "task-end" and judging is not None:
            lengths["scoring"].append(event["time"] - judging)
            judging = None
    return lengths


def _pairs(events: Sequence[Event]) -> Iterator[tuple[Event, Event | None]]:
    told = [event for event in events if event["kind"] not in ("note", "warning")]
    yield from zip(told, [*told[1:], None], strict=True)
