"""What faults cost, from the events that a run has written: steps made again, and seconds until it went on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from treelora_platform.chaos.outline import Event, Outline
from treelora_platform.chaos.schedule import Fault, Kind

_PROGRESS = ("step", "scored", "commit")
_RESTARTS: tuple[Kind, ...] = ("worker", "driver", "stop", "stall", "controller", "head", "node")
"""What the workers can't but begin again after; a tree actor may come back by itself."""
_LOOK_AHEAD = 3


@dataclass(frozen=True)
class Hit:
    """A fault that struck.

    Args:
        fault: Which.
        time: When, in s since 1970.
        pids: Of the processes that got the signal.
        exact: Whether a commit's folder was there, where that was wanted.
    """

    fault: Fault
    time: float
    pids: tuple[int, ...]
    exact: bool = True


@dataclass(frozen=True)
class Cost:
    """What a hit cost.

    Args:
        at_step: Global steps done when it struck.
        steps_lost: Steps that were made again because of it.
        seconds: Until the run went on; None where nothing was left to do.
    """

    at_step: int
    steps_lost: int
    seconds: float | None


def costs(hits: Sequence[Hit], events: Sequence[Event], outline: Outline) -> list[Cost]:
    """The cost of each hit. Where several come before the workers begin again, one of them bears the steps."""
    begins = [event["time"] for event in events if event["kind"] == "begin"]
    lost = dict(zip(begins, _lost(events, outline), strict=True))
    found = []
    for hit in hits:
        begin = next((time for time in begins if time > hit.time), None)
        bears = begin is not None and _bearer(begins, begin, hits) is hit
        restarts = begin is not None and (bears or hit.fault.kind in _RESTARTS)
        after = [event["time"] for event in events if event["kind"] in _PROGRESS and event["time"] > hit.time]
        if restarts and begin is not None:
            went_on = next((time for time in after if time > begin), None)
        else:
            went_on = _in_place(hit, [time for time in after if begin is None or time < begin])
        seconds = went_on - hit.time if went_on is not None else None
        found.append(Cost(_reached(events, hit.time, outline), lost[begin] if bears and begin else 0, seconds))
    return found


def steps_again(events: Sequence[Event]) -> int:
    """Steps that were made again, however often."""
    made = [(event["unit"], event["step"]) for event in events if event["kind"] == "step"]
    return len(made) - len(set(made))


def _bearer(begins: Sequence[float], begin: float, hits: Sequence[Hit]) -> Hit | None:
    """The hit that made the workers begin at that time; an MLflow server never does."""
    before = max((time for time in begins if time < begin), default=float("-inf"))
    between = [hit for hit in hits if before < hit.time < begin]
    sure = [hit for hit in between if hit.fault.kind in _RESTARTS]
    perhaps = [hit for hit in between if hit.fault.kind == "tree-actor"]
    return next(reversed(sure or perhaps), None)


def _in_place(hit: Hit, after: Sequence[float]) -> float | None:
    """When a run went on that didn't begin again."""
    if not after or hit.fault.kind != "tree-actor":
        return after[0] if after else None
    # an answer may have been on its way: not the next sign, but the end of the first gap that is long beside the others
    points = list(pairwise([hit.time, *after[:_LOOK_AHEAD]]))
    longest = max(late - early for early, late in points)
    return next(late for early, late in points if late - early >= longest / 2)


def _lost(events: Sequence[Event], outline: Outline) -> list[int]:
    """For each time that the workers began: steps that had been done beyond where they began."""
    lost, reached = [], 0
    for event in events:
        if event["kind"] == "step":
            reached = outline.global_step(event["unit"], event["step"])
        elif event["kind"] == "begin":
            lost.append(max(0, reached - event["global_step"]))
            reached = event["global_step"]
    return lost


def _reached(events: Sequence[Event], time: float, outline: Outline) -> int:
    reached = 0
    for event in events:
        if event["time"] > time:
            break
        if event["kind"] == "step":
            reached = outline.global_step(event["unit"], event["step"])
        elif event["kind"] == "begin":
            reached = event["global_step"]
    return reached
