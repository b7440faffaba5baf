"""A run is stored while it goes on: nothing waits for the network, and nothing that was sent is lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.storage import FailingStore, commit, fetch, folder_store, push, read_files, write_files
from tests.support.waiting import wait_for
from treelora.errors import CheckpointError
from treelora_platform.storage import keeper as keeper_file
from treelora_platform.storage.folder import LocalState, StoredFolder
from treelora_platform.storage.keeper import DRIVER, Keeper, shared_ending
from treelora_platform.storage.snapshot import OUTGOING
from treelora_platform.storage.writer import Writer

TOKEN = "token"


class GatedStore(FailingStore):
    """A store whose every call waits at a gate."""

    gate: threading.Event

    def _path(self, name: str) -> str:
        self.gate.wait(60)
        return super()._path(name)


class Run:
    """A run's folder with a keeper."""

    def __init__(self, store: FailingStore, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.told = folder, list[tuple[str, str]]()
        self.keeper = Keeper(
            StoredFolder(store, "run"), folder, TOKEN, lambda kind, what: self.told.append((kind, what))
        )
        self.state: dict[str, bytes] = {}

    def commit(self, step: int) -> None:
        """As the hooks do: the newest two commits are kept."""
        self.state = {
            "events.jsonl": self.state.get("events.jsonl", b"") + b"%d\n" % step,
            **{k: v for k, v in self.state.items() if f"{step - 1:08d}" in k},
            **commit(f"{step:08d}-0000-step{step:06d}", b"state %d" % step),
        }
        write_files(self.folder, self.state)
        self.keeper.notify()


def until(condition: Callable[[], object]) -> None:
    wait_for(condition, 30, "what the keeper does by itself")


@pytest.fixture
def store(tmp_path: Path) -> FailingStore:
    return folder_store(tmp_path / "store")


def test_every_commit_reaches_the_storage_while_the_run_goes_on(store: FailingStore, tmp_path: Path) -> None:
    run = Run(store, tmp_path / "here")
    for step in (1, 2, 3):
        run.commit(step)
        until(lambda: fetch(store, tmp_path / f"there-{step}") == run.state)  # noqa: B023 - called at once
    run.keeper.close()
    assert run.told == []
    state = LocalState.read(run.folder)
    assert state
    assert (state.epoch, state.writing) == (1, 1)


def test_no_commit_waits_for_the_network_and_the_newest_is_what_is_sent(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "store")
    gated = GatedStore(store.address, store._fs, store._root)
    gated.gate = threading.Event()
    gated.gate.set()
    run = Run(gated, tmp_path / "here")
    gated.gate.clear()
    for step in range(1, 20):
        run.commit(step)  # returns though not a byte moves
        assert len(list((run.folder / OUTGOING).iterdir())) <= 2
    assert fetch(store, tmp_path / "there") == {}
    gated.gate.set()
    run.keeper.close()
    assert fetch(store, tmp_path / "there") == run.state
    index = StoredFolder(store, "run").newest()
    assert index
    assert index.number <= 4  # the claim, the first commit, the newest, the end
    assert not (run.folder / OUTGOING).exists()


def test_an_outage_is_told_once_and_made_good(store: FailingStore, tmp_path: Path) -> None:
    run = Run(store, tmp_path / "here")
    run.commit(1)
    until(lambda: fetch(store, tmp_path / "there") == run.state)
    store.answer(0)
    run.commit(2)
    until(lambda: run.keeper._sender.last_error)
    for step in (3, 4):
        run.commit(step)
    assert [kind for kind, _ in run.told] == ["warning"]
    assert "not stored: storage file:" in run.told[0][1]
    assert "Could not connect to server" in run.told[0][1]
    store.answer(None)
    until(lambda: not run.keeper._sender.last_error)
    run.commit(5)
    assert run.told[1:] == [("note", "the run is being stored again")]
    run.keeper.close()
    assert fetch(store, tmp_path / "there") == run.state


@pytest.mark.parametrize("calls", range(8))
def test_a_machine_lost_while_it_sends_costs_no_more_than_what_was_not_sent(
    store: FailingStore, tmp_path: Path, calls: int
) -> None:
    run = Run(store, tmp_path / "lost")
    run.commit(1)
    until(lambda: fetch(store, tmp_path / "there") == run.state)
    before = run.state
    store.answer(calls)
    run.commit(2)
    until(lambda: run.keeper._sender.last_error or store.made > calls or fetch_quietly(store) == 2)
    run.keeper._sending.fenced = "its power is gone"
    store.answer(None)
    found = fetch(store, tmp_path / "other")
    assert found in (before, run.state)
    other = Run(store, tmp_path / "other")
    other.state = found
    other.commit(3)
    other.keeper.close()
    assert fetch(store, tmp_path / "there") == other.state


def fetch_quietly(store: FailingStore) -> int:
    """Number of the state that a reader who isn't counted finds."""
    index = StoredFolder(folder_store(Path(store._root)), "run").newest()
    return index.number if index else 0


def test_an_end_that_cannot_be_stored_is_said_by_the_driver_where_it_shares_the_folder(
    store: FailingStore, tmp_path: Path
) -> None:
    run = Run(store, tmp_path / "here")
    (run.folder / DRIVER).write_text(TOKEN)
    store.answer(0)
    run.commit(1)
    run.keeper.close(timeout_s=0.5)
    assert shared_ending(run.folder, TOKEN)
    assert not shared_ending(run.folder, "another attempt's")


def test_an_end_that_cannot_be_stored_says_where_the_run_is(store: FailingStore, tmp_path: Path) -> None:
    run = Run(store, tmp_path / "here")
    (run.folder / DRIVER).write_text("another driver's")
    store.answer(0)
    run.commit(1)
    with pytest.raises(CheckpointError) as caught:
        run.keeper.close(timeout_s=0.5)
    for part in (str(run.folder), os.uname().nodename, f"treelora storage push {run.folder}", "Could not connect"):
        assert part in str(caught.value)
    store.answer(None)
    push(store, run.folder)
    assert fetch(store, tmp_path / "there") == run.state


def test_a_snapshot_that_cannot_be_taken_does_not_end_the_run(
    store: FailingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = Run(store, tmp_path / "here")
    with monkeypatch.context() as patched:
        patched.setattr(keeper_file, "take", full)
        run.commit(1)
        run.commit(2)
    assert [kind for kind, _ in run.told] == ["warning"]
    assert "No space left on device" in run.told[0][1]
    run.commit(3)
    assert run.told[1:] == [("note", "the run is being stored again")]
    run.keeper.close()
    assert fetch(store, tmp_path / "there") == run.state


def test_the_end_tells_nobody_of_anything(store: FailingStore, tmp_path: Path) -> None:
    """The file that events go to is closed by then."""
    run = Run(store, tmp_path / "here")
    store.answer(0)
    run.commit(1)
    until(lambda: run.keeper._sender.last_error)
    store.answer(None)
    run.keeper._tell = None  # type: ignore[assignment]
    run.keeper.close()
    assert fetch(store, tmp_path / "there") == run.state


def test_a_keeper_that_was_relieved_says_so_and_stops(store: FailingStore, tmp_path: Path) -> None:
    run = Run(store, tmp_path / "here")
    run.commit(1)
    until(lambda: fetch(store, tmp_path / "there") == run.state)
    before = dict(run.state)
    Writer(StoredFolder(store, "run"), tmp_path / "there").claim()
    run.commit(2)
    until(lambda: run.keeper._sending.fenced)
    run.commit(3)
    run.keeper.close()
    assert [kind for kind, _ in run.told] == ["warning"]
    assert run.told[0][1].endswith("another process has taken it over; nothing more is stored from here")
    assert fetch(store, tmp_path / "elsewhere") == before


def test_a_notice_leaves_time_for_the_last_commit(store: FailingStore, tmp_path: Path) -> None:
    run = Run(store, tmp_path / "here")
    run.commit(1)
    assert run.keeper.flush(30)
    assert fetch(store, tmp_path / "there") == run.state


def test_what_a_killed_keeper_left_is_cleared(store: FailingStore, tmp_path: Path) -> None:
    left = tmp_path / "here" / OUTGOING / "x" / "1"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"y")
    run = Run(store, tmp_path / "here")
    assert not left.exists()
    run.keeper.close()
    assert read_files(run.folder) == {}
