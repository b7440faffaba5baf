"""Streams of calls to a memory with the answers that an uninterrupted `TaskMemory` gives, and a disk that fails."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from treelora.memory import MemoryConfig, Past, Selection, StepCall, TaskMemory
from treelora_platform import tree_journal, tree_store
from treelora_platform.tree_journal import BeginTask, Change, EndTask, Term, apply
from treelora_platform.tree_keeper import Key, TreeKeeper

RUN = "run"
TERM = Term((1, 0), "client", 1)


def digest(state: dict[str, Any]) -> str:
    """Of a memory's `state_dict`."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        total.update(f"{name} {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')} ".encode())
        total.update(value.encode() if isinstance(value, str) else np.ascontiguousarray(value).tobytes())
    return total.hexdigest()


def plain(answer: Any) -> Any:
    """An answer as something that `==` compares to the last bit."""
    if isinstance(answer, Past):
        tree = answer.tree.to_json() if answer.tree else None
        return (answer.sketches.shape, answer.sketches.tobytes(), answer.groups, tree)
    if isinstance(answer, Selection):
        return (answer.task, answer.step, answer.arms.tobytes(), answer.lcb.tobytes())
    return answer


@dataclass(frozen=True)
class Stream:
    """Calls 1..n (at places 0..n-1), their answers, and the digests of the states after 0..n calls."""

    config: MemoryConfig
    calls: list[Change]
    answers: list[Any]
    states: list[str]


def unit_sketch(rng: np.random.Generator, config: MemoryConfig) -> np.ndarray:
    """A task's sketch, [L, K]."""
    sketch = rng.normal(size=(config.layers, config.sketch_size)).astype(np.float32)
    return sketch / np.linalg.norm(sketch, axis=1, keepdims=True)


def make_stream(tasks: int = 4, steps: int = 12, seed: int = 0, **settings: Any) -> Stream:
    """A stream whose steps report losses, now and then a skipped one, in single and in double precision."""
    config = MemoryConfig(**{"layers": 3, "sketch_size": 6, "seed": seed} | settings)
    rng, memory = np.random.default_rng(seed), TaskMemory(config, RUN)
    calls: list[Change] = []
    for number in range(tasks):
        task = f"task {number} «{seed}»"
        calls.append(BeginTask(task, steps))
        for step in range(1, steps + 1):
            seen = None
            if step > 1 and number > 0 and rng.random() > 0.1:
                arms = number if config.max_arms is None else min(number, config.max_arms)
                shape = (arms, config.layers) if config.search == "full" else (config.layers,)
                seen = rng.random(shape).astype(np.float32 if rng.random() < 0.7 else np.float64)
            calls.append(StepCall(RUN, task, step, seen))
        calls.append(EndTask(task, unit_sketch(rng, config), float(rng.integers(1, 100))))
    answers, states = [], [digest(memory.state_dict())]
    for call in calls:
        answers.append(plain(apply(memory, call)))
        states.append(digest(memory.state_dict()))
    return Stream(config, calls, answers, states)


def opened(stream: Stream, folder: Any, calls: int = 0) -> TreeKeeper:
    """A keeper that has made the first calls of a stream, each answered as it should be."""
    keeper = TreeKeeper(str(folder))
    keeper.open(stream.config, None, RUN, TERM)
    go_on(keeper, stream, 0, calls)
    return keeper


def go_on(keeper: TreeKeeper, stream: Stream, done: int, until: int | None = None) -> None:
    """Make the calls after the first `done`, and hold answers and state against the uninterrupted memory's."""
    until = len(stream.calls) if until is None else until
    for place in range(done, until):
        answer = keeper.change(Key(TERM, place + 1), stream.calls[place]).answer
        assert plain(answer) == stream.answers[place]
    assert digest(keeper.ask(Key(TERM, until), "state").answer) == stream.states[until]


class Crash(BaseException):
    """The process is gone."""


class FailingDisk:
    """`os` for journal and store, whose n-th operation crashes or fails; a write may be done in part before it is."""

    def __init__(self, monkeypatch: Any) -> None:
        self.left = -1
        self.part = 0.0
        self.full = False
        monkeypatch.setattr(tree_journal, "os", self)
        monkeypatch.setattr(tree_store, "os", self)

    def fail_at(self, operation: int, part: float = 0.0, full: bool = False) -> None:
        """Fail at the n-th operation from now (0: the next), for ever after if the disk is `full`; -1: never."""
        self.left, self.part, self.full = operation, part, full

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, handle: int, data: Any) -> int:
        """See `os.write`."""
        if self._fails():
            os.write(handle, data[: int(self.part * len(data))])
            self._fail()
        return os.write(handle, data)

    def fsync(self, handle: int) -> None:
        """See `os.fsync`."""
        if self._fails():
            self._fail()
        os.fsync(handle)

    def replace(self, source: Any, target: Any) -> None:
        """See `os.replace`."""
        if self._fails():
            self._fail()
        os.replace(source, target)

    def unlink(self, path: Any) -> None:
        """See `os.unlink`."""
        if self._fails() and not self.full:
            self._fail()
        os.unlink(path)

    def _fails(self) -> bool:
        if self.left < 0:
            return False
        if self.left > 0:
            self.left -= 1
            return False
        return True

    def _fail(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left = -1
        raise Crash
