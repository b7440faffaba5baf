"""A step's call and its answer as bytes, as they travel between a worker and the tree actor.

Ray pickles each object of a call on its own, which took as long as the rest of the way: bytes it passes as they are.
"""

from __future__ import annotations

import json

import numpy as np

from treelora.memory import Selection, StepCall
from treelora_platform.tree_journal import Term, decode, encode
from treelora_platform.tree_keeper import Key, Reply


def pack_call(key: Key, call: StepCall) -> bytes:
    """A line for the key, then the journal's record of the call."""
    term = key.term
    line = json.dumps([list(term.attempt), term.client, term.opening, key.number])
    return line.encode() + b"\n" + encode(call)


def unpack_call(data: bytes) -> tuple[Key, StepCall]:
    """Inverse of `pack_call`."""
    line, _, payload = data.partition(b"\n")
    attempt, client, opening, number = json.loads(line)
    call = decode(payload)
    assert isinstance(call, StepCall)
    return Key(Term(tuple(attempt), client, opening), number), call


def pack_reply(reply: Reply) -> bytes:
    """A line for life, task and step, then arms (int64) and bounds (float32) of all layers."""
    chosen: Selection = reply.answer
    line = json.dumps([reply.life, chosen.task, chosen.step])
    arms, lcb = chosen.arms.astype("<i8", copy=False), chosen.lcb.astype("<f4", copy=False)
    return line.encode() + b"\n" + arms.tobytes() + lcb.tobytes()


def unpack_reply(data: bytes) -> Reply:
    """Inverse of `pack_reply`; the arrays are read-only."""
    line, _, arrays = data.partition(b"\n")
    life, task, step = json.loads(line)
    layers = len(arrays) // 12
    arms = np.frombuffer(arrays, dtype="<i8", count=layers)
    return Reply(life, Selection(task, step, arms, np.frombuffer(arrays, dtype="<f4", offset=8 * layers)))
