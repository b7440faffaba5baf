"""What faults cost, worked by hand, and the tables made of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.support.chaos_events import OUTLINE, WHOLE, begin, commit, scored, step
from tests.support.streams import tiny_config
from treelora_platform.chaos.account import Cost, Hit, costs, steps_again
from treelora_platform.chaos.harness import Outcome, Plan
from treelora_platform.chaos.results import show_results, summary, write_results
from treelora_platform.chaos.schedule import Fault
from treelora_platform.chaos.story import Command, Story

WORKER = Fault("worker", "step", 0, 4)
ACTOR = Fault("tree-actor", "step", 1, 1)
SERVER = Fault("mlflow", "step", 1, 2)

# killed at 12.5 after four steps, the last commit after two: steps 3 and 4 are made again
KILLED = [
    begin(0, 10.0), step(0, 1, 11.0), step(0, 2, 11.5), commit(0, 2, 11.5), step(0, 3, 12.0), step(0, 4, 12.25),
    begin(2, 20.0), step(0, 3, 20.5), step(0, 4, 21.0), commit(0, 4, 21.0), step(0, 5, 21.5), commit(0, 5, 21.5),
    scored(0, 22.0), commit(1, 0, 22.0), step(1, 1, 22.5), step(1, 2, 23.0),
]  # fmt: skip


def hit(fault: Fault, time: float) -> Hit:
    return Hit(fault, time, (1,))


def test_a_worker_that_was_killed() -> None:
    assert costs([hit(WORKER, 12.5)], KILLED, OUTLINE) == [Cost(at_step=4, steps_lost=2, seconds=8.0)]
    assert steps_again(KILLED) == 2


def test_a_step_under_way_is_no_recovery() -> None:
    late = [*KILLED[:6], step(0, 5, 12.75), *KILLED[6:]]
    assert costs([hit(WORKER, 12.5)], late, OUTLINE) == [Cost(4, 3, 8.0)]


def test_of_two_faults_before_one_restart_one_bears_the_steps() -> None:
    found = costs([hit(WORKER, 12.3), hit(Fault("driver", "step"), 12.5)], KILLED, OUTLINE)
    assert [cost.steps_lost for cost in found] == [0, 2]
    assert [cost.seconds for cost in found] == [pytest.approx(8.2), 8.0]


def test_an_actor_that_comes_back_by_itself_costs_the_longest_gap() -> None:
    events = [begin(0, 1.0), *(step(0, n, t) for n, t in ((1, 2.0), (2, 2.5), (3, 2.75), (4, 5.75), (5, 6.0)))]
    # the answer of step 3 was on its way; step 4 had to wait
    assert costs([hit(ACTOR, 2.6)], events, OUTLINE) == [Cost(2, 0, pytest.approx(3.15))]


def test_an_actor_whose_workers_begin_again() -> None:
    assert costs([hit(ACTOR, 12.5)], KILLED, OUTLINE) == [Cost(4, 2, 8.0)]


def test_an_actor_that_came_back_before_a_worker_was_killed() -> None:
    found = costs([hit(ACTOR, 11.1), hit(WORKER, 12.5)], KILLED, OUTLINE)
    assert found[0] == Cost(1, 0, pytest.approx(0.4))
    assert found[1].steps_lost == 2


def test_nobody_waits_for_a_server() -> None:
    found = costs([hit(SERVER, 12.1), hit(WORKER, 12.5)], KILLED, OUTLINE)
    assert found == [Cost(3, 0, pytest.approx(0.15)), Cost(4, 2, 8.0)]


def test_at_the_start_and_at_the_end() -> None:
    before = costs([hit(Fault("driver", "loading"), 5.0)], KILLED, OUTLINE)
    assert before == [Cost(0, 0, 6.0)]
    assert costs([hit(Fault("driver", "closing"), 130.0)], WHOLE, OUTLINE) == [Cost(8, 0, None)]
    assert costs([hit(WORKER, 5.0)], [], OUTLINE) == [Cost(0, 0, None)]


def outcome(name: str, reasons: tuple[str, ...] = ()) -> Outcome:
    hits = [hit(SERVER, 12.1), hit(WORKER, 12.5)]
    story = Story(hits, [Fault("stop", "closing")], [Command(0.0, 13.0, -9, True), Command(13.0, 30.0, 0, False)])
    story.events = KILLED
    return Outcome(
        name, story, OUTLINE, costs(hits, KILLED, OUTLINE), reasons, (SERVER, WORKER, Fault("stop", "closing"))
    )


def test_the_sum_by_hand() -> None:
    found = summary([outcome("a"), outcome("b", ("step 3: differs",))])
    assert found == {
        "schedules": 2, "survived": 1, "faults": 4, "missed": 2, "steps_lost": 4,
        "recovery_median_s": 8.0, "recovery_max_s": 8.0,
    }  # fmt: skip
    assert summary([])["recovery_max_s"] is None


def test_what_is_written_and_shown(tmp_path: Path) -> None:
    outcomes = [outcome("schedule-1"), outcome("schedule-2", ("step 3: differs",))]
    plan = Plan(tiny_config(tmp_path), tmp_path, 2, 3, 5, ("worker", "mlflow", "stop"))
    write_results(tmp_path / "chaos.json", plan, outcomes)
    plain = json.loads((tmp_path / "chaos.json").read_text())
    assert (plain["seed"], plain["summary"]["survived"]) == (5, 1)
    assert [one["reasons"] for one in plain["outcomes"]] == [[], ["step 3: differs"]]
    assert plain["outcomes"][0]["commands"][0]["code"] == -9
    assert plain["outcomes"][0]["drawn"][1]["kind"] == "worker"
    rows = pq.read_table(tmp_path / "faults.parquet").to_pylist()
    assert [(row["schedule"], row["kind"], row["injected"], row["steps_lost"]) for row in rows[:3]] == [
        ("schedule-1", "mlflow", True, 0),
        ("schedule-1", "worker", True, 2),
        ("schedule-1", "stop", False, None),
    ]
    assert [row["survived"] for row in rows] == [True] * 3 + [False] * 3

    shown = io.StringIO()
    show_results(outcomes, Console(file=shown, width=150))
    lines = [line.split() for line in shown.getvalue().splitlines()]
    assert lines[1] == ["1", "mlflow", "step", "2", "of", "green", "3", "0", "0.2", "s", "yes"]
    assert lines[2] == ["worker", "step", "4", "of", "red", "4", "2", "8.0", "s"]
    assert lines[3] == ["stop", "closing", "the", "run", "nothing", "to", "hit"]
    assert (lines[4][0], lines[4][-1]) == ("2", "no")
    assert "1 of 2 schedules survived, 4 faults (2 more found nothing to hit), 4 steps made again" in shown.getvalue()
    assert "recovered in 8.0 s (median), 8.0 s (most)" in shown.getvalue()
