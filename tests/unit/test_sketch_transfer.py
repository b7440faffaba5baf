"""Sketches cross to the tree actor and back without a bit's difference, each of them once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tree_calls import RUN, TERM, digest, go_on, make_stream, opened, plain, unit_sketch
from treelora.errors import CheckpointError, LostError
from treelora.memory import MemoryConfig, TaskMemory
from treelora_platform import sketch_transfer
from treelora_platform.sketch_transfer import KnownSketches, Staging, hand_over
from treelora_platform.tree_journal import Term
from treelora_platform.tree_keeper import Key, TreeKeeper

STREAM = make_stream(tasks=6, steps=3, max_arms=4)
N = len(STREAM.calls)
LATER = Term(TERM.attempt, TERM.client, TERM.opening + 1)


class Told:
    """A memory's sketches, and which of them were asked for."""

    def __init__(self, memory: TaskMemory) -> None:
        self.memory, self.calls = memory, []

    def __call__(self, arms):
        self.calls.append(list(arms))
        return self.memory.arms.sketches_NLK[list(arms)]


def learnt(memory, number):
    memory.begin_task(f"task {number}", 3)
    memory.end_task(f"task {number}", unit_sketch(np.random.default_rng(number), memory.config), 1.0 + number)


@given(most=st.one_of(st.none(), st.integers(1, 5)), asked=st.lists(st.booleans(), min_size=9, max_size=9))
def test_what_is_known_is_what_the_memory_has(most, asked):
    config = MemoryConfig(layers=2, sketch_size=3, max_arms=most)
    memory, known = TaskMemory(config, RUN), KnownSketches(config)
    told, seen = Told(memory), []
    for number, ask in enumerate(asked):
        learnt(memory, number)
        if ask:
            got = known.of(memory.arms.groups, told)
            assert got.dtype == np.float32
            assert got.tobytes() == memory.arms.sketches_NLK.tobytes()
            seen.append((got, got.tobytes()))
            assert known.of(memory.arms.groups, told) is got
    assert all(got.tobytes() == before for got, before in seen)  # earlier answers stay as they are


def test_each_sketch_is_asked_for_once_and_many_at_once():
    config = MemoryConfig(layers=4, sketch_size=1024)  # 16 KiB a task: four of them are a piece
    memory, known = TaskMemory(config, RUN), KnownSketches(config)
    told = Told(memory)
    for number in range(10):
        learnt(memory, number)
        if number in (5, 6, 9):
            known.of(memory.arms.groups, told)
    assert told.calls == [[0, 1, 2, 3], [4, 5], [6], [7, 8, 9]]


def test_merged_arms_are_asked_for_and_no_others():
    config = MemoryConfig(layers=2, sketch_size=3, max_arms=3)
    memory, known = TaskMemory(config, RUN), KnownSketches(config)
    told = Told(memory)
    for number in range(6):
        before = set(memory.arms.groups)
        learnt(memory, number)
        told.calls.clear()
        known.of(memory.arms.groups, told)
        new = [arm for arm, group in enumerate(memory.arms.groups) if group not in before]
        assert told.calls == [new]
    assert any(len(group) > 1 for group in memory.arms.groups)


@pytest.mark.parametrize("arms", [1, 2, 5])
@pytest.mark.parametrize("piece", [1, 7, 24, 1000])
def test_an_array_is_handed_over_to_the_bit(arms, piece, monkeypatch):
    monkeypatch.setattr(sketch_transfer, "PIECE", piece)
    monkeypatch.setattr(sketch_transfer, "PIECES", 3)
    sketches = np.random.default_rng(0).normal(size=(arms, 2, 3)).astype(np.float32)
    staging = Staging(TERM, sketches.shape)
    sizes = []

    def send(at, pieces):
        assert not staging.complete(TERM)
        staging.add(at, pieces)
        staging.add(at, pieces)  # comes twice
        sizes.extend(map(len, pieces))
        return staging.filled

    assert hand_over(sketches, send)
    assert staging.complete(TERM)
    assert not staging.complete(LATER)
    assert max(sizes) <= piece
    assert sum(sizes) == sketches.nbytes
    assert staging.array().tobytes() == sketches.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        staging.array()[0] = 0


def test_what_a_death_has_lost_is_noticed(monkeypatch):
    monkeypatch.setattr(sketch_transfer, "PIECE", 8)
    monkeypatch.setattr(sketch_transfer, "PIECES", 2)
    sketches = np.ones((4, 2, 3), dtype=np.float32)
    lives = [Staging(TERM, sketches.shape), Staging(TERM, sketches.shape)]

    def send(at, pieces):
        life = lives[at >= 32]
        life.add(at, pieces)
        return life.filled

    assert not hand_over(sketches, send)
    assert [life.filled for life in lives] == [32, 0]


def test_lean_answers_lack_the_sketches_and_nothing_else(tmp_path):
    keeper, lean = opened(STREAM, tmp_path / "a"), opened(STREAM, tmp_path / "b")
    known = KnownSketches(STREAM.config)
    for number, call in enumerate(STREAM.calls, start=1):
        key = Key(TERM, number)
        full, answer = keeper.change(key, call).answer, lean.change_lean(key, call).answer

        def fetch(arms, key=key):
            return lean.sketches(key, arms).answer

        if hasattr(full, "sketches"):
            assert answer.sketches.shape == (0, 3, 6)
            answer = type(answer)(known.of(answer.groups, fetch), answer.groups, answer.tree)
        assert plain(answer) == plain(full) == STREAM.answers[number - 1]
        state = lean.ask_lean(key, "state").answer
        assert "sketches" not in state
        groups = lean.memory.arms.groups
        assert digest(state | {"sketches": known.of(groups, fetch)}) == STREAM.states[number]
    assert lean.ask_lean(key, "describe").answer == keeper.describe()
    with pytest.raises(LostError, match=f"knows {N} calls, not {N - 1}"):
        lean.sketches(Key(TERM, N - 1), [0])
    with pytest.raises(LostError, match="another group of workers"):
        lean.sketches(Key(LATER, N), [0])


def staged(keeper, term, sketches):
    def send(at, pieces):
        return keeper.stage(term, sketches.shape, at, *pieces).answer

    return hand_over(sketches, send)


@pytest.fixture
def commit(tmp_path):
    """A state, and the same without sketches, after all calls but two."""
    state = opened(STREAM, tmp_path / "commit", N - 2).state()
    return state, {name: value for name, value in state.items() if name != "sketches"}


def test_a_memory_opens_with_staged_sketches_as_with_its_own(commit, tmp_path):
    state, rest = commit
    keeper = opened(STREAM, tmp_path / "b", 3)
    assert staged(keeper, LATER, state["sketches"])
    for _ in range(2):
        assert keeper.open(STREAM.config, rest, RUN, LATER, True).answer is True
    assert digest(keeper.state()) == digest(state)
    assert digest(TreeKeeper(str(tmp_path / "b")).state()) == digest(state)
    for number, call in enumerate(STREAM.calls[N - 2 :], start=1):
        assert plain(keeper.change(Key(LATER, number), call).answer) == STREAM.answers[N - 3 + number]


def test_it_opens_with_no_others_sketches_and_with_no_part_of_them(commit, tmp_path):
    state, rest = commit
    keeper = opened(STREAM, tmp_path / "b", 3)
    assert staged(keeper, TERM, state["sketches"])
    assert keeper.open(STREAM.config, rest, RUN, LATER, True).answer is False
    keeper.stage(LATER, state["sketches"].shape, 0, b"1234")
    assert keeper.open(STREAM.config, rest, RUN, LATER, True).answer is False
    go_on(keeper, STREAM, 3)  # nothing has changed
    assert staged(keeper, LATER, state["sketches"])
    keeper = TreeKeeper(str(tmp_path / "b"))
    assert keeper.open(STREAM.config, rest, RUN, LATER, True).answer is False  # they went down with its last life
    assert staged(keeper, LATER, state["sketches"])
    assert keeper.open(STREAM.config, rest, RUN, LATER, True).answer is True
    assert digest(keeper.state()) == digest(state)
    with pytest.raises(LostError, match="later group"):
        keeper.stage(TERM, (1, 3, 6), 0, b"1234")


def test_staged_sketches_that_dont_fit_are_refused(commit):
    state, rest = commit
    keeper = TreeKeeper()
    staged(keeper, LATER, state["sketches"][:2])
    with pytest.raises(CheckpointError, match=r"sketches have shape \(2, 3, 6\), need \(4, 3, 6\)"):
        keeper.open(STREAM.config, rest, RUN, LATER, True)


def test_a_stream_goes_on_after_lean_calls(tmp_path):
    keeper = opened(STREAM, tmp_path, 7)
    keeper.ask_lean(Key(TERM, 7), "past")
    go_on(keeper, STREAM, 7)
