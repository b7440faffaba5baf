"""A step's call and its answer as bytes; what the actor's process loads; when a snapshot is due."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.tree_calls import TERM, make_stream, opened, plain
from treelora.errors import DataError, LostError
from treelora.memory import Selection, StepCall
from treelora_platform import tree_store
from treelora_platform.tree_journal import Term
from treelora_platform.tree_keeper import Key, Reply
from treelora_platform.tree_wire import pack_call, pack_reply, unpack_call, unpack_reply

STREAM = make_stream(tasks=3, steps=6)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seen", [None, np.float32([0.1, 2e-45]), np.array([1 / 3, 5e-324]), np.ones((4, 2))])
def test_a_call_survives_the_wire_to_the_bit(seen):
    key = Key(Term((3, 1), "c\n«1»", 2), 10**12)
    got, call = unpack_call(pack_call(key, StepCall("run\n", "täsk\n", 7, seen)))
    assert got == key
    assert (call.run, call.task, call.step) == ("run\n", "täsk\n", 7)
    if seen is None:
        assert call.observation is None
    else:
        assert (call.observation.dtype, call.observation.shape) == (seen.dtype, seen.shape)
        assert call.observation.tobytes() == seen.tobytes()


def test_an_answer_survives_the_wire_to_the_bit():
    arms, lcb = np.array([-1, 2**40, 10]), np.float32([-np.inf, -0.0, 1 / 3])
    reply = unpack_reply(pack_reply(Reply("abc", Selection("t\n", 3, arms, lcb))))
    assert reply.life == "abc"
    assert plain(reply.answer) == ("t\n", 3, arms.tobytes(), lcb.tobytes())


def test_steps_in_bytes_are_the_same_steps(tmp_path):
    keeper = opened(STREAM, tmp_path)
    term = Term((2,), "client", 1)
    keeper.open(STREAM.config, None, "run", term)
    for number, (call, answer) in enumerate(zip(STREAM.calls, STREAM.answers, strict=True), start=1):
        key = Key(term, number)
        if not isinstance(call, StepCall):
            assert plain(keeper.change(key, call).answer) == answer
            continue
        for _ in range(2):  # a repetition changes nothing here either
            reply = unpack_reply(keeper.step_in_bytes(pack_call(key, call)))
            assert (plain(reply.answer), reply.life) == (answer, keeper.whoami().life)
    with pytest.raises(LostError, match="another group of workers"):
        keeper.step_in_bytes(pack_call(Key(TERM, 1), StepCall("run", "t", 1)))


def test_its_errors_stay_what_they_are(tmp_path):
    keeper = opened(STREAM, tmp_path, 10)  # within the second task
    call = STREAM.calls[10]
    bad = StepCall(call.run, call.task, call.step, np.array([1.0, np.nan, 1.0]))
    with pytest.raises(DataError, match="layer 1: loss nan"):
        keeper.step_in_bytes(pack_call(Key(TERM, 11), bad))


def test_the_actors_process_needs_no_torch():
    code = "import sys, treelora_platform.tree_keeper, treelora_platform.tree_wire; print('torch' in sys.modules)"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout == "False\n"


def test_a_large_snapshot_is_made_less_often(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_store, "MAX_RECORDS", 2)
    keeper = opened(STREAM, tmp_path)
    store, size = keeper._store, keeper._store._snapshot_bytes
    for allowed in (2, 4):  # records; the snapshot's size allows as many at least
        monkeypatch.setattr(tree_store, "BYTES_A_RECORD", size // allowed)
        store._writer.records = allowed - 1
        assert not store.due
        store._writer.records = allowed
        assert store.due
