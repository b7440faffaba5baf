"""Calls that come twice, late, out of order, or from workers that were given up."""

import numpy as np
import pytest

from tests.support.tree_calls import RUN, TERM, digest, go_on, make_stream, opened, plain
from treelora.errors import DataError, LostError
from treelora.memory import ProtocolError, StepCall, TaskMemory
from treelora_platform.tree_journal import BeginTask, EndTask, Term
from treelora_platform.tree_keeper import Key, TreeKeeper

STREAM = make_stream(tasks=3, steps=4)
N = len(STREAM.calls)


def later(**changes):
    return Term(**{**vars(TERM), **changes})


@pytest.mark.parametrize("folder", [True, False])
def test_a_repetition_changes_nothing_and_gets_the_same_answer(folder, tmp_path):
    keeper = opened(STREAM, tmp_path) if folder else TreeKeeper()
    keeper.open(STREAM.config, None, RUN, TERM)
    for number, (call, answer) in enumerate(zip(STREAM.calls, STREAM.answers, strict=True), start=1):
        for _ in range(3):
            assert plain(keeper.change(Key(TERM, number), call).answer) == answer
        keeper.open(STREAM.config, None, RUN, TERM)  # a late repetition of the first call of all
        assert digest(keeper.ask(Key(TERM, number), "state").answer) == STREAM.states[number]
    go_on(keeper, STREAM, N)


@pytest.mark.parametrize("done", range(1, N + 1))
def test_a_reply_lost_with_the_process_is_given_again(done, tmp_path):
    opened(STREAM, tmp_path, done)
    keeper = TreeKeeper(str(tmp_path))
    answer = keeper.change(Key(TERM, done), STREAM.calls[done - 1]).answer
    assert plain(answer) == STREAM.answers[done - 1]
    assert keeper.whoami().replayed <= done
    go_on(keeper, STREAM, done)


def test_late_calls_and_gaps_are_refused(tmp_path):
    keeper = opened(STREAM, tmp_path, 5)
    with pytest.raises(ProtocolError, match="call 3 comes late: 5 calls are done"):
        keeper.change(Key(TERM, 3), STREAM.calls[2])
    with pytest.raises(LostError, match="knows 5 calls, not 6"):
        keeper.change(Key(TERM, 7), STREAM.calls[6])
    for number in (4, 6):
        with pytest.raises(LostError, match=f"knows 5 calls, not {number}"):
            keeper.ask(Key(TERM, number), "state")
    go_on(keeper, STREAM, 5)


def test_a_refused_call_takes_no_number_and_leaves_no_trace(tmp_path):
    keeper = opened(STREAM, tmp_path, 1)
    size = next(tmp_path.glob("*.journal")).stat().st_size
    with pytest.raises(ProtocolError, match="expected step 1"):
        keeper.change(Key(TERM, 2), StepCall(RUN, STREAM.calls[0].task, 2))
    with pytest.raises(DataError, match="NaN"):
        keeper.change(Key(TERM, 2), EndTask(STREAM.calls[0].task, np.full((3, 6), np.nan), 1.0))
    assert next(tmp_path.glob("*.journal")).stat().st_size == size
    go_on(keeper, STREAM, 1)


@pytest.mark.parametrize("again", [False, True], ids=["same life", "next life"])
def test_earlier_workers_cant_touch_the_memory(again, tmp_path):
    keeper = opened(STREAM, tmp_path, 7)
    new = later(attempt=(1, 1), client="other")
    keeper.open(STREAM.config, None, RUN, new)
    if again:
        keeper = TreeKeeper(str(tmp_path))
    with pytest.raises(LostError, match="another group of workers"):
        keeper.change(Key(TERM, 8), STREAM.calls[7])
    with pytest.raises(LostError, match="another group of workers"):
        keeper.ask(Key(TERM, 7), "state")
    for old in (TERM, later(opening=2), later(attempt=(0, 9), client="third")):
        with pytest.raises(LostError, match="a later group of workers"):
            keeper.open(STREAM.config, None, RUN, old)
    assert digest(keeper.ask(Key(new, 0), "state").answer) == STREAM.states[0]


def test_a_clients_openings_come_in_order(tmp_path):
    keeper, memory = opened(STREAM, tmp_path, 7), TaskMemory(STREAM.config, RUN)
    memory.begin_task("another", 3)
    state = memory.state_dict()
    keeper.open(STREAM.config, state, RUN, later(opening=2))
    with pytest.raises(LostError, match="later group"):
        keeper.open(STREAM.config, None, RUN, TERM)
    expected = TaskMemory.from_state_dict(state, run=RUN).state_dict()
    assert digest(keeper.ask(Key(later(opening=2), 0), "state").answer) == digest(expected)
    keeper = TreeKeeper(str(tmp_path))
    assert digest(keeper.ask(Key(later(opening=2), 0), "state").answer) == digest(expected)
    keeper.open(STREAM.config, None, RUN, later(client="equal attempt: the later comer"))
    assert keeper.state()["memory"] == TaskMemory(STREAM.config, RUN).state_dict()["memory"]


@pytest.mark.parametrize("done", range(N + 1))
def test_from_a_commit_it_goes_on(done, tmp_path):
    state = opened(STREAM, tmp_path / "first", done).state()
    term = later(attempt=(2,))
    keeper = TreeKeeper(str(tmp_path / "second"))
    keeper.open(STREAM.config, state, RUN, term)
    keeper = TreeKeeper(str(tmp_path / "second"))
    for number, call in enumerate(STREAM.calls[done:], start=1):
        answer = keeper.change(Key(term, number), call).answer
        assert plain(answer) == STREAM.answers[done + number - 1]
    if done < N:
        assert digest(keeper.state()) == STREAM.states[-1]


def test_without_a_folder_a_new_life_knows_nothing():
    for call in (lambda keeper: keeper.past(), lambda keeper: keeper.ask(Key(TERM, 0), "past")):
        with pytest.raises(LostError, match="holds no memory; the workers bring it back"):
            call(TreeKeeper())
    assert TreeKeeper().whoami().life != TreeKeeper().whoami().life


def test_a_call_that_fails_half_way_isnt_built_upon(tmp_path, monkeypatch):
    keeper = opened(STREAM, tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(TaskMemory, "begin_task", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            keeper.change(Key(TERM, 6), BeginTask("x", 1))
    with pytest.raises(LostError, match=r"a call of 'x' failed half-way \(ZeroDivisionError"):
        keeper.ask(Key(TERM, 5), "state")
    go_on(TreeKeeper(str(tmp_path)), STREAM, 5)


def test_what_it_says_of_its_memory(tmp_path):
    keeper = opened(STREAM, tmp_path, 8)
    memory = keeper.memory
    assert keeper.ask(Key(TERM, 8), "describe").answer == memory.describe() == keeper.describe()
    assert plain(keeper.ask(Key(TERM, 8), "past").answer) == plain(memory.past()) == plain(keeper.past())
    life = TreeKeeper(str(tmp_path)).whoami()
    assert (life.replayed, life.dropped, life.troubles, life.broken) == (2, 0, (), "")
    with next(tmp_path.glob("00000002.journal")).open("ab") as file:
        file.write(b"TLJ1 torn")
    assert TreeKeeper(str(tmp_path)).whoami().dropped == 9
    assert TreeKeeper(str(tmp_path)).whoami().dropped == 0
