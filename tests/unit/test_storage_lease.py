"""One driver a run, on whichever machine: who gets the lease, who is refused, and who has lost it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.storage import FailingStore, folder_store
from tests.support.waiting import wait_for
from treelora_platform.storage import lease as lease_file
from treelora_platform.storage.lease import LEASE, Lease, LeaseError
from treelora_platform.storage.objects import StorageError

RENEW, LASTS, SETTLE = 0.1, 1.0, 0.2


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"RENEW_S": RENEW, "LASTS_S": LASTS, "SETTLE_S": SETTLE}.items():
        monkeypatch.setattr(lease_file, name, seconds)


class Machine:
    """A folder of a run on a machine of its own, and its lease."""

    def __init__(self, store: FailingStore, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.store, self.folder = store, folder
        self.lost = threading.Event()
        self.lease = Lease(store, "run", folder, self.lost.set)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    found = [Machine(folder_store(tmp_path / "store"), tmp_path / f"machine-{i}") for i in range(3)]
    yield found
    for machine in found:
        machine.store.answer(None)
        machine.lease.release()


def written(machine: Machine) -> dict[str, object] | None:
    data = machine.store.read(f"run/{LEASE}")
    return json.loads(data) if data else None


def test_a_renewed_lease_is_refused_by_name_of_its_host(machines: list[Machine]) -> None:
    machines[0].lease.acquire()
    with pytest.raises(LeaseError, match=rf"run 'run' in file:.* is being executed on {os.uname().nodename}; wait"):
        machines[1].lease.acquire()
    assert not machines[0].lost.is_set()
    machines[0].lease.release()
    assert written(machines[0]) is None
    machines[1].lease.acquire()
    assert [path.name for path in Path(machines[0].store._root, "run").iterdir()] == [LEASE]


def test_a_lease_that_nobody_renews_runs_out(machines: list[Machine]) -> None:
    gone, other, _ = machines
    gone.lease.acquire()
    gone.lease._stop.set()  # its machine has lost its power
    gone.lease._thread.join()
    begin = time.monotonic()
    other.lease.acquire()
    assert time.monotonic() - begin > LASTS - RENEW
    found = written(other)
    assert found
    assert found["owner"] == other.lease._owner


def test_a_lease_that_ran_out_long_ago_is_taken_at_once(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, other, _ = machines
    gone.lease.acquire()
    gone.lease._stop.set()
    gone.lease._thread.join()
    path = Path(gone.store._root, "run", LEASE)
    hour_ago = path.stat().st_mtime - 3600
    os.utime(path, (hour_ago, hour_ago))
    monkeypatch.setattr(lease_file.time, "monotonic", None)  # nobody waits and counts
    other.lease.acquire()
    assert written(other) != {}


def test_a_killed_process_is_succeeded_at_once_from_its_own_folder(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the folder's lock knows that the process which held it before has ended."""
    gone = machines[0]
    gone.lease.acquire()
    gone.lease._stop.set()
    gone.lease._thread.join()
    successor = Machine(gone.store, gone.folder)
    monkeypatch.setattr(lease_file.time, "monotonic", None)
    successor.lease.acquire()
    monkeypatch.undo()
    successor.lease.release()


def test_who_was_taken_over_is_told_and_leaves_the_others_lease_alone(machines: list[Machine]) -> None:
    slow, other, _ = machines
    slow.lease.acquire()
    slow.store.answer(0)  # out of reach from here
    other.lease.acquire()
    assert not slow.lost.is_set()
    slow.store.answer(None)
    assert slow.lost.wait(10)
    assert slow.lease.lost_to == os.uname().nodename
    slow.lease.release()
    found = written(other)
    assert found
    assert found["owner"] == other.lease._owner


def test_an_outage_that_nobody_used_costs_nothing(machines: list[Machine]) -> None:
    machine = machines[0]
    machine.lease.acquire()
    machine.store.answer(0)
    time.sleep(3 * RENEW)
    machine.store.answer(None)
    before = written(machine)
    wait_for(lambda: written(machine) != before, 10, "a renewal")
    assert not machine.lost.is_set()


def test_of_those_that_begin_at_once_one_is_left(machines: list[Machine]) -> None:
    outcomes: list[str] = []

    def begin(machine: Machine) -> None:
        try:
            machine.lease.acquire()
            outcomes.append("has it")
        except LeaseError:
            outcomes.append("refused")

    threads = [threading.Thread(target=begin, args=(machine,)) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["has it", "refused", "refused"]


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b'{"owner": 1}', b"\xff"])
def test_a_torn_lease_holds_nobody_up(machines: list[Machine], torn: bytes) -> None:
    machines[0].store.write(f"run/{LEASE}", torn)
    machines[0].lease.acquire()
    assert written(machines[0])


def test_a_storage_that_does_not_answer_is_said(machines: list[Machine]) -> None:
    machines[0].store.answer(0)
    with pytest.raises(StorageError, match="Could not connect"):
        machines[0].lease.acquire()
