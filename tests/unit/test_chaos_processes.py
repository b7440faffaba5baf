"""Finding processes that belong to a run, hitting them and no others, and seeing what stays. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.waiting import wait_for
from treelora.errors import ConfigError
from treelora_platform.chaos.inject import Scene, strike
from treelora_platform.chaos.processes import (
    MARK,
    TREE_ACTOR,
    Family,
    is_alive,
    title,
    titled,
    train_workers,
)
from treelora_platform.chaos.schedule import Fault
from treelora_platform.chaos.site import LocalSite

SLEEP = "import time; time.sleep(600)"
# a child that outlives its parent, one of the child's own, and one in another session with another environment
DRIVER = """
import subprocess, sys, time
sleep = "import time; time.sleep(600)"
child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleep}']); {sleep}"
subprocess.Popen([sys.executable, "-c", child])
subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True, env={})
print("ready", flush=True)
time.sleep(600)
"""

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that the test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(code: str, name: str | None = None, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code] if name is None else [name, "-c", code]
        executable = None if name is None else sys.executable
        started.append(subprocess.Popen(command, executable=executable, **options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.fixture
def family() -> Iterator[Family]:
    found = Family(os.urandom(8).hex())
    yield found
    found.end()


def test_a_family_survives_its_driver_and_is_ended(start: Start, family: Family) -> None:
    stranger = start(SLEEP)
    driver = start(DRIVER, stdout=subprocess.PIPE, start_new_session=True)
    family.adopt(driver.pid)
    assert driver.stdout
    assert driver.stdout.readline() == b"ready\n"
    members = wait_for(lambda: found if len(found := family.look()) == 4 else None, 60, "four processes")
    driver.kill()
    driver.wait()
    left = family.look()
    assert {process.pid for process in left} == {process.pid for process in members} - {driver.pid}
    assert len(family.gone_within(0.0)) == 3
    family.end()
    assert family.look() == []
    assert family.gone_within(0.0) == []
    assert stranger.poll() is None


def test_a_process_is_known_by_its_mark(start: Start, family: Family) -> None:
    theirs = start(SLEEP, env=os.environ | {MARK: "another"})
    ours = start(SLEEP, env=os.environ | {MARK: family.mark}, start_new_session=True)
    wait_for(lambda: [process.pid for process in family.look()] == [ours.pid], 60, "the end of all but one")
    family.end()
    assert ours.wait() == -signal.SIGKILL
    assert theirs.poll() is None


def test_a_zombie_is_not_alive(start: Start, family: Family) -> None:
    driver = start("pass", start_new_session=True)
    family.adopt(driver.pid)
    wait_for(lambda: psutil.Process(driver.pid).status() == psutil.STATUS_ZOMBIE, 60, "a zombie")
    assert not is_alive(psutil.Process(driver.pid))
    assert family.gone_within(5.0) == []


def scene(start: Start, tmp_path: Path) -> tuple[Scene, dict[str, subprocess.Popen[bytes]]]:
    """Two workers, of which the second is rank 0, an actor, a driver, and somebody else's worker."""
    family, options = Family(os.urandom(8).hex()), {"start_new_session": True}
    writes = f"import time; file = open({str(tmp_path / 'events.jsonl')!r}, 'a'); time.sleep(600)"
    found = {
        "rank 1": start(SLEEP, "ray::RayTrainWorker", **options),
        "rank 0": start(writes, "ray::RayTrainWorker.run_train_fn", **options),
        "actor": start(SLEEP, "ray::TreeKeeper.change", **options),
        "driver": start(SLEEP, "treelora", **options),
    }
    for process in found.values():
        family.adopt(process.pid)
    found["foreign"] = start(SLEEP, "ray::RayTrainWorker", **options)
    wait_for(lambda: (tmp_path / "events.jsonl").exists(), 60, "the file")
    return Scene(tmp_path, family, LocalSite(), driver=psutil.Process(found["driver"].pid)), found


def test_roles_are_told_by_titles(start: Start, tmp_path: Path) -> None:
    stage, found = scene(start, tmp_path)
    processes = stage.processes()
    assert [process.pid for process in train_workers(processes, tmp_path)] == [found["rank 0"].pid, found["rank 1"].pid]
    assert [process.pid for process in titled(processes, TREE_ACTOR)] == [found["actor"].pid]
    assert title(psutil.Process(found["actor"].pid)).startswith("ray::TreeKeeper.change -c")


@pytest.mark.parametrize(
    ("fault", "victim", "number"),
    [
        (Fault("worker", "step", choice=0.2), "rank 0", signal.SIGKILL),
        (Fault("worker", "step", choice=0.7), "rank 1", signal.SIGKILL),
        (Fault("tree-actor", "step", choice=0.9), "actor", signal.SIGKILL),
        (Fault("driver", "closing", choice=0.9), "driver", signal.SIGKILL),
        (Fault("stop", "start"), "driver", signal.SIGTERM),
    ],
)
def test_each_kind_hits_its_own(start: Start, tmp_path: Path, fault: Fault, victim: str, number: int) -> None:
    stage, found = scene(start, tmp_path)
    assert strike(fault, stage) == (found[victim].pid,)
    assert found[victim].wait(60) == -number
    assert [name for name, process in found.items() if process.poll() is not None] == [victim]
    assert (strike(fault, stage) == ()) == (fault.kind != "worker")


def test_a_stalled_worker_stands_still(start: Start, tmp_path: Path) -> None:
    stage, found = scene(start, tmp_path)
    assert strike(Fault("stall", "step", choice=0.0), stage) == (found["rank 0"].pid,)
    wait_for(lambda: psutil.Process(found["rank 0"].pid).status() == psutil.STATUS_STOPPED, 60, "a stopped worker")
    stage.family.end()
    assert found["rank 0"].wait(60) == -signal.SIGKILL


def test_nothing_to_hit(tmp_path: Path, family: Family) -> None:
    stage = Scene(tmp_path, family, LocalSite())
    for kind in ("worker", "tree-actor", "driver", "stop", "stall", "head", "mlflow"):
        assert strike(Fault(kind, "step"), stage) == ()
    with pytest.raises(ConfigError, match="needs a cluster"):
        strike(Fault("node", "step"), stage)


MAPS = """
import mmap, sys, time
files = [open(path, "r+b") for path in sys.argv[1:]]
maps = [mmap.mmap(file.fileno(), 0) for file in files]
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory as files")
def test_objects_in_shared_memory(family: Family, tmp_path: Path) -> None:
    ours, shared, deleted, foreign = paths = [Path(f"/dev/shm/treelora-test-{os.getpid()}-{n}") for n in range(4)]
    users: list[subprocess.Popen[bytes]] = []

    def use(*found: Path, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", MAPS, *map(str, found)]
        users.append(subprocess.Popen(command, stdout=subprocess.PIPE, **options))
        assert users[-1].stdout
        assert users[-1].stdout.readline() == b"ready\n"
        return users[-1]

    try:
        for path in paths:
            path.write_bytes(b"x" * 4096)
        member = use(ours, shared, deleted, start_new_session=True)
        other = use(shared)
        deleted.unlink()
        family.adopt(member.pid)
        family.note_memory()
        assert family.left_in_memory() == []
        member.kill()
        member.wait()
        assert family.left_in_memory() == [ours.name]  # another process uses the second, the fourth was never ours
        other.kill()
        other.wait()
        assert family.left_in_memory() == [ours.name, shared.name]
        assert foreign.exists()
    finally:
        for user in users:
            user.kill()
            user.wait()
            assert user.stdout
            user.stdout.close()
        for path in paths:
            path.unlink(missing_ok=True)
