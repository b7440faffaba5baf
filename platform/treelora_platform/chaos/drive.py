"""One execution of an experiment under faults: the driver is run, watched, hit, and run again, to the end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from treelora_platform.chaos.account import Hit
from treelora_platform.chaos.inject import Scene, strike
from treelora_platform.chaos.outline import Event, Outline
from treelora_platform.chaos.processes import MARK, Family
from treelora_platform.chaos.schedule import ENDS_DRIVER, Fault
from treelora_platform.chaos.server import TrackingServer
from treelora_platform.chaos.site import Site
from treelora_platform.chaos.story import Command, Story
from treelora_platform.chaos.trigger import Tail, Trigger, is_writing
from treelora_platform.redaction import hide_credentials

POLL_S, CLOSE_POLL_S, RETRY_S = 0.01, 0.001, 0.2
LINGER_S = 30.0
"""What Ray and its guardian need to be gone after their driver."""
OWN_ENDS = 3
"""Drivers that end by themselves before a schedule is given up."""
_ON_PURPOSE = ("ray", "torchinductor_")
_INCOMPLETE = "MLflow is not complete"
_TREELORA = (sys.executable, "-m", "treelora_platform")


@dataclass
class Stage:
    """What a play needs: the configuration's file, the run's folder, a log, and where things run."""

    config: Path
    run_dir: Path
    log: Path
    site: Site
    server: TrackingServer | None
    patience_s: float
    say: Callable[[str], None]


def play(stage: Stage, faults: Sequence[Fault], outline: Outline | None) -> Story:
    """Run an experiment to its end under faults; whatever happens, nothing of it runs afterwards.

    Args:
        stage: What and where.
        faults: To come; without an outline there can be none.
        outline: Of the reference run.
    """
    mark = os.urandom(8).hex()
    family = Family(mark)
    with tempfile.TemporaryDirectory(prefix="tl-", ignore_cleanup_errors=True) as scratch:
        triggers = [Trigger(fault, outline) for fault in faults] if outline else []
        show = _Show(stage, Scene(stage.run_dir, family, stage.site, stage.server), triggers, Path(scratch), mark)
        try:
            story = show.run()
            stayed = family.gone_within(LINGER_S)
        finally:
            family.end()
        story.left_behind = [
            *(f"process {title[:100]!r}" for title in stayed),
            *(f"shared memory {name!r}" for name in family.left_in_memory()),
            *(f"temporary {name!r}" for name in _left_in(Path(scratch))),
        ]
    return story


class _Show:
    def __init__(self, stage: Stage, scene: Scene, triggers: list[Trigger], scratch: Path, mark: str):
        self.stage, self.scene, self.waiting = stage, scene, triggers
        self.environment: Mapping[str, str] = {
            **os.environ, **stage.site.environment, MARK: mark, "TMPDIR": str(scratch), "RAY_TMPDIR": str(scratch)
        }  # fmt: skip
        self.story, self.tail = Story(), Tail(stage.run_dir / "events.jsonl")
        self.events: list[Event] = []
        self.server_back: float | None = None
        self.again_after = 0.0
        self.began = time.monotonic()

    def run(self) -> Story:
        story = self.story
        story.events = self.events
        while not story.ended and (not story.commands or story.commands[-1].code):
            time.sleep(self.again_after)
            story.commands.append(self._command(first=not story.commands))
            if len(story.gave_up) > OWN_ENDS:
                story.ended = "the driver ended by itself time and again"
        self._server_up()
        if not story.ended and _INCOMPLETE in self.stage.log.read_text(encoding="utf-8", errors="replace"):
            self._tell("treelora track, for the points that MLflow lacks")
            story.tracked_later = self._start("track", str(self.stage.run_dir)).wait() == 0
        story.missed = [trigger.fault for trigger in self.waiting]
        return story

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.stage.log.open("ab") as log:
            process = subprocess.Popen(
                [*_TREELORA, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.scene.family.adopt(process.pid)
        return process

    def _command(self, first: bool) -> Command:
        """Run the driver until it ends, for whatever reason."""
        begun, words_from = time.time(), self.stage.log.stat().st_size if self.stage.log.exists() else 0
        process = self._start("run", str(self.stage.config))
        self.scene.driver = psutil.Process(process.pid)
        self.again_after, hits_before = 0.0, len(self.story.hits)
        if first:
            for trigger in self.waiting:
                trigger.begun(time.monotonic())
        heard = looked = time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            heard = now if self._take_events(now) else heard
            self._strike_due(time.monotonic())
            if now - heard > self.stage.patience_s:
                self.story.ended = f"no sign of progress for {self.stage.patience_s:g} s"
                self.scene.family.end()
            if now - looked > 1.0:
                looked = now
                self.scene.family.look()
                self.scene.family.note_memory()
            watching = any(trigger.watching_until is not None for trigger in self.waiting)
            time.sleep(CLOSE_POLL_S if watching else POLL_S)
        self.scene.driver = None
        self._take_events(time.monotonic())
        hit = any(hit.fault.kind in ENDS_DRIVER for hit in self.story.hits[hits_before:])
        words = _last_words(self.stage.log, words_from)
        ended = Command(begun, time.time(), process.returncode, hit, words)
        if ended.code:
            self._tell(f"the driver ended with {ended.code}" + ("" if hit else f" by itself: {words}"))
        return ended

    def _take_events(self, now: float) -> bool:
        new = self.tail.read()
        for event in new:
            self.events.append(event)
            for trigger in self.waiting:
                trigger.see(event, now)
        return bool(new)

    def _strike_due(self, now: float) -> None:
        self._server_back(now)
        writing = any(t.watching_until is not None for t in self.waiting) and is_writing(self.stage.run_dir)
        for trigger in list(self.waiting):
            trigger.look(writing, now)
            if trigger.due_at is None or now < trigger.due_at:
                continue
            pids = strike(trigger.fault, self.scene)
            if not pids:
                trigger.due_at = now + RETRY_S  # not there just now: it is hit when it is
                continue
            fault = trigger.fault
            self.waiting.remove(trigger)
            self.story.hits.append(Hit(fault, time.time(), pids, trigger.exact))
            self._tell(f"{fault.kind}: {fault.where(trigger.outline)}")
            if fault.kind in ENDS_DRIVER:
                self.again_after = fault.pause_s
            elif fault.kind == "mlflow":
                self.server_back = now + fault.pause_s

    def _server_back(self, now: float) -> None:
        if self.server_back is not None and now >= self.server_back and self.stage.server:
            self.server_back = None
            self.stage.server.begin()

    def _tell(self, what: str) -> None:
        self.stage.say(f"  {time.monotonic() - self.began:6.1f} s  {what}")

    def _server_up(self) -> None:
        if self.stage.server:
            self._server_back(float("inf"))
            self.stage.server.wait()


def _last_words(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")]
    return hide_credentials((said or lines or [""])[-1].removeprefix("error: "))[:300]


def _left_in(scratch: Path) -> list[str]:
    """What is in the drivers' temporary folder, but Ray's logs and torch's cache, which they leave on purpose."""
    return sorted(path.name for path in scratch.iterdir() if not path.name.startswith(_ON_PURPOSE))
