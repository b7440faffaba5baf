"""A tree actor that dies where a test wants it to, and the life of a worker that talks to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.tree_calls import Crash, FailingDisk, plain, unit_sketch
from treelora.memory import MemoryConfig
from treelora_platform.tree_journal import Change
from treelora_platform.tree_keeper import Key, Reply, TreeKeeper

PLAN = "death.json"


def plan_death(folder: Path, number: int, operation: int = 99, part: float = 0.0, always: bool = False) -> None:
    """Let the actor of a folder die at an operation on the disk during a change; 99: after it, before the reply."""
    plan = {"number": number, "operation": operation, "part": part, "always": always}
    (folder.parent / PLAN).write_text(json.dumps(plan))


class MortalKeeper(TreeKeeper):
    """`TreeKeeper`, except that it dies by SIGKILL as `plan_death` says: once, or `always`."""

    def __init__(self, folder: str) -> None:
        self._plan = Path(folder).parent / PLAN
        super().__init__(folder)

    def change(self, key: Key, change: Change) -> Reply:
        """See `TreeKeeper`."""
        if not self._plan.exists():
            return super().change(key, change)
        plan = json.loads(self._plan.read_text())
        if plan["number"] != key.number:
            return super().change(key, change)
        if not plan["always"]:
            self._plan.unlink()
        FailingDisk(SimpleNamespace(setattr=setattr)).fail_at(plan["operation"], plan["part"])
        with contextlib.suppress(Crash):
            super().change(key, change)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    def pid(self) -> int:
        """Of the process."""
        return os.getpid()


Strike = Callable[[str], None]


def learn(memory: Any, config: MemoryConfig, tasks: int, steps: int, strike: Strike = lambda _: None) -> list[Any]:
    """Go through a stream as the method `treelora` does; every answer, and the state at commits.

    Args:
        memory: A `treelora.methods.Memory`.
        strike: Called with the name of each moment, such as "1.7 sent".
    """
    rng, answers = np.random.default_rng(7), []
    for number in range(tasks):
        strike(f"{number}.0 begin")
        answers.append(plain(memory.begin_task(f"task {number}", steps)))
        memory.submit(1, None)
        for step in range(1, steps + 1):
            strike(f"{number}.{step} sent")
            arms, lcb = memory.collect()
            strike(f"{number}.{step} collected")
            answers.append((arms.tolist(), lcb.tobytes()))
            seen = rng.random(config.layers).astype(np.float32) + 0.1 * arms if number else None
            memory.submit(step + 1, None if seen is None or step % 17 == 0 else seen)
            if step % 10 == 0:
                strike(f"{number}.{step} commit")
                answers.append(whole(memory))
        memory.collect()
        strike(f"{number}.{steps} end")
        answers.append(memory.end_task(f"task {number}", unit_sketch(rng, config), 3.0 + number))
        answers.append(plain(memory.past()))
    return [*answers, whole(memory), memory.describe()]


def whole(memory: Any) -> dict[str, Any]:
    """A memory's state as a commit would have it."""
    from treelora.local_memory import unpack_state  # not needed in the actor, which is to start quickly

    state = unpack_state(memory.state_dict())
    return {name: value if isinstance(value, str) else value.tobytes() for name, value in state.items()}
