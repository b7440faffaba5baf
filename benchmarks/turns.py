"""Programs that take turns by seconds: all are there, one computes, the others are frozen.

A machine that others use too changes its speed within minutes. What is compared must therefore run at the same time,
and on cores that it doesn't share with what it is compared with.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import psutil

POLL_S = 0.2
_END_S = 60.0


@dataclass
class Side:
    """Who takes turns: programs, with all processes that they have started; and when it was its turn (Unix time, s)."""

    name: str
    programs: Sequence[psutil.Popen]
    turns: list[tuple[float, float]] = field(default_factory=list, init=False)

    def freeze(self) -> None:
        """Stop all of its processes; a parent before its children, so that it starts none meanwhile."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._send(signal.SIGCONT)

    def take_turn(self, seconds: float) -> None:
        """Go on for so long."""
        self.thaw()
        begin = time.time()
        time.sleep(seconds)
        self.turns.append((begin, time.time()))
        self.freeze()

    def wait_for(self, done: Callable[[], bool], patience_s: float) -> None:
        """Let it run until something is done.

        Raises:
            RuntimeError: it ended first, or took too long.
        """
        end = time.monotonic() + patience_s
        while not done():
            if time.monotonic() > end or any(program.poll() is not None for program in self.programs):
                raise RuntimeError(f"{self.name}: ended or was stuck before its steps began")
            time.sleep(POLL_S)

    def end(self) -> None:
        """End its programs in order, and by force what doesn't follow."""
        self.thaw()
        for program in self.programs:
            with suppress(psutil.NoSuchProcess):
                left = [program, *program.children(recursive=True)]
                program.terminate()
                for process in psutil.wait_procs(left, timeout=_END_S)[1]:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            program.wait()

    def _send(self, number: signal.Signals) -> None:
        for program in self.programs:
            with suppress(psutil.NoSuchProcess):
                for process in [program, *program.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(number)


@contextmanager
def ended(sides: Sequence[Side]) -> Iterator[None]:
    """See that none of them stays, whatever happens."""
    try:
        yield
    finally:
        for side in sides:
            side.end()


def seconds_of(ends: np.ndarray, turns: Sequence[tuple[float, float]]) -> np.ndarray:
    """Seconds of each step but the first, from their ends (Unix time, s) [T]: float [T - 1], NaN across a pause."""
    turn = np.full(len(ends), -1)
    for place, (begin, end) in enumerate(turns):
        turn[(ends > begin) & (ends <= end)] = place
    together = (turn[1:] == turn[:-1]) & (turn[1:] >= 0)
    return np.where(together, np.diff(ends), np.nan)
