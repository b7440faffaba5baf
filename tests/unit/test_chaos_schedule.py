"""What is drawn, and when it is due."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chaos_events import LENGTHS, OUTLINE, UNITS, WHOLE, begin, commit, step
from treelora.errors import ConfigError
from treelora_platform.chaos.outline import Outline
from treelora_platform.chaos.schedule import DEFAULT_KINDS, KINDS, Fault, check_kinds, draw
from treelora_platform.chaos.trigger import Tail, Trigger, is_writing


def test_an_outline_by_hand() -> None:
    found = Outline.of(WHOLE, 2, started=100.0, ended=124.25)
    assert (found.units, found.steps, found.commit_every) == (UNITS, (5, 3), 2)
    assert found.lengths_s["start"] == 8.0
    assert found.lengths_s["loading"] == 2.0
    assert found.lengths_s["task-begin"] == 0.5
    assert found.lengths_s["step"] == 0.5
    assert found.lengths_s["scoring"] == 2.0  # of 1.5 and 2.5
    assert found.lengths_s["task-end"] == 0.25
    assert found.lengths_s["closing"] == 5.0
    assert found.committed_steps(0) == [2, 4, 5]
    assert found.committed_steps(1) == [2, 3]
    assert found.global_step(1, 2) == 7
    assert found.total_steps == 8


def test_an_outline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "outline.json"
    assert Outline.load(path) is None
    OUTLINE.save(path)
    assert Outline.load(path) == OUTLINE
    path.write_text("{}")
    assert Outline.load(path) is None


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 5))
def test_the_seed_decides_and_longer_plans_begin_alike(seed: int, schedules: int, faults: int) -> None:
    drawn = draw(seed, schedules, faults, DEFAULT_KINDS, OUTLINE)
    assert drawn == draw(seed, schedules + 3, faults, DEFAULT_KINDS, OUTLINE)[:schedules]
    assert [len(one) for one in drawn] == [faults] * schedules


@given(st.integers(0, 2**31))
def test_faults_lie_in_the_run_and_come_in_its_order(seed: int) -> None:
    order = ("start", "loading", "work", "closing")
    for faults in draw(seed, 4, 6, KINDS, OUTLINE):
        places = [fault.moment if fault.moment in order else "work" for fault in faults]
        assert [order.index(place) for place in places] == sorted(order.index(place) for place in places)
        inside = [fault for fault, place in zip(faults, places, strict=True) if place == "work"]
        assert [fault.unit for fault in inside] == sorted(fault.unit for fault in inside)
        for fault in inside:
            assert 0 <= fault.delay < 1
            if fault.moment == "step":
                assert 1 <= fault.step <= OUTLINE.steps[fault.unit]
            elif fault.moment == "commit":
                assert fault.step in OUTLINE.committed_steps(fault.unit)
            else:
                assert fault.step == 0


def test_every_kind_meets_every_window_before_any_comes_twice() -> None:
    pairs = [
        (f.kind, f.moment) for faults in draw(7, 40, 1, ("worker", "tree-actor", "mlflow"), OUTLINE) for f in faults
    ]
    cards = 6 + 5 + 5
    assert len(set(pairs[:cards])) == cards == len(set(pairs))
    assert set(pairs[cards : 2 * cards]) == set(pairs[:cards])
    assert ("worker", "commit") in pairs
    assert ("worker", "closing") not in pairs


def test_another_seed_is_another_plan() -> None:
    assert draw(0, 3, 3, DEFAULT_KINDS, OUTLINE) != draw(1, 3, 3, DEFAULT_KINDS, OUTLINE)


def test_a_method_that_trains_nothing_has_no_steps_to_hit() -> None:
    frozen = Outline(UNITS, (0, 0), None, LENGTHS)
    moments = {fault.moment for faults in draw(3, 20, 3, ("worker", "driver"), frozen) for fault in faults}
    assert moments == {"start", "loading", "scoring", "task-end", "closing"}


def test_kinds_by_name() -> None:
    assert check_kinds(["stop", "worker", "stop"]) == ("worker", "stop")
    with pytest.raises(ConfigError, match=r"'volcano' is no kind of fault; there are worker, driver, tree-actor"):
        check_kinds(["worker", "volcano"])
    with pytest.raises(ConfigError, match="nothing is no kind"):
        check_kinds([])


def due(fault: Fault, events: list[dict]) -> float | None:
    """When a fault strikes, with one event a second from 1000 on."""
    trigger = Trigger(fault, OUTLINE)
    trigger.begun(999.0)
    for second, event in enumerate(events):
        trigger.see(event, 1000.0 + second)
    return trigger.due_at


def test_windows_open_with_their_events() -> None:
    number = WHOLE.index
    assert due(Fault("driver", "start", delay=0.5), []) == 999 + 4
    assert due(Fault("worker", "loading", delay=0.5), WHOLE) == 1000 + 1
    assert due(Fault("worker", "task-begin", unit=1), WHOLE) == 1000 + number(WHOLE[15])
    assert due(Fault("worker", "step", unit=0, step=3, delay=0.5), WHOLE) == 1000 + 6 + 0.25
    assert due(Fault("worker", "step", unit=1, step=3), WHOLE) == 1000 + 19
    assert due(Fault("worker", "scoring", unit=1, delay=0.25), WHOLE) == 1000 + 21 + 0.25
    assert due(Fault("worker", "task-end", unit=0), WHOLE) == 1000 + 13
    assert due(Fault("driver", "closing", delay=0.5), WHOLE) == 1000 + 23 + 2
    assert due(Fault("driver", "closing"), WHOLE[:-1]) is None
    assert due(Fault("driver", "loading"), []) is None


def test_a_step_made_again_opens_no_window_twice() -> None:
    again = [*WHOLE[:7], begin(2), step(0, 3), *WHOLE[7:]]
    assert due(Fault("worker", "step", unit=0, step=3), again) == 1006


def test_a_commit_is_hit_while_its_folder_is_there() -> None:
    trigger = Trigger(Fault("worker", "commit", unit=0, step=4, delay=0.5), OUTLINE)
    for event in WHOLE[:7]:
        trigger.see(event, 5.0)
        trigger.look(True, 5.0)
    assert trigger.due_at is None
    trigger.see(step(0, 4), 6.0)
    assert trigger.watching_until is not None
    trigger.look(False, 6.1)
    assert trigger.due_at is None
    trigger.look(True, 6.2)
    assert trigger.due_at == pytest.approx(6.21)
    assert trigger.exact
    trigger.see(commit(0, 4), 6.3)
    assert trigger.due_at == pytest.approx(6.21)
    assert trigger.exact


def test_a_commit_that_was_too_quick_is_hit_after_it() -> None:
    trigger = Trigger(Fault("worker", "commit", unit=0, step=4), OUTLINE)
    trigger.see(step(0, 4), 6.0)
    trigger.see(commit(0, 4), 6.5)
    assert (trigger.due_at, trigger.exact) == (6.5, False)
    late = Trigger(Fault("worker", "commit", unit=0, step=4), OUTLINE)
    late.see(step(0, 4), 6.0)
    late.look(False, 600.0)
    assert (late.due_at, late.exact) == (600.0, False)


def test_the_tail_reads_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    first, second = step(0, 1), commit(0, 2)
    path.write_text(json.dumps(first) + "\n" + json.dumps(second)[:10])
    assert tail.read() == [first]
    with path.open("a") as file:
        file.write(json.dumps(second)[10:] + "\n")
    assert tail.read() == [second]
    with path.open("a") as file:
        file.write('{"time": 1, "ki\n\n[]\n"x"\n{"kind": "step"}\n' + json.dumps(first) + "\n")
    assert tail.read() == [first]
    assert tail.read() == []


def test_a_commit_being_written(tmp_path: Path) -> None:
    assert not is_writing(tmp_path)
    (tmp_path / "checkpoints" / "00000002-0000-step000002").mkdir(parents=True)
    assert not is_writing(tmp_path)
    (tmp_path / "checkpoints" / ".writing-x").mkdir()
    assert is_writing(tmp_path)


def test_moments_in_words() -> None:
    assert Fault("driver", "start").where(OUTLINE) == "start"
    assert Fault("driver", "closing").where(OUTLINE) == "closing the run"
    assert Fault("worker", "step", 1, 2).where(OUTLINE) == "step 2 of green"
    assert Fault("worker", "commit", 0, 4).where(OUTLINE) == "commit 4 of red"
    assert Fault("worker", "scoring", 1).where(OUTLINE) == "scoring of green"
    assert Fault("worker", "task-end", 0).where(OUTLINE) == "task-end, red"
