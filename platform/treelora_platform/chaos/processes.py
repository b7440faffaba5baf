"""Finding a run's processes, whatever has become of their parents, and seeing that none of them stays."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

MARK = "TREELORA_CHAOS"
"""Environment variable that a driver's descendants inherit."""
TRAIN_WORKER, TREE_ACTOR, CONTROLLER = "ray::RayTrainWorker", "ray::TreeKeeper", "ray::TrainController"
"""How Ray titles its processes, after the class; what is being called may follow."""
HEAD = "gcs_server"
_SHM = Path("/dev/shm")
_POLL_S = 0.2


class Family:
    """The drivers of one schedule and all that grew from them.

    A process belongs to it by its session, by a parent that does, or by the mark in its environment, and then for good:
    a killed driver's children get another parent, and Ray writes titles over environments.
    """

    def __init__(self, mark: str):
        self.mark = mark
        self._sessions: set[int] = set()
        self._known: set[psutil.Process] = set()
        self._strangers: set[psutil.Process] = set()
        self._objects: set[str] = set()

    def adopt(self, driver_pid: int) -> None:
        """A driver, which leads a session of its own, has been started."""
        self._sessions.add(driver_pid)
        self.look()

    def look(self) -> list[psutil.Process]:
        """All that is alive, after a look at what is new."""
        processes = list(psutil.process_iter())
        self._strangers &= set(processes)
        pids = {process.pid for process in self._known if is_alive(process)}
        more = True
        while more:  # a grandchild may be listed before its parent
            more = False
            for process in processes:
                if process not in self._known and self._belongs(process, pids):
                    self._known.add(process)
                    pids.add(process.pid)
                    more = True
        return self.alive()

    def note_memory(self) -> None:
        """Remember which objects in shared memory its members have in use."""
        for process in self.alive():
            self._objects |= _objects_of(process.pid)

    def left_in_memory(self) -> list[str]:
        """Objects in shared memory that it had in use, that are still there, and that nobody uses any more."""
        left = {name for name in self._objects if (_SHM / name).exists()}
        for process in psutil.process_iter() if left else ():
            left -= _objects_of(process.pid)
        return sorted(left)

    def alive(self) -> list[psutil.Process]:
        """Known members that are still there, oldest first."""
        alive = [process for process in self._known if is_alive(process)]
        return sorted(alive, key=lambda process: (process.create_time(), process.pid))

    def gone_within(self, seconds: float) -> list[str]:
        """Wait for the end of all; the command lines of those that stay."""
        end = time.monotonic() + seconds
        while (left := self.look()) and time.monotonic() < end:
            time.sleep(_POLL_S)
        return [title(process) for process in left]

    def end(self) -> None:
        """Kill every member, until there is none."""
        while left := self.look():
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(_POLL_S)  # not `wait_procs`: that would take a driver's exit code from who started it

    def _belongs(self, process: psutil.Process, pids: set[int]) -> bool:
        try:
            if os.getsid(process.pid) in self._sessions or process.ppid() in pids:
                return True
            if process in self._strangers:
                return False
            if process.environ().get(MARK) == self.mark:
                return True
        except (psutil.Error, OSError):
            pass  # gone meanwhile, or another user's
        self._strangers.add(process)
        return False


def _objects_of(pid: int) -> set[str]:
    """Names under the folder of shared memory that a process has mapped; not those that are deleted already."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if f" {_SHM}/" in line)
    return {path[len(f"{_SHM}/") :].split("/")[0] for path in paths if not path.endswith(" (deleted)")}


def is_alive(process: psutil.Process) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def title(process: psutil.Process) -> str:
    """Its command line, which Ray replaces by a title; empty where it is gone."""
    try:
        return " ".join(process.cmdline()).strip() or process.name()
    except psutil.Error:
        return ""


def train_workers(processes: Iterable[psutil.Process], run_dir: Path) -> list[psutil.Process]:
    """Train workers, rank 0 first: it is the one that has the run's events open."""
    events = run_dir / "events.jsonl"
    return sorted(titled(processes, TRAIN_WORKER), key=lambda process: (not _writes(process, events), process.pid))


def titled(processes: Iterable[psutil.Process], start: str) -> list[psutil.Process]:
    """Those that Ray has given a title that begins so, such as `TREE_ACTOR`."""
    return [process for process in processes if title(process).startswith(start) and is_alive(process)]


def heads(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Ray's global control service, the newest last."""
    return [process for process in processes if is_alive(process) and _name(process) == HEAD]


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _writes(process: psutil.Process, path: Path) -> bool:
    try:
        return str(path) in {file.path for file in process.open_files()}
    except (psutil.Error, OSError):
        return False
