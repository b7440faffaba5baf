"""What goes wrong and when: faults drawn from a seed and the outline of the reference run.

Moments are windows of a run rather than times, because times hardly ever hit the narrow ones. Every pair of a kind and
a window comes once before any comes again, so that a few schedules already try them all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from treelora.errors import ConfigError
from treelora_platform.chaos.outline import MOMENTS, Moment, Outline

Kind = Literal["worker", "driver", "tree-actor", "mlflow", "stop", "stall", "controller", "head", "node"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_KINDS: tuple[Kind, ...] = ("worker", "driver", "tree-actor", "mlflow", "stop")
MEANING: dict[Kind, str] = {
    "worker": "SIGKILL of a train worker",
    "driver": "SIGKILL of the driver, then the same command again",
    "tree-actor": "SIGKILL of the tree actor",
    "mlflow": "SIGKILL of the MLflow server, back some seconds later",
    "stop": "SIGTERM of the driver, then the same command again",
    "stall": "SIGSTOP of a train worker",
    "controller": "SIGKILL of Ray Train's controller",
    "head": "SIGKILL of Ray's head, then the driver's command again",
    "node": "SIGKILL of a node of the cluster",
}
# Where a kind has something to hit. The workers are gone while the run is closed, and not yet there at its start.
_ANYWHERE = MOMENTS
_AT_WORK: tuple[Moment, ...] = ("loading", "task-begin", "step", "commit", "scoring", "task-end")
_TAUGHT: tuple[Moment, ...] = ("task-begin", "step", "commit", "scoring", "task-end")
_WINDOWS: dict[Kind, tuple[Moment, ...]] = {
    "worker": _AT_WORK,
    "driver": _ANYWHERE,
    "tree-actor": _TAUGHT,
    "mlflow": ("start", "step", "commit", "scoring", "closing"),
    "stop": _ANYWHERE,
    "stall": _AT_WORK,
    "controller": _AT_WORK,
    "head": _AT_WORK,
    "node": _AT_WORK,
}
_PAUSE_S: dict[Kind, float] = {"driver": 5.0, "stop": 5.0, "head": 5.0, "mlflow": 8.0}
ENDS_DRIVER: tuple[Kind, ...] = ("driver", "stop", "head")
"""Kinds after which the same command is given again."""


@dataclass(frozen=True)
class Fault:
    """One fault to come.

    Args:
        kind: What is hit.
        moment: Window in which.
        unit: Task of the window; 0 where it has none.
        step: Step of the task after which; 0 where it has none.
        delay: Share (0 to 1) of the window's length that passes first.
        choice: Number (0 to 1) that says which of several processes.
        pause_s: Seconds until the driver's command is given again, or the server started again.
    """

    kind: Kind
    moment: Moment
    unit: int = 0
    step: int = 0
    delay: float = 0.0
    choice: float = 0.0
    pause_s: float = 0.0

    def where(self, outline: Outline) -> str:
        """The moment in words."""
        if self.moment in ("start", "loading", "closing"):
            return {"start": "start", "loading": "loading the model", "closing": "closing the run"}[self.moment]
        name = outline.units[self.unit]
        if self.step:
            return f"{self.moment} {self.step} of {name}"
        return f"{self.moment.replace('-', ' ')} of {name}" if self.moment == "scoring" else f"{self.moment}, {name}"


def check_kinds(names: Sequence[str]) -> tuple[Kind, ...]:
    """Kinds by name, each once.

    Raises:
        ConfigError: there is no such kind, or none at all.
    """
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        found = repr(unknown[0]) if unknown else "nothing"
        raise ConfigError(f"--kinds: {found} is no kind of fault; there are {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in names)


def draw(seed: int, schedules: int, faults: int, kinds: Sequence[Kind], outline: Outline) -> list[tuple[Fault, ...]]:
    """Faults of each schedule in order of their windows. The first n schedules don't depend on how many are drawn."""
    rng = random.Random(seed)
    pairs = _deal(rng, [(kind, moment) for kind in kinds for moment in _WINDOWS[kind] if _occurs(moment, outline)])
    drawn = []
    for _ in range(schedules):
        chosen = [_fault(rng, outline, *next(pairs)) for _ in range(faults)]
        drawn.append(tuple(sorted(chosen, key=lambda fault: _position(fault, outline))))
    return drawn


def _deal(rng: random.Random, pairs: list[tuple[Kind, Moment]]) -> Iterator[tuple[Kind, Moment]]:
    while True:
        deck = list(pairs)
        rng.shuffle(deck)
        yield from deck


def _occurs(moment: Moment, outline: Outline) -> bool:
    return moment not in ("task-begin", "step", "commit") or outline.total_steps > 0


def _fault(rng: random.Random, outline: Outline, kind: Kind, moment: Moment) -> Fault:
    unit = step = 0
    if moment in ("scoring", "task-end"):
        unit = rng.randrange(len(outline.units))
    elif moment in ("task-begin", "step", "commit"):
        unit = rng.choice([unit for unit, steps in enumerate(outline.steps) if steps])
        if moment == "step":
            step = rng.randint(1, outline.steps[unit])
        elif moment == "commit":
            step = rng.choice(outline.committed_steps(unit))
    return Fault(kind, moment, unit, step, rng.random(), rng.random(), pause_s=rng.random() * _PAUSE_S.get(kind, 0.0))


def _position(fault: Fault, outline: Outline) -> tuple[int, int, int, int]:
    """Order in which a run comes by."""
    if fault.moment == "closing":
        return (2, 0, 0, 0)
    if fault.moment in ("start", "loading"):
        return (0, MOMENTS.index(fault.moment), 0, 0)
    late = fault.moment in ("scoring", "task-end")
    return (1, fault.unit, outline.steps[fault.unit] + 1 if late else fault.step, MOMENTS.index(fault.moment))
