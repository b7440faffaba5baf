"""Events of a made-up run of two tasks, as rank 0 writes them, and its outline."""

from __future__ import annotations

from typing import Any

from treelora_platform.chaos.outline import Outline

UNITS = ("red", "green")
LENGTHS = {
    "start": 8.0, "loading": 2.0, "task-begin": 0.25, "step": 0.5, "commit": 0.02, "scoring": 1.0, "task-end": 0.1,
    "closing": 4.0,
}  # fmt: skip
OUTLINE = Outline(UNITS, (5, 3), 2, LENGTHS)  # type: ignore[arg-type]

Plain = dict[str, Any]


def stage(unit: int, what: str, time: float = 0.0) -> Plain:
    return {"time": time, "kind": "stage", "unit": unit, "task": UNITS[unit], "what": what}


def step(unit: int, number: int, time: float = 0.0) -> Plain:
    steps = OUTLINE.steps[unit]
    return {"time": time, "kind": "step", "unit": unit, "task": UNITS[unit], "step": number, "steps": steps}


def scored(unit: int, time: float = 0.0) -> Plain:
    return {"time": time, "kind": "scored", "unit": unit, "task": UNITS[unit], "scores": {}}


def commit(unit: int, number: int, time: float = 0.0) -> Plain:
    return {"time": time, "kind": "commit", "unit": unit, "step": number}


def begin(global_step: int, time: float = 0.0) -> Plain:
    return {"time": time, "kind": "begin", "steps": [5, 3], "units": list(UNITS), "global_step": global_step}


WHOLE = [
    stage(0, "loading the model", 108.0), begin(0, 110.0), stage(0, "measuring its signature", 110.0),
    step(0, 1, 110.5), step(0, 2, 111.0), commit(0, 2, 111.125), step(0, 3, 111.625),
    step(0, 4, 112.125), commit(0, 4, 112.25), step(0, 5, 112.75), commit(0, 5, 113.0),
    stage(0, "teaching the router", 113.0), stage(0, "scoring 1 tasks, inference last", 113.5),
    scored(0, 114.5), commit(1, 0, 114.75), stage(1, "measuring its signature", 114.75),
    step(1, 1, 115.25), step(1, 2, 115.75), commit(1, 2, 115.875), step(1, 3, 116.375), commit(1, 3, 116.5),
    stage(1, "teaching the router", 116.5), scored(1, 119.0), commit(2, 0, 119.25),
]  # fmt: skip
"""Begun at 100, ended at 124.25: a run without faults."""
