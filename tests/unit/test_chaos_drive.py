"""A driver that is hit, ends by itself, or hangs: played by a small script that writes events as rank 0 does."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support.chaos_events import OUTLINE
from treelora_platform.chaos import drive
from treelora_platform.chaos.drive import OWN_ENDS, Stage, play
from treelora_platform.chaos.processes import title
from treelora_platform.chaos.schedule import Fault
from treelora_platform.chaos.site import LocalSite
from treelora_platform.chaos.story import Story

# Each execution takes the next of the acts that the configuration lists: `work` to the end, `fail`, or `hang`.
SCRIPT = """
import json, os, sys, time
from pathlib import Path

command, path = sys.argv[1:]
if command == "track":
    Path(path, "tracked").touch()
    sys.exit(0)
plan = json.loads(Path(path).read_text())
folder = Path(plan["run_dir"])
folder.mkdir(exist_ok=True)
began = folder / "began"
number = len(began.read_text()) if began.exists() else 0
began.write_text("x" * (number + 1))
(folder / "environment").write_text(os.environ["RAY_ADDRESS"] + " " + os.environ["TMPDIR"])

def event(kind, **fields):
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "kind": kind, **fields}) + "\\n")

act = plan["acts"][min(number, len(plan["acts"]) - 1)]
event("stage", unit=0, task="", what="loading the model")
time.sleep(0.2)
event("begin", steps=[5, 3], units=["red", "green"], global_step=0)
if act == "fail":
    print("error: a worker is gone")
    sys.exit(1)
if act == "hang":
    time.sleep(600)
if act == "litter":
    Path(os.environ["TMPDIR"], "litter").touch()
for unit, steps in enumerate((5, 3)):
    for step in range(1, steps + 1):
        event("step", unit=unit, task="t", step=step, steps=steps)
        time.sleep(0.05)
    event("scored", unit=unit, task="t", scores={})
    event("commit", unit=unit + 1, step=0)
if act == "incomplete":
    print("MLflow is not complete: it is down")
time.sleep(0.2)
"""


@pytest.fixture
def perform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Plays acts under faults; gives the story and what was said."""
    script = tmp_path / "driver.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(drive, "_TREELORA", (sys.executable, str(script)))
    monkeypatch.setattr(drive, "LINGER_S", 0.5)

    def run(acts: list[str], faults: tuple[Fault, ...] = (), patience_s: float = 60.0) -> tuple[Story, str]:
        run_dir, config, said = tmp_path / "run", tmp_path / "config.json", []
        config.write_text(json.dumps({"run_dir": str(run_dir), "acts": acts}))
        stage = Stage(config, run_dir, tmp_path / "log", LocalSite(), None, patience_s, said.append)
        story = play(stage, faults, OUTLINE)
        assert [title(process) for process in psutil.process_iter() if str(script) in title(process)] == []
        return story, "\n".join(said)

    return run


def test_without_faults_one_command_does_it(perform, tmp_path: Path) -> None:
    story, said = perform(["work"])
    assert [command.code for command in story.commands] == [0]
    assert (story.hits, story.missed, story.gave_up, story.ended, story.left_behind, said) == ([], [], [], "", [], "")
    assert len([event for event in story.events if event["kind"] == "step"]) == 8
    address, scratch = (tmp_path / "run" / "environment").read_text().split(" ")
    assert address == ""
    assert not Path(scratch).exists()
    assert 0 < story.seconds < 120


def test_a_driver_that_is_killed_is_started_again(perform) -> None:
    faults = (Fault("driver", "step", 0, 3), Fault("stop", "step", 1, 2, pause_s=0.1))
    story, said = perform(["work"], faults)
    assert [(command.code, command.hit) for command in story.commands] == [
        (-signal.SIGKILL, True), (-signal.SIGTERM, True), (0, False)
    ]  # fmt: skip
    assert [hit.fault for hit in story.hits] == list(faults)
    assert story.gave_up == []
    assert "driver: step 3 of red" in said
    assert "the driver ended with -15" in said
    assert len([event for event in story.events if event["kind"] == "begin"]) == 3


def test_a_driver_that_ends_by_itself_is_told_of(perform) -> None:
    story, said = perform(["fail", "work"])
    assert story.gave_up == ["exit 1: a worker is gone"]
    assert story.ended == ""
    assert [command.code for command in story.commands] == [1, 0]
    assert "the driver ended with 1 by itself: a worker is gone" in said


def test_a_driver_that_always_ends_is_given_up(perform) -> None:
    story, _ = perform(["fail"])
    assert story.ended == "the driver ended by itself time and again"
    assert [command.code for command in story.commands] == [1] * (OWN_ENDS + 1)


def test_a_driver_that_hangs_is_ended(perform) -> None:
    story, _ = perform(["hang"], patience_s=1.0)
    assert story.ended == "no sign of progress for 1 s"
    assert [command.code for command in story.commands] == [-signal.SIGKILL]


def test_what_finds_nothing_to_hit_is_missed(perform) -> None:
    faults = (Fault("worker", "step", 0, 1), Fault("driver", "commit", 0, 77))
    story, _ = perform(["work"], faults)
    assert story.hits == []
    assert story.missed == list(faults)


def test_points_that_mlflow_lacks_are_sent_afterwards(perform, tmp_path: Path) -> None:
    story, said = perform(["incomplete"])
    assert story.tracked_later
    assert (tmp_path / "run" / "tracked").exists()
    assert "treelora track" in said


def test_what_stays_is_told(perform) -> None:
    story, _ = perform(["litter"])
    assert story.left_behind == ["temporary 'litter'"]


@pytest.mark.usefixtures("terminal")
def test_an_interruption_ends_everything(perform) -> None:
    before = set(psutil.Process().children(recursive=True))  # guardians of other tests' Rays, say

    def interrupt() -> None:
        time.sleep(2.0)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        perform(["hang"])
    thread.join()
    left = set(psutil.Process().children(recursive=True)) - before
    assert [title(process) for process in left] == []
