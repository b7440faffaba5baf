"""Stored folders on a local store: what was pushed comes back, whatever is cut off, altered or taken over."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.storage import FailingStore, blobs, commit, fetch, folder_store, push, read_files, write_files
from treelora.errors import CheckpointError, ConfigError
from treelora_platform.storage import index as index_file
from treelora_platform.storage.folder import BEFORE, INDEX, LocalState, StoredFolder
from treelora_platform.storage.index import sha256
from treelora_platform.storage.objects import StorageError
from treelora_platform.storage.snapshot import clear_outgoing, look, take
from treelora_platform.storage.writer import FencedError, Writer

BOTH = {"adapters/0000-x/adapter_model.safetensors": b"both"}
FIRST = {"run.json": b"1", **BOTH, "events.jsonl": b"a\n", **commit("00000002-0000-step000002", b"two")}
SECOND = {
    "run.json": b"2",
    "events.jsonl": b"a\nb\n",
    "tables/steps/1-2.parquet": b"rows",
    "empty": b"",
    **BOTH,
    **commit("00000004-0000-step000004", b"four"),
}
THIRD = {"run.json": b"3", **commit("00000006-0000-step000006", b"six")}


@pytest.fixture
def store(tmp_path: Path) -> FailingStore:
    return folder_store(tmp_path / "store")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here" / "run"


def test_a_folder_comes_back_as_it_was(store: FailingStore, here: Path, tmp_path: Path) -> None:
    write_files(here, SECOND)
    for name in (".lock", "ray/x", "tables/half.tmp", "adapters/.adapter-1/y"):  # not of the run's state
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(b"no")
    (here / "link").symlink_to(here / "run.json")
    push(store, here)
    assert fetch(store, tmp_path / "there") == SECOND
    assert not (tmp_path / "there" / "link").exists()


def test_only_what_changed_is_sent_and_only_what_is_needed_is_kept(store: FailingStore, here: Path) -> None:
    write_files(here, FIRST)
    writer = push(store, here)
    first = blobs(store, "run")
    assert first == {sha256(data) for data in FIRST.values()}
    store.made = 0
    assert writer.push(look(here))
    assert store.made == 0  # nothing has changed
    write_files(here, FIRST | {"run.json": b"2"})
    assert writer.push(look(here))
    assert blobs(store, "run") == first | {sha256(b"2")}
    # one blob, the index to be relieved by, the index before, the index, and the listing of what is not needed
    assert store.made == 5
    write_files(here, THIRD)
    assert writer.push(look(here))
    assert blobs(store, "run") == {sha256(data) for data in [*FIRST.values(), b"2", *THIRD.values()]} - {sha256(b"1")}


def test_a_grown_file_shares_its_pieces(
    store: FailingStore, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "GROWING_PIECE_BYTES", 4)
    monkeypatch.setattr(index_file, "PIECE_BYTES", 8)
    write_files(here, {"events.jsonl": b"0123456789", "big": bytes(range(20))})
    writer = push(store, here)
    assert blobs(store, "run") == {
        *map(sha256, (b"0123", b"4567", b"89", bytes(range(8)), bytes(range(8, 16)), bytes(range(16, 20))))
    }
    write_files(here, {"events.jsonl": b"0123456789ab!", "big": bytes(range(20))})
    before = blobs(store, "run")
    writer.push(look(here))
    assert blobs(store, "run") - before == {sha256(b"89ab"), sha256(b"!")}
    assert fetch(store, tmp_path / "there")["events.jsonl"] == b"0123456789ab!"


@pytest.mark.parametrize("late", [False, True])
def test_a_push_cut_off_at_any_call_leaves_a_whole_state(tmp_path: Path, late: bool) -> None:
    """Brute force over the number of calls that the storage answers; `late`: the next is carried out, unanswered."""
    outcomes: list[tuple[bool, bool]] = []
    for calls in itertools.count():
        store = folder_store(tmp_path / f"store-{calls}")
        outcomes.append(cut_off(store, tmp_path / f"here-{calls}", tmp_path / f"there-{calls}", calls, late))
        if store.made <= calls:
            break
    index = 2 + 5 + 1  # reads of the index to go on from and to be relieved by, blobs, the index before
    assert outcomes[:index] == [(False, False)] * index
    assert outcomes[index] == (False, late)
    # to list and remove what nobody needs any more has time
    assert outcomes[index + 1 :] == [(True, True)] * (2 + 1)


def cut_off(store: FailingStore, here: Path, there: Path, calls: int, late: bool) -> tuple[bool, bool]:
    """Push the second state to a storage that answers so many calls: did that succeed, and is it what is found?"""
    for state in ({"old": b"old"}, FIRST):
        write_files(here, state)
        push(store, here)
    write_files(here, SECOND)
    store.answer(calls, late)
    try:
        done = Writer(StoredFolder(store, "run"), here).push(look(here))
    except StorageError:
        done = False
    made = store.made
    store.answer(None)
    found = fetch(store, there)
    assert found in (FIRST, SECOND)
    push(store, here)  # the next writer finds nothing that it would stumble over, and clears up
    assert fetch(store, there) == SECOND
    kept = [*SECOND.values(), *(FIRST.values() if found == FIRST else ())]  # what was cut off is no litter
    assert blobs(store, "run") == {sha256(data) for data in kept if data}
    store.made = made
    return done, found == SECOND


@pytest.mark.parametrize("harm", ["remove", "truncate", "flip", "swap"])
def test_whatever_is_harmed_the_state_before_or_an_error_that_names_it(
    store: FailingStore, here: Path, tmp_path: Path, harm: str
) -> None:
    """Brute force over all objects of a stored folder."""
    for state in (FIRST, SECOND):
        write_files(here, state)
        push(store, here)
    whole = tmp_path / "store"
    objects = [path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()]
    assert len(objects) == 2 + len({*FIRST.values(), *SECOND.values()} - {b""})
    seen = [outcome(whole, tmp_path / str(number), name, harm) for number, name in enumerate(sorted(objects))]
    assert set(seen) == {"first", "second", "error"}  # an adapter that both states need has no other copy


def outcome(whole: Path, folder: Path, name: str, harm: str) -> str:
    """What comes of a stored folder with one object harmed."""
    shutil.copytree(whole, folder / "store")
    path = folder / "store" / name
    data = path.read_bytes()
    harmed = {"truncate": data[:-1], "flip": bytes([data[0] ^ 1]) + data[1:], "swap": b"x" * len(data)}
    path.write_bytes(harmed[harm]) if harm in harmed else path.unlink()
    stored = StoredFolder(folder_store(folder / "store"), "run")
    try:
        stored.bring(folder / "there")
    except CheckpointError as error:
        assert path.name == sha256(b"both")
        assert path.name in str(error)  # noqa: PT017 - one of three outcomes
        assert read_files(folder / "there") == {}
        return "error"
    found = read_files(folder / "there")
    if found == FIRST:
        assert path.name == INDEX or data in SECOND.values()
        assert any(path.name in trouble for trouble in stored.troubles) == (name != f"run/{INDEX}" or harm != "remove")
        return "first"
    assert found == SECOND
    assert path.name == BEFORE or data not in SECOND.values()
    return "second"


def test_a_damaged_blob_is_sent_again_by_who_has_it(store: FailingStore, here: Path, tmp_path: Path) -> None:
    write_files(here, FIRST)
    push(store, here)
    store.write(f"run/blobs/{sha256(b'two')}", b"tw?")
    stored = StoredFolder(store, "run")
    with pytest.raises(CheckpointError, match="is altered"):
        stored.pull(tmp_path / "there")
    Writer(stored, here).push(look(here))
    assert fetch(store, tmp_path / "there") == FIRST


def test_a_snapshot_is_of_its_moment(store: FailingStore, here: Path, tmp_path: Path) -> None:
    write_files(here, FIRST)
    writer = push(store, here)
    write_files(here, SECOND)
    snapshot = take(here, writer.is_known)
    with (here / "events.jsonl").open("ab") as events:
        events.write(b"later\n")
    write_files(here, THIRD)
    shutil.rmtree(here / "checkpoints" / "00000004-0000-step000004")
    assert writer.push(snapshot)
    assert fetch(store, tmp_path / "there") == SECOND
    snapshot.drop()
    assert list((here / ".outgoing").iterdir()) == []
    clear_outgoing(here)
    assert not (here / ".outgoing").exists()


def test_a_snapshot_links_only_what_is_not_stored(store: FailingStore, here: Path) -> None:
    write_files(here, FIRST)
    writer = push(store, here)
    (here / "run.json").unlink()
    (here / "run.json").write_bytes(b"2")
    snapshot = take(here, writer.is_known)
    assert snapshot.folder
    assert [path.read_bytes() for path in snapshot.folder.iterdir()] == [b"2"]
    assert len(snapshot.files) == len(FIRST)


def test_a_writer_that_was_relieved_writes_nothing_more(store: FailingStore, here: Path, tmp_path: Path) -> None:
    write_files(here, FIRST)
    lost = push(store, here)
    fetch(store, tmp_path / "there")
    successor = Writer(StoredFolder(store, "run"), tmp_path / "there")
    successor.claim()
    write_files(here, THIRD)
    with pytest.raises(FencedError, match="another process has taken it over"):
        lost.push(look(here))
    write_files(tmp_path / "there", SECOND)
    assert successor.push(look(tmp_path / "there"))
    assert fetch(store, tmp_path / "elsewhere") == SECOND


def test_what_is_here_is_kept_where_it_is_ahead(store: FailingStore, here: Path, tmp_path: Path) -> None:
    write_files(here, FIRST)
    push(store, here)
    there = tmp_path / "there"
    fetch(store, there)
    write_files(here, SECOND)  # committed while the storage was out of reach
    assert fetch(store, here) == SECOND
    write_files(there, FIRST | {"run.json": b"other"})  # same commit, newer state: stored by another machine
    push(store, there)
    assert fetch(store, here) == SECOND
    write_files(there, THIRD)
    push(store, there)
    assert fetch(store, here) == THIRD


def test_a_run_begun_anew_replaces_all_that_was(store: FailingStore, here: Path, tmp_path: Path) -> None:
    write_files(here, THIRD)
    push(store, here)
    there = tmp_path / "there"
    fetch(store, there)
    write_files(here, FIRST)
    push(store, here, anew=True)
    assert store.read(f"run/{BEFORE}") is None
    assert blobs(store, "run") == {sha256(data) for data in FIRST.values()}
    assert fetch(store, there) == FIRST  # though its commit has the smaller number


def test_a_folder_that_the_storage_does_not_know_is_not_overwritten(
    store: FailingStore, here: Path, tmp_path: Path
) -> None:
    write_files(here, FIRST)
    push(store, here)
    there = tmp_path / "there"
    write_files(there, SECOND)
    with pytest.raises(ConfigError, match=r"holds a run that run in file:.* knows nothing of; move the folder away"):
        fetch(store, there)
    assert read_files(there) == SECOND
    push(folder_store(tmp_path / "another-store"), there)
    with pytest.raises(ConfigError, match="knows nothing of"):
        fetch(store, there)


def test_what_a_killed_pull_left_is_made_whole(store: FailingStore, here: Path, tmp_path: Path) -> None:
    write_files(here, SECOND)
    push(store, here)
    there = tmp_path / "there"
    fetch(store, there)
    state = LocalState.read(there)
    assert state
    replace(state, whole=False).write(there)
    (there / "run.json").unlink()
    (there / "empty").unlink()
    (there / "empty").mkdir()  # a folder where a file goes
    (there / ".incoming-x").mkdir()
    assert fetch(store, there) == SECOND
    assert not list(there.glob(".incoming-*"))
