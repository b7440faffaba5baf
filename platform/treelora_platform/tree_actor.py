"""The tree actor: one `TaskMemory` for all workers of a run, and the client that rank 0 talks to it with.

One call a step, asked for a step ahead: `submit` sends it, `collect` waits for the answer. Sketches travel once
(`sketch_transfer`). The actor dies and comes back with its exact state (`tree_store`) while the workers go on. Ray
never repeats a call (a replay of a fatal call would kill the actor again); the client does, because every call has a
number and changes the memory once.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from torch import Tensor

from treelora.errors import LostError
from treelora.local_memory import pack_state, unpack_state
from treelora.memory import MemoryConfig, Past, Selection, StepCall
from treelora.memory_records import Groups
from treelora_platform.actor_line import MAX_DEATHS, TIMEOUT_S, ActorLine, Sent
from treelora_platform.sketch_transfer import PIECE, KnownSketches, hand_over, without_sketches
from treelora_platform.tree_journal import BeginTask, Change, EndTask, Term
from treelora_platform.tree_keeper import Key, Question, TreeKeeper
from treelora_platform.tree_store import State
from treelora_platform.tree_wire import pack_call

FOLDER = "tree-actor"
"""In the run's folder."""
_OPENING = "opening the memory"

__all__ = ["FOLDER", "TreeClient", "TreeKeeper", "launch_tree_actor"]


def launch_tree_actor(name: str, folder: Path | None = None, keeper: type[TreeKeeper] = TreeKeeper) -> Any:
    """Start the actor of a run on the driver's node; it ends with the driver's Ray session.

    Args:
        name: The run's name; the actor is found as `tree-<name>`.
        folder: Where it keeps its state. None: a new start begins with nothing.
        keeper: The actor's class.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    # hard affinity: by a soft one Ray was seen to put the actor on another node, with this one alive and free;
    # and where this node dies, the driver dies with it
    # no runtime_env: that would keep it from Ray's idle processes, which save a second at each start
    return (
        ray.remote(keeper)
        .options(
            name=f"tree-{name}",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            enable_task_events=False,  # a call a step would fill Ray's record of tasks
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(str(folder.absolute()) if folder else None)
    )


class TreeClient:
    """`treelora.methods.Memory` on the tree actor.

    Args:
        name: The run's name, see `launch_tree_actor`.
        config: Settings of the memory.
        run: Whose steps these are.
        attempt: Ascending numbers of the driver's attempts and of its groups of workers: a client of an earlier one
            can't touch the memory any more.
        timeout_s, notice: See `ActorLine`.

    Raises:
        LostError: from every method, where the actor can't answer.
    """

    def __init__(
        self,
        name: str,
        config: MemoryConfig,
        run: str,
        attempt: tuple[int, ...] = (),
        timeout_s: float = TIMEOUT_S,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.run = config, run
        self.line = ActorLine(f"tree-{name}", timeout_s, notice)
        self._term = Term(attempt, uuid.uuid4().hex)
        self._number = 0
        self._task = ""
        self._pending: Sent | None = None
        self._answer: Selection | None = None
        self._open({})

    def begin_task(self, task: str, horizon: int) -> Past:
        """See `Memory`."""
        self._task = task
        self._answer = None
        return self._completed(self._change(f"the beginning of {task!r}", BeginTask(task, horizon)))

    def submit(self, step: int, observation: np.ndarray | None) -> None:
        """See `Memory`."""
        self._settle()
        call = StepCall(self.run, self._task, step, observation)
        data = pack_call(Key(self._term, self._number + 1), call)
        self._pending = self.line.send(f"step {step} of {self._task!r}", "step_in_bytes", data)

    def collect(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Memory`."""
        self._settle()
        assert self._answer is not None, "collect without submit"
        return self._answer.arms, self._answer.lcb

    def end_task(self, task: str, sketch: np.ndarray, mass: float) -> Groups:
        """See `Memory`."""
        return self._change(f"the end of {task!r}", EndTask(task, sketch, mass))

    def past(self) -> Past:
        """See `Memory`."""
        return self._completed(self._ask("past"))

    def describe(self) -> dict[str, Any]:
        """See `TaskMemory.describe`."""
        return self._ask("describe")

    def state_dict(self) -> dict[str, Tensor]:
        """See `Memory`; a step that was submitted is part of it."""
        state: dict[str, np.ndarray | str] = self._ask("state")
        return pack_state({**state, "sketches": self._known.of(_groups(state), self._fetch)})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Memory`."""
        self._open(unpack_state(state))

    def _open(self, state: State) -> None:
        """With the state of a commit, or with nothing."""
        self._term = Term(self._term.attempt, self._term.client, self._term.opening + 1)
        self._pending = self._answer = None
        self._known, self._number = KnownSketches(self.config), 0
        sketches = np.asarray(state.get("sketches", ()))
        if sketches.nbytes > PIECE:
            self._open_staged(without_sketches(state), sketches)
        else:
            self.line.call(_OPENING, "open", self.config, state, self.run, self._term)
        if state:
            self._known.of(_groups(state), lambda arms: sketches[arms])

    def _open_staged(self, rest: State, sketches: np.ndarray) -> None:
        def send(at: int, pieces: list[bytes]) -> int:
            came: int = self.line.call(_OPENING, "stage", self._term, sketches.shape, at, *pieces)
            return came

        for _ in range(MAX_DEATHS):  # what was staged goes down with the actor
            if hand_over(sketches, send) and self.line.call(
                _OPENING, "open", self.config, rest, self.run, self._term, True
            ):
                return
        raise LostError(f"actor {self.line.name} died {MAX_DEATHS} times in a row during {_OPENING}")

    def _change(self, what: str, change: Change) -> Any:
        self._settle()
        answer = self.line.call(what, "change_lean", Key(self._term, self._number + 1), change)
        self._number += 1
        return answer

    def _ask(self, what: Question) -> Any:
        self._settle()
        return self.line.call(f"its {what}", "ask_lean", Key(self._term, self._number), what)

    def _completed(self, past: Past) -> Past:
        return replace(past, sketches=self._known.of(past.groups, self._fetch))

    def _fetch(self, arms: Sequence[int]) -> np.ndarray:
        sketches: np.ndarray = self.line.call("sketches", "sketches", Key(self._term, self._number), arms)
        return sketches

    def _settle(self) -> None:
        """Wait for the step that was submitted: what follows builds on it, and it may have to be sent again."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._answer = self.line.wait(pending)
            self._number += 1


def _groups(state: State) -> Groups:
    return tuple(tuple(group) for group in json.loads(str(state["memory"]))["groups"])
