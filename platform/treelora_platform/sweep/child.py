"""The process of a trial as the actor that began it sees it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from treelora_platform.sweep.trial import files

START_S = 120.0
POLL_S = 0.1


class Child:
    """A trial's process; see `trial` for why it isn't a child in the sense of the operating system."""

    def __init__(self, job: Path, settings: dict[str, Any], environment: dict[str, str]):
        """Start it.

        Raises:
            RuntimeError: it didn't start.
        """
        self.log = job.with_suffix(".log")
        self.pid_file, self.exit_file = files(job)
        job.parent.mkdir(parents=True, exist_ok=True)
        for old in (self.pid_file, self.exit_file):
            old.unlink(missing_ok=True)
        job.write_text(json.dumps(settings | {"parent": os.getpid()}), encoding="utf-8")
        with self.log.open("a", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, "-m", "treelora_platform.sweep.trial", str(job)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=START_S,
                check=False,
            )
        end = time.monotonic() + START_S
        while not self.pid_file.exists():
            if time.monotonic() > end:
                raise RuntimeError(last_words(self.log))
            time.sleep(POLL_S)
        self.process = _process(int(self.pid_file.read_text()))

    def poll(self) -> int | None:
        """The exit code, or None while it runs; 1 where it was killed."""
        if self.process and self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            return None
        return int(self.exit_file.read_text()) if self.exit_file.exists() else 1

    def end(self, patience_s: float) -> None:
        """End it, gently first."""
        for number, patience in ((signal.SIGINT, patience_s), (signal.SIGKILL, 5.0)):
            end = time.monotonic() + patience
            with contextlib.suppress(psutil.NoSuchProcess):
                if self.process and self.poll() is None:
                    self.process.send_signal(number)
            while self.poll() is None and time.monotonic() < end:
                time.sleep(POLL_S)


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None  # it has ended already


def last_words(log: Path) -> str:
    """The error that a trial ended with."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")]
    return (said[-1].removeprefix("error: ") if said else " / ".join(lines[-3:])) or f"ended without a word ({log})"
