"""What the tree actor does: one `TaskMemory` whose every change is on disk before it is answered.

Plain Python; `tree_actor` launches it. It imports no more than it needs, because a restart waits for that.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from treelora.errors import CheckpointError, LostError, TreeLoRAError
from treelora.memory import MemoryConfig, Past, ProtocolError, Selection, StepCall, TaskMemory
from treelora.memory_records import Groups
from treelora_platform.sketch_transfer import Staging, without_sketches
from treelora_platform.tree_journal import BeginTask, Change, EndTask, Term, apply, encode
from treelora_platform.tree_store import TreeStore

Question = Literal["past", "state", "describe"]


@dataclass(frozen=True)
class Key:
    """What makes a call the only one of its kind: its term, and the number of the change that it is or follows."""

    term: Term
    number: int


@dataclass(frozen=True)
class Reply:
    """An answer, and which life of the actor it is from."""

    life: str
    answer: Any = None


@dataclass(frozen=True)
class Life:
    """The actor's process. replayed, dropped, troubles, seconds: see `Recovered`; broken: why nothing was recovered."""

    life: str
    replayed: int = 0
    dropped: int = 0
    troubles: tuple[str, ...] = ()
    seconds: float = 0.0
    broken: str = ""


class TreeKeeper:
    """The actor's class; without a folder the memory doesn't outlive the process.

    Methods with a term or a key are for clients on the other side of a network, whose calls may come twice, late, or
    from a group of workers that was given up; the other methods for callers in this process.

    Raises:
        LostError: the memory is gone, or serves another group of workers by now.
        CheckpointError: the disk refuses.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._life = Life(uuid.uuid4().hex)
        self.memory: TaskMemory | None = None
        self._term, self._number = Term(), 0
        self._store = TreeStore(Path(folder)) if folder else None
        self._broken = ""
        self._staging: Staging | None = None
        if not self._store:
            return
        try:
            found = self._store.recover()
        except CheckpointError as error:
            # an exception here would end the actor for good; so it lives on, and says why it can't help
            self._broken = str(error)
            return
        if found:
            self.memory, self._term, self._number = found.memory, found.term, found.number
            done = (found.replayed, found.dropped, tuple(found.troubles), found.seconds)
            self._life = Life(self._life.life, *done)

    def open(
        self,
        config: MemoryConfig,
        state: Mapping[str, np.ndarray | str] | None,
        run: str,
        term: Term | None = None,
        staged: bool = False,
    ) -> Reply:
        """Start empty, or from a commit: a group of workers that starts again takes the memory back with it.

        Args:
            staged: The state's sketches were sent ahead, to `stage`. The answer is whether all of them are there; where
                not, nothing was opened.
        """
        if term is not None:
            if self._served(term):
                return Reply(self._life.life, True)
            self._refuse_older(term)
            if staged:
                assert state is not None
                if self._staging is None or not self._staging.complete(term):
                    return Reply(self._life.life, False)
                state = {**state, "sketches": self._staging.array()}
        memory = TaskMemory.from_state_dict(state, run=run) if state else TaskMemory(config, run)
        term = term or Term()
        if self._store:
            self._guarded(self._store.reset, memory.state_dict(), term)
        self.memory, self._term, self._number, self._broken = memory, term, 0, ""
        self._staging = None
        return Reply(self._life.life, True)

    def stage(self, term: Term, shape: tuple[int, int, int], at: int, *pieces: bytes) -> Reply:
        """Take some bytes of the sketches of the state for an `open` that follows; answers how many have come."""
        self._refuse_older(term)
        if self._staging is None or self._staging.term != term:
            self._staging = Staging(term, shape)
        self._staging.add(at, pieces)
        return Reply(self._life.life, self._staging.filled)

    def change(self, key: Key, change: Change) -> Reply:
        """Make a call that changes the memory, once: a repetition gets the answer again."""
        memory = self._opened(key.term)
        if key.number == self._number:
            return Reply(self._life.life, apply(memory, change))
        if key.number < self._number:
            raise ProtocolError(f"call {key.number} comes late: {self._number} calls are done")
        self._expect(key.number - 1)
        return Reply(self._life.life, self._change(memory, change))

    def step_in_bytes(self, call: bytes) -> bytes:
        """`change` for a step, see `tree_wire`: a worker makes this call thousands of times."""
        from treelora_platform import tree_wire  # it imports this module

        return tree_wire.pack_reply(self.change(*tree_wire.unpack_call(call)))

    def change_lean(self, key: Key, change: Change) -> Reply:
        """`change`, its answer without sketches: a client knows them, but for a few."""
        reply = self.change(key, change)
        return replace(reply, answer=_lean(reply.answer))

    def ask_lean(self, key: Key, what: Question) -> Reply:
        """`ask`, its answer without sketches."""
        reply = self.ask(key, what)
        return replace(reply, answer=_lean(reply.answer))

    def sketches(self, key: Key, arms: Sequence[int]) -> Reply:
        """Of these arms, [their number, L, K] float32, after the change `key.number`."""
        memory = self._opened(key.term)
        self._expect(key.number)
        return Reply(self._life.life, memory.arms.sketches_NLK[list(arms)])

    def ask(self, key: Key, what: Question) -> Reply:
        """`past`, `state_dict` or `describe` of the memory, after the change `key.number`."""
        memory = self._opened(key.term)
        self._expect(key.number)
        questions = {"past": memory.past, "state": memory.state_dict, "describe": memory.describe}
        return Reply(self._life.life, questions[what]())

    def whoami(self) -> Life:
        """How this process came by its memory; asked to see whether it lives."""
        return replace(self._life, broken=self._broken)

    def begin_task(self, task: str, horizon: int) -> Past:
        """See `TaskMemory.begin_task`."""
        return self._change(self._opened(), BeginTask(task, horizon))

    def step(self, call: StepCall) -> Selection:
        """See `TaskMemory.step`."""
        return self._change(self._opened(), call)

    def end_task(self, task: str, sketch: np.ndarray, mass: float) -> Groups:
        """See `TaskMemory.end_task`."""
        return self._change(self._opened(), EndTask(task, sketch, mass))

    def past(self) -> Past:
        """See `TaskMemory.past`."""
        return self._opened().past()

    def state(self) -> dict[str, np.ndarray | str]:
        """See `TaskMemory.state_dict`."""
        return self._opened().state_dict()

    def describe(self) -> dict[str, Any]:
        """See `TaskMemory.describe`."""
        return self._opened().describe()

    def _change(self, memory: TaskMemory, change: Change) -> Any:
        payload = encode(change)
        # applied first: a call that is refused, or fatal, must not be in the journal, where it would come again
        try:
            answer = apply(memory, change)
        except TreeLoRAError:
            raise
        except BaseException as error:
            self._broken = f"a call of {change.task!r} failed half-way ({type(error).__name__}: {error})"
            raise
        self._number += 1
        if self._store:
            self._guarded(self._store.append, self._number, payload)
            if isinstance(change, EndTask) or self._store.due:
                self._guarded(self._store.snapshot, memory.state_dict(), self._term, self._number)
        return answer

    def _guarded(self, write: Any, *args: Any) -> None:
        """Write; where that fails the memory is ahead of the disk and serves nobody until it is opened anew."""
        try:
            write(*args)
        except CheckpointError as error:
            self._broken = str(error)
            raise

    def _served(self, term: Term) -> bool:
        return term == self._term and self.memory is not None and not self._broken

    def _refuse_older(self, term: Term) -> None:
        held = self._term
        if term.attempt < held.attempt or (term.client == held.client and term.opening < held.opening):
            raise LostError("the tree actor serves a later group of workers")

    def _opened(self, term: Term | None = None) -> TaskMemory:
        if self._broken:
            raise LostError(f"the tree actor's memory is lost: {self._broken}; the workers bring it back")
        if self.memory is None:
            raise LostError("the tree actor has started again and holds no memory; the workers bring it back")
        if term is not None and term != self._term:
            raise LostError("the tree actor serves another group of workers")
        return self.memory

    def _expect(self, number: int) -> None:
        if number != self._number:
            raise LostError(
                f"the tree actor knows {self._number} calls, not {number}: its journal lost some that were answered; "
                "the workers bring its memory back"
            )


def _lean(answer: Any) -> Any:
    if isinstance(answer, Past):
        return replace(answer, sketches=answer.sketches[:0])
    if isinstance(answer, dict):
        return without_sketches(answer)
    return answer
