"""What happened in one schedule: plain records that go into the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from treelora_platform.chaos.account import Hit
from treelora_platform.chaos.outline import Event
from treelora_platform.chaos.schedule import Fault


@dataclass(frozen=True)
class Command:
    """One execution of the driver: begun and ended in s since 1970, its exit code, and whether a fault ended it."""

    begun: float
    ended: float
    code: int
    hit: bool
    last_words: str = ""


@dataclass
class Story:
    """Of one schedule.

    Args:
        hits: Faults that struck, in order.
        missed: Faults that found nothing to hit before the run was over.
        commands: The driver's executions.
        events: All that rank 0 wrote down.
        ended: Why it was given up; empty where the run came to its end.
        tracked_later: Whether `treelora track` had to send the rest.
        left_behind: Processes, shared memory and files that stayed.
    """

    hits: list[Hit] = field(default_factory=list)
    missed: list[Fault] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    events: Sequence[Event] = ()
    ended: str = ""
    tracked_later: bool = False
    left_behind: list[str] = field(default_factory=list)

    @property
    def gave_up(self) -> list[str]:
        """What drivers said that ended by themselves before the run was complete."""
        return [f"exit {c.code}: {c.last_words}" for c in self.commands if c.code and not c.hit]

    @property
    def seconds(self) -> float:
        """From the first command to the end of the last."""
        return self.commands[-1].ended - self.commands[0].begun if self.commands else 0.0
