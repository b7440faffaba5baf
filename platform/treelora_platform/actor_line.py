"""Calls to an actor that may die at any moment and come back: sent again until they are answered, within bounds.

Ray tells of a death a second or two late, because it waits to hear the reason. So when an answer is overdue the actor
is asked who it is; where another life of it answers, the call went down with the last one and is sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from treelora.errors import LostError, TreeLoRAError
from treelora_platform.tree_keeper import Life, Reply
from treelora_platform.tree_wire import unpack_reply

TIMEOUT_S = 60.0
MAX_DEATHS = 3
_OVERDUE_S = 0.3
_PROBE_S = 0.1
_MAX_PROBES = 5
_MAX_LOSSES = 20


@dataclass
class Sent:
    """A call under way; what: for messages; ref: None once it has failed on its way."""

    what: str
    method: str
    args: tuple[Any, ...]
    ref: Any = None


class ActorLine:
    """To an actor that answers `whoami` with its `Life`, every other call with a `Reply`; calls may be repeated.

    A reply may come as bytes, see `tree_wire`.

    Args:
        name: The actor's name.
        timeout_s: How long a call waits for a sign of life. After a third of it a hung actor is ended, to start again.
        notice: Told in a sentence when the actor has come back.

    Raises:
        LostError: the actor is gone.
    """

    def __init__(self, name: str, timeout_s: float = TIMEOUT_S, notice: Callable[[str], None] | None = None) -> None:
        self.name, self.timeout_s, self.notice = name, timeout_s, notice
        self.restarts = 0
        self._life = ""
        self._actor = self._find("its first call")

    def send(self, what: str, method: str, *args: Any) -> Sent:
        """Begin a call."""
        sent = Sent(what, method, args)
        self._send(sent)
        return sent

    def call(self, what: str, method: str, *args: Any) -> Any:
        """`send` and `wait`."""
        return self.wait(self.send(what, method, *args))

    def wait(self, sent: Sent) -> Any:
        """Answer of a call.

        Raises:
            LostError: the actor is gone, shows no sign of life, or dies each time that it gets this call.
            TreeLoRAError: the actor's own.
        """
        began = heard = time.monotonic()
        probes: list[Any] = []
        deaths, losses, ended = 0, 0, False
        while True:
            waiting = [ref for ref in (sent.ref, *probes) if ref is not None]
            ready = ray.wait(waiting, timeout=_PROBE_S if probes else _OVERDUE_S)[0] if waiting else []
            answer = self._read(ready[0], sent.what) if ready else None
            if isinstance(answer, Reply):
                self._meet(answer.life, None, sent.what, began)
                return answer.answer
            if isinstance(answer, Life):
                heard = time.monotonic()
                reborn = self._meet(answer.life, answer, sent.what, began)
                deaths += reborn
                if deaths >= MAX_DEATHS:
                    raise LostError(f"actor {self.name} died {deaths} times in a row during {sent.what}")
                if reborn or sent.ref is None:
                    probes.clear()
                    self._send(sent)
                    continue
            if ready and ready[0] == sent.ref:
                sent.ref = None
                losses += 1
                if losses >= _MAX_LOSSES:
                    raise LostError(f"actor {self.name}: {sent.what} was lost on its way {losses} times")
            elif ready:
                probes.remove(ready[0])
            if ready:
                time.sleep(_PROBE_S)
            silent_s = time.monotonic() - heard
            if silent_s > self.timeout_s:
                raise LostError(f"actor {self.name}: no answer to {sent.what} within {self.timeout_s:.0f} s")
            if silent_s > self.timeout_s / 3 and not ended:
                ended = True
                ray.kill(self._actor, no_restart=False)
            if len(probes) < _MAX_PROBES:
                probes.append(self._actor.whoami.remote())

    def _send(self, sent: Sent) -> None:
        sent.ref = getattr(self._actor, sent.method).remote(*sent.args)

    def _find(self, what: str) -> Any:
        try:
            return ray.get_actor(self.name)
        except ValueError:
            raise LostError(f"actor {self.name} is gone; it was wanted for {what}") from None

    def _read(self, ref: Any, what: str) -> Reply | Life | None:
        """What came back; None where the call failed on its way. Raises: LostError, and what the actor raised."""
        try:
            answer: Reply | Life | bytes = ray.get(ref)
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, TreeLoRAError) else error) from None
        except ActorDiedError:  # for good, unless another has taken its name
            self._actor = self._find(what)
            return None
        except RayError:
            return None
        return unpack_reply(answer) if isinstance(answer, bytes) else answer

    def _meet(self, life: str, told: Life | None, what: str, began: float) -> bool:
        """Note which life of the actor has answered; whether it is a new one, which is told of."""
        known, self._life = self._life, life
        if known in ("", life):
            return False
        self.restarts += 1
        if self.notice:
            waited_s = time.monotonic() - began
            self.notice(_story(told or self._ask_life(what), what, waited_s))
        return True

    def _ask_life(self, what: str) -> Life | None:
        ref = self._actor.whoami.remote()
        answer = self._read(ref, what) if ray.wait([ref], timeout=self.timeout_s)[0] else None
        return answer if isinstance(answer, Life) else None


def _story(life: Life | None, what: str, waited_s: float) -> str:
    story = f"the tree actor died around {what} and is back; it was waited for {waited_s:.1f} s"
    if life is None:
        return story
    story += f", {life.replayed} calls were replayed"
    if life.dropped:
        story += f", {life.dropped} bytes of an unfinished record were dropped"
    troubles = [*life.troubles, *([life.broken] if life.broken else [])]
    return "; ".join([story, *troubles])
