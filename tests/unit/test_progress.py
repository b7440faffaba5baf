"""What the driver shows: time left from measured rates, and a file followed while another process writes it."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.waiting import wait_for
from treelora_platform.progress import Eta, Watcher, clock
from treelora_platform.recorder import Recorder


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.4, "0:09"), (75, "1:15"), (59.6, "1:00"), (3600, "1:00:00"), (36061, "10:01:01")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_time_left_by_hand() -> None:
    eta = Eta([10, 10, 20])
    assert eta.left() is None
    eta.stepped(None)  # its seconds aren't known
    assert eta.left() is None
    eta.stepped(2.0)
    eta.stepped(4.0)
    # 37 steps of 3 s; judging is yet unseen, four steps a pair for 1 + 2 + 3 pairs
    assert eta.left() == pytest.approx(37 * 3 + 6 * 4 * 3)
    for _ in range(7):
        eta.stepped(3.0)
    eta.was_judged(0, 5.0)
    assert eta.left() == pytest.approx(30 * 3 + (2 + 3) * 5)
    for _ in range(30):
        eta.stepped(3.0)
    eta.was_judged(1, 10.0)
    assert eta.left() == pytest.approx(3 * 5)
    eta.was_judged(2, 15.0)
    assert eta.left() == 0


def test_time_left_of_a_resumed_run() -> None:
    eta = Eta([10, 10, 20], done_steps=15)  # one unit is learnt and judged
    eta.stepped(1.0)
    assert eta.left() == pytest.approx(24 * 1 + (2 + 3) * 4 * 1)
    assert Eta([4, 4], done_steps=0).judged == 0


def event(kind: str, when: float = 0.0, **fields: Any) -> str:
    return json.dumps({"time": when, "kind": kind, **fields}) + "\n"


def step(number: int, when: float) -> str:
    return event("step", when, unit=0, task="first", step=number, steps=4, loss=1.5)


def follow(path: Path) -> tuple[Watcher, io.StringIO]:
    out = io.StringIO()
    return Watcher(path, Console(file=out, width=200), "treelora"), out


def settled(watcher: Watcher, done: int) -> None:
    wait_for(lambda: watcher._eta and watcher._eta.done_steps == done, 20, f"{done} steps shown")


def test_a_file_that_grows_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(event("warning", what="of an earlier attempt"))
    watcher, out = follow(path)
    with watcher, path.open("a") as file:

        def write(text: str) -> None:
            file.write(text)
            file.flush()

        write(event("begin", 1.0, steps=[4], units=["first"], global_step=0))
        write(step(1, 10.0))
        settled(watcher, 1)
        line = step(2, 12.0)
        write(line[:20])  # half a line: to be waited for
        time.sleep(0.5)
        assert watcher._eta
        assert watcher._eta.done_steps == 1
        write(line[20:])
        settled(watcher, 2)
        assert watcher._eta.left() == pytest.approx(2 * 2.0 + 4 * 2.0)
        write('{"time": 12.5, "ki\n')  # torn by a kill, ended by the next attempt
        write(step(3, 14.0) + event("warning", what="commit passed over"))
        settled(watcher, 3)
        write(event("stage", 20.0, unit=0, task="first", what="teaching the router"))
        write(event("scored", 26.0, unit=0, task="first", scores={"last": 50.0, "routed": 75.25}))
    assert watcher._eta.left() == pytest.approx(2.0)
    assert watcher._eta.judge_seconds == pytest.approx(6.0)
    assert watcher.warnings == ["commit passed over"]
    assert "after first: mean score last 50.0, routed 75.2" in out.getvalue()


def test_no_file_yet(tmp_path: Path) -> None:
    watcher, _ = follow(tmp_path / "events.jsonl")
    with watcher:
        time.sleep(0.3)
        (tmp_path / "events.jsonl").write_text(event("begin", steps=[3, 3], units=["a", "b"], global_step=4))
        settled(watcher, 4)


def test_a_torn_line_is_ended_by_the_next_recorder(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(step(1, 1.0) + '{"time": 12')
    recorder = Recorder(tmp_path, [])
    recorder.event("begin", steps=[1])
    recorder.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines[1] == '{"time": 12'
    assert json.loads(lines[2])["kind"] == "begin"
    again = Recorder(tmp_path, [])
    again.event("begin", steps=[1])
    again.close()
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 4
