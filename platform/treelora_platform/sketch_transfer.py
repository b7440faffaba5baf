"""How sketches get to the tree actor and back: each of them once, and past Ray's object store.

What goes through the object store stays mapped in the actor's process, page by page, for as long as it lives. Sketches
are most of a memory: N L K numbers, 164 MB for 10,000 tasks. So a client remembers those that it was told of, by the
tasks behind them, and asks for new ones alone; and where it opens a memory with many, it hands them over in pieces
that Ray sends within its messages.

Shapes: N arms, L layers, K sketch numbers a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from treelora.memory import MemoryConfig
from treelora.memory_records import Groups
from treelora_platform.tree_journal import Term
from treelora_platform.tree_store import State

PIECE = 64 * 2**10
"""Bytes of a piece; below 100 KiB Ray passes an argument, or an answer, within the message."""
PIECES = 16
"""Of a message; Ray holds it to 10 MiB."""
Fetch = Callable[[Sequence[int]], np.ndarray]
"""Sketches of these arms, [their number, L, K]."""


def without_sketches(state: State) -> dict[str, np.ndarray | str]:
    """All else of a memory's state."""
    return {name: value for name, value in state.items() if name != "sketches"}


class KnownSketches:
    """Those that a client knows. An arm's sketch stays what it is, until the arm is merged into one for more tasks."""

    def __init__(self, config: MemoryConfig) -> None:
        self.shape = (config.layers, config.sketch_size)
        self._groups: Groups = ()
        self._sketches = np.zeros((0, *self.shape), dtype=np.float32)

    def of(self, groups: Groups, fetch: Fetch) -> np.ndarray:
        """Of the arms that stand for these tasks, [N, L, K] float32, not to be written to; unknown ones are fetched."""
        if groups == self._groups:
            return self._sketches
        sketches = np.empty((len(groups), *self.shape), dtype=np.float32)
        # as a rule all arms stay where they are, and one comes after them
        pairs = enumerate(zip(groups, self._groups, strict=False))
        same = next((arm for arm, (new, old) in pairs if new != old), min(len(groups), len(self._groups)))
        sketches[:same] = self._sketches[:same]
        places = {group: place for place, group in enumerate(self._groups[same:], start=same)}
        unknown = []
        for arm, group in enumerate(groups[same:], start=same):
            if group in places:
                sketches[arm] = self._sketches[places[group]]
            else:
                unknown.append(arm)
        at_once = max(1, PIECE // sketches[:1].nbytes) if unknown else 1
        for at in range(0, len(unknown), at_once):
            arms = unknown[at : at + at_once]
            sketches[arms] = fetch(arms)
        self._groups, self._sketches = groups, sketches
        return sketches


class Staging:
    """The actor's side of a handing over: the bytes of an array, as they come.

    Args:
        term: Of the `open` that it is for.
        shape: [N, L, K].
    """

    def __init__(self, term: Term, shape: tuple[int, int, int]) -> None:
        self.term, self.filled = term, 0
        self._array = np.empty(shape, dtype="<f4")
        self._bytes = self._array.reshape(-1).view(np.uint8)

    def add(self, at: int, pieces: Sequence[bytes]) -> None:
        """Take the pieces that follow, or begin anew; others come after some that are lost, or have come twice."""
        if at not in (0, self.filled):
            return
        self.filled = at
        for piece in pieces:
            self._bytes[self.filled : self.filled + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            self.filled += len(piece)

    def complete(self, term: Term) -> bool:
        """Whether all is there of what this `open` is about."""
        return term == self.term and self.filled == self._bytes.size

    def array(self) -> np.ndarray:
        """Read-only, so that a memory takes it as it is."""
        self._array.flags.writeable = False
        return self._array


def hand_over(sketches: np.ndarray, send: Callable[[int, list[bytes]], int]) -> bool:
    """Send an array's bytes; whether all have come: not so if the actor has died in between.

    Args:
        send: Takes the place of the first byte, and pieces; gives how many bytes have come by then.
    """
    data = np.ascontiguousarray(sketches, dtype="<f4").data.cast("B")
    for at in range(0, len(data), PIECES * PIECE):
        end = min(at + PIECES * PIECE, len(data))
        if send(at, [bytes(data[low : min(low + PIECE, end)]) for low in range(at, end, PIECE)]) != end:
            return False
    return True
