"""Snapshots and journals on disk: cut, flipped, missing, interrupted anywhere; never a wrong state."""

import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.tree_calls import (
    RUN,
    TERM,
    Crash,
    FailingDisk,
    digest,
    go_on,
    make_stream,
    opened,
)
from treelora.errors import CheckpointError, LostError
from treelora_platform import tree_store
from treelora_platform.tree_journal import Term, encode
from treelora_platform.tree_keeper import Key, TreeKeeper
from treelora_platform.tree_store import TreeStore

STREAMS = [
    make_stream(),
    make_stream(seed=1, search="full", noise="pooled", max_arms=2),
    make_stream(seed=2, tasks=5, tree="agglomerative", search="flat_lcb", rebuild_limit=2),
]
N = len(STREAMS[0].calls)
SOON = 5  # changes between snapshots in most of these tests, so that there are several in a task

in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=120)


@pytest.fixture(autouse=True)
def _snapshots_are_frequent(monkeypatch):
    monkeypatch.setattr(tree_store, "MAX_RECORDS", SOON)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # `kill -9` asks for none; the order test looks at it


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Folders of the first stream after each number of calls."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tree_store, "MAX_RECORDS", SOON)
    base = tmp_path_factory.mktemp("clean")
    keeper = opened(STREAMS[0], base / "live")
    for done in range(N + 1):
        if done:
            keeper.change(Key(TERM, done), STREAMS[0].calls[done - 1])
        shutil.copytree(base / "live", base / str(done))
    patch.undo()
    return base


def copied(clean, tmp_path, done):
    folder = tmp_path / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(clean / str(done), folder)


def newest(folder, kind="journal"):
    return max(folder.glob(f"*.{kind}"))


def held(keeper):
    """How many calls the keeper knows, whose state must be right."""
    number = keeper._number
    assert digest(keeper.state()) == STREAMS[0].states[number]
    return number


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("every", [1, 3, 1000])
def test_a_restart_before_every_call_changes_nothing(stream, every, tmp_path, monkeypatch):
    monkeypatch.setattr(tree_store, "MAX_RECORDS", every)
    opened(stream, tmp_path)
    for done in range(len(stream.calls)):
        keeper = TreeKeeper(str(tmp_path))
        assert keeper.whoami().dropped == 0
        assert keeper.whoami().troubles == ()
        go_on(keeper, stream, done, done + 1)
    go_on(TreeKeeper(str(tmp_path)), stream, len(stream.calls))


@in_a_folder
@given(st.integers(0, N), st.floats(0, 1))
def test_cut_anywhere_the_journal_leads_to_a_prefix(clean, tmp_path, done, where):
    folder = copied(clean, tmp_path, done)
    path = newest(folder)
    header = tree_store.read_journal(path).header
    size = path.stat().st_size
    cut = round(size - where * (size - len(header.encoded())))
    with path.open("r+b") as file:
        file.truncate(cut)
    keeper = TreeKeeper(str(folder))
    known = held(keeper)
    assert header.number <= known <= done
    assert (known == done) == (cut == size)
    dropped = keeper.whoami().dropped
    assert path.stat().st_size == cut - dropped
    if known < done:  # those calls were answered: a client that knows of them must not get an older state
        with pytest.raises(LostError, match=f"knows {known} calls, not {done}"):
            keeper.ask(Key(TERM, done), "state")
    go_on(keeper, STREAMS[0], known)
    go_on(TreeKeeper(str(folder)), STREAMS[0], N)


@in_a_folder
@given(st.integers(0, N), st.integers(0, 3), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_flipped_byte_anywhere_is_found_or_harmless(clean, tmp_path, done, which, where, bits):
    folder = copied(clean, tmp_path, done)
    files = sorted(folder.iterdir(), reverse=True)
    path = files[which % len(files)]
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= bits
    path.write_bytes(data)
    keeper = TreeKeeper(str(folder))
    life = keeper.whoami()
    if life.broken:
        with pytest.raises(LostError, match=r"memory is lost: .*; the workers bring it back"):
            keeper.change(Key(TERM, done + 1), STREAMS[0].calls[min(done, N - 1)])
        keeper.open(STREAMS[0].config, None, RUN, TERM)
        go_on(keeper, STREAMS[0], 0)
        return
    known = held(keeper)
    if known < done:
        assert life.dropped
        with pytest.raises(LostError):
            keeper.change(Key(TERM, done + 1), STREAMS[0].calls[min(done, N - 1)])
    elif path == newest(folder, "safetensors"):
        assert life.troubles
    go_on(keeper, STREAMS[0], known)


@pytest.mark.parametrize("done", range(0, N + 1, 4))
def test_a_damaged_snapshot_is_made_anew_from_the_one_before(clean, tmp_path, done):
    folder = copied(clean, tmp_path, done)
    path = newest(folder, "safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    keeper = TreeKeeper(str(folder))
    if done < SOON:  # the only one: nothing leads to it
        assert "differs from the checksum" in keeper.whoami().broken
        return
    assert held(keeper) == done
    (trouble,) = keeper.whoami().troubles
    assert path.name in trouble
    again = TreeKeeper(str(folder))  # it was written anew
    assert again.whoami().troubles == ()
    assert held(again) == done


@pytest.mark.parametrize("done", [2, 7, 13, N])
def test_a_missing_file_is_found_or_harmless(clean, tmp_path, done):
    for name in [path.name for path in sorted(copied(clean, tmp_path, done).iterdir())]:
        folder = copied(clean, tmp_path, done)
        newest_two = {newest(folder).name, newest(folder, "safetensors").name}
        (folder / name).unlink()
        keeper = TreeKeeper(str(folder))
        life = keeper.whoami()
        if life.broken:
            assert name in newest_two
            assert name in life.broken
        else:
            assert held(keeper) == done


def test_journals_that_dont_follow_each_other_are_refused(clean, tmp_path):
    folder, other = copied(clean, tmp_path, 13), clean / "12"
    newest(folder, "safetensors").write_bytes(b"damaged")
    before = sorted(folder.glob("*.journal"))[-2]
    before.write_bytes((other / before.name).read_bytes()[:-40])
    assert "changes are missing" in TreeKeeper(str(folder)).whoami().broken
    shutil.copy(newest(folder), before)
    assert "it belongs to" in TreeKeeper(str(folder)).whoami().broken


@in_a_folder
@given(st.integers(0, 60), st.sampled_from([0.0, 0.3, 0.99]), st.integers(0, 20))
def test_a_crash_at_any_operation_loses_no_answer(tmp_path_factory, operation, part, again):
    stream, patch = STREAMS[0], pytest.MonkeyPatch()
    patch.setattr(tree_store, "MAX_RECORDS", SOON)
    disk, folder = FailingDisk(patch), tmp_path_factory.mktemp("crash") / "tree"
    crashes = iter([operation, again])
    disk.fail_at(next(crashes), part)
    keeper, done, lives = None, -1, 0
    while done < N:
        try:
            if keeper is None:
                lives += 1
                keeper = TreeKeeper(str(folder))
                assert not keeper.whoami().broken
                assert done < 0 or keeper._number in (done, done + 1)  # what was answered is known
            if done < 0:
                keeper.open(stream.config, None, RUN, TERM)
            else:
                go_on(keeper, stream, done, done + 1)
            done += 1
        except Crash:
            keeper = None
            disk.fail_at(next(crashes, -1), part)
    go_on(TreeKeeper(str(folder)), stream, N)
    assert lives >= 2
    assert len(list(folder.iterdir())) <= 4
    patch.undo()


@pytest.mark.parametrize("operation", range(12))
def test_a_full_disk_is_said_and_what_was_answered_is_safe(tmp_path, monkeypatch, operation):
    stream = STREAMS[0]
    keeper = opened(stream, tmp_path, 2)
    disk = FailingDisk(monkeypatch)
    disk.fail_at(operation, part=0.5, full=True)
    answered, error = 2, None
    while error is None:
        try:
            keeper.change(Key(TERM, answered + 1), stream.calls[answered])
            answered += 1
        except CheckpointError as caught:
            error = str(caught)
    assert error.startswith(f"{tmp_path}: the tree's journal can't be written: No space left on device")
    with pytest.raises(LostError, match="No space left"):
        keeper.change(Key(TERM, answered + 1), stream.calls[answered])
    assert not list(tmp_path.glob(".*"))
    disk.fail_at(-1)
    later = TreeKeeper(str(tmp_path))
    assert held(later) in (answered, answered + 1)
    keeper.open(stream.config, None, RUN, TERM)
    go_on(keeper, stream, 0)


def test_thousands_of_steps_leave_little_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_store, "MAX_RECORDS", 700)
    stream = make_stream(tasks=2, steps=2500)
    opened(stream, tmp_path, len(stream.calls) - 1)
    one = max(len(encode(call)) for call in stream.calls[:-1]) + 20
    journals = [path.stat().st_size for path in tmp_path.glob("*.journal")]
    assert len(journals) == 2
    assert 400 * one / 2 < max(journals) <= 700 * one + 1000
    assert len(list(tmp_path.iterdir())) == 4


def test_a_long_journal_makes_a_snapshot_due_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_store, "MAX_RECORDS", 10**6)
    monkeypatch.setattr(tree_store, "MAX_BYTES", 2000)
    long = make_stream(tasks=2, steps=100)
    opened(long, tmp_path, len(long.calls) - 1)
    assert int(newest(tmp_path).stem) > 4
    limit = max(2000, newest(tmp_path, "safetensors").stat().st_size)
    assert all(path.stat().st_size < limit + 300 for path in tmp_path.glob("*.journal"))


def test_an_answer_waits_for_the_disk(tmp_path, monkeypatch):
    keeper, done = opened(STREAMS[0], tmp_path), []

    def noted(name):
        call = getattr(os, name)
        return lambda *args: (done.append((name, *map(str, args[-1:]))), call(*args))[1]

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    keeper.change(Key(TERM, 1), STREAMS[0].calls[0])
    assert [name for name, *_ in done] == ["write", "fsync"]
    for number in range(2, SOON):
        keeper.change(Key(TERM, number), STREAMS[0].calls[number - 1])
    done.clear()
    keeper.change(Key(TERM, SOON), STREAMS[0].calls[SOON - 1])
    assert [name for name, *_ in done] == [*["write", "fsync"] * 3, "replace", "replace", "fsync"]
    targets = [target for name, target in done if name == "replace"]
    assert targets == [str(tmp_path / f"00000002.{kind}") for kind in ("journal", "safetensors")]


def test_opening_leaves_nothing_of_the_term_before(tmp_path):
    keeper = opened(STREAMS[0], tmp_path, 13)
    generation = int(newest(tmp_path).stem) + 1
    keeper.open(STREAMS[0].config, None, RUN, Term((2,)))
    names = {f"{generation:08d}.{kind}" for kind in ("journal", "safetensors")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_nothing_on_disk_is_no_state(tmp_path):
    assert TreeStore(tmp_path / "none").recover() is None
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "old.journal").write_text("not ours")
    assert TreeStore(tmp_path).recover() is None
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "old.journal"}
