"""What drivers and workers do with a storage, without Ray: bring, hand over, follow, collect."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.storage import FailingStore, commit, fetch, folder_store, push, read_files, write_files
from tests.support.streams import TASKS, tiny_config
from treelora.data.task import Task
from treelora.errors import ConfigError, DataError
from treelora_platform.config import ExperimentConfig, parse_config
from treelora_platform.prepare import run_folder
from treelora_platform.storage import lease, node
from treelora_platform.storage.driver import NoStorage, RunStorage, storage_of
from treelora_platform.storage.folder import StoredFolder
from treelora_platform.storage.follow import EVENTS, Follower, common
from treelora_platform.storage.keeper import ENDED
from treelora_platform.storage.node import on_this_node, tasks_folder
from treelora_platform.storage.objects import StorageError
from treelora_platform.storage.writer import Writer

RUN = {"run.json": b'{"status": "RUNNING"}', **commit("00000002-0000-step000002")}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)
    monkeypatch.setattr(node, "RETRY_S", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> FailingStore:
    return folder_store(tmp_path / "store")


def stored_config(tmp_path: Path, output_dir: str, **changes: Any) -> ExperimentConfig:
    return tiny_config(Path(output_dir), cluster={"storage": (tmp_path / "store").as_uri()}, **changes)


def storage(config: ExperimentConfig) -> RunStorage:
    run_dir = run_folder(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    found = storage_of(config, run_dir)
    assert isinstance(found, RunStorage)
    return found


def test_without_a_storage_nothing_is_done(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    plain = storage_of(config, tmp_path / "tiny")
    assert type(plain) is NoStorage
    job = {"tasks": []}
    prepared = plain.prepared(config)
    with plain.held(), plain.followed():
        plain.bring(False)
        plain.send()
    assert plain.handed_over(job, prepared) is job
    assert on_this_node(job, 0) is job
    assert (plain.collect(False), plain.close(), plain.newest_name()) == (None, None, "")
    assert not (tmp_path / "tiny").exists()


def test_a_storage_is_no_part_of_what_determines_the_result(tmp_path: Path) -> None:
    assert stored_config(tmp_path, str(tmp_path)).digest() == tiny_config(tmp_path).digest()
    with pytest.raises(ConfigError, match=r"cluster.storage: has credentials in it") as caught:
        parse_config({"cluster": {"storage": "s3://key:hunter2@bucket/a"}})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cluster.storage: has credentials in it") as caught:
        parse_config({"cluster": {"storage": "s3://bucket/a?secret_key=hunter2&region=x"}})
    assert "hunter2" not in str(caught.value)


def test_a_node_gets_the_tasks_and_rank_0_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "driver"))
    config = stored_config(tmp_path, "~/runs")
    driver = storage(config)
    prepared = driver.prepared(config)
    write_files(driver.run_dir, RUN)
    driver.send()
    job = driver.handed_over({"tasks": [], "run_dir": "of the driver", "x": 1}, prepared)
    assert json.loads(json.dumps(job["storage"])) == job["storage"]
    for number, rank in ((1, 0), (2, 1)):
        home = tmp_path / f"node-{number}"
        monkeypatch.setenv("HOME", str(home))
        here = on_this_node(job, rank)
        tasks = [Task(**fields) for fields in here["tasks"]]
        assert [task.name for task in tasks] == list(TASKS)
        assert [t.read(split) for t in tasks for split in t.splits] == [
            t.read(split) for t in prepared.stream for split in t.splits
        ]
        assert all(Path(t.path(split)).is_relative_to(home) for t in tasks for split in t.splits)
        assert Path(here["run_dir"]) == home / "runs" / "tiny"
        assert Path(here["cache"]) == home / "runs" / ".cache" / "tokens"
        assert here["x"] == 1
        assert Path(here["run_dir"]).exists() == (rank == 0)
    assert read_files(tmp_path / "node-1" / "runs" / "tiny") == RUN


def test_workers_of_one_node_bring_the_tasks_once(
    store: FailingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    write_files(source, {"0000-a/train.parquet": b"rows"})
    push(store, source, ".tasks/0f")
    pulled = []
    pull = StoredFolder.pull
    monkeypatch.setattr(StoredFolder, "pull", lambda self, into: pulled.append(into) or pull(self, into))
    job = {
        "tasks": [{"splits": {"train": "0000-a/train.parquet"}}],
        "storage": {"address": store.address, "root": str(tmp_path / "node"), "tasks": "0f", "name": "run"},
    }
    threads = [threading.Thread(target=on_this_node, args=(job, rank)) for rank in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pulled == [tasks_folder(tmp_path / "node", "0f")]
    assert read_files(pulled[0]) == {"0000-a/train.parquet": b"rows"}


def test_what_answers_later_is_waited_for(store: FailingStore) -> None:
    store.answer(0)
    calls: list[int] = []

    def ask() -> bytes | None:
        calls.append(1)
        if len(calls) == 3:
            store.answer(None)
        return store.read("x")

    assert node.patiently(ask, 60) is None
    assert len(calls) == 3
    store.answer(0)
    with pytest.raises(StorageError):
        node.patiently(lambda: store.read("x"), 0)


def test_tasks_come_from_the_storage_where_their_source_is_gone(tmp_path: Path) -> None:
    stream = {"source": "jsonl", "path": str(_task_folder(tmp_path)), "order": ["letters"], "options": {}}
    config = stored_config(tmp_path, str(tmp_path / "one"), stream=stream)
    first = storage(config)
    prepared = first.prepared(config)
    first.handed_over({}, prepared)
    record = {"data_hash": prepared.fingerprint(), "config_hash": config.digest()}
    shutil.rmtree(_task_folder(tmp_path))
    other = storage(ExperimentConfig(**config.as_dict() | {"output_dir": str(tmp_path / "two")}))
    with pytest.raises(DataError):
        other.prepared(config)  # the run hasn't begun
    (other.run_dir / "run.json").write_text(json.dumps(record))
    found = other.prepared(config)
    assert found.fingerprint() == prepared.fingerprint()
    assert list(found.stream.names) == ["letters"]
    (other.run_dir / "run.json").write_text(json.dumps(record | {"config_hash": "other"}))
    with pytest.raises(DataError):
        other.prepared(config)


def _task_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    if not folder.exists():
        for split in ("train", "test"):
            path = folder / "letters" / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = ({"prompt": f"p{i}", "answer": "ab"[i % 2]} for i in range(8))
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_events_of_another_node_are_followed(store: FailingStore, tmp_path: Path) -> None:
    driver, other = tmp_path / "driver", tmp_path / "other"
    write_files(driver, {EVENTS: b"0\n"})
    push(store, driver)
    follower = Follower(StoredFolder(store, "run"), driver)
    follower.stop()
    assert (driver / EVENTS).read_bytes() == b"0\n"
    fetch(store, other)
    rank_0 = Writer(StoredFolder(store, "run"), other)
    for text in (b"0\n1\n", b"0\n1\n2\n3\n"):
        write_files(other, {EVENTS: text})
        rank_0.push(_look(other))
        follower.look()
        follower.look()
        assert (driver / EVENTS).read_bytes() == text
    # the machine is lost with event 4, which was seen by nobody; its successor has the state before
    third = tmp_path / "third"
    fetch(store, third)
    write_files(third, {EVENTS: b"0\n1\n2\n3\n5\n"})
    push(store, third)
    follower.look()
    assert (driver / EVENTS).read_bytes() == b"0\n1\n2\n3\n5\n"


def test_events_that_rank_0_writes_here_are_left_to_it(store: FailingStore, tmp_path: Path) -> None:
    driver, other = tmp_path / "driver", tmp_path / "other"
    write_files(driver, {EVENTS: b"0\n"})
    push(store, driver)
    follower = Follower(StoredFolder(store, "run"), driver)
    follower.stop()
    fetch(store, other)
    rank_0 = Writer(StoredFolder(store, "run"), driver)
    rank_0.claim()
    (driver / EVENTS).write_bytes(b"0\n1\n2\n")
    rank_0.push(_look(driver))
    (driver / EVENTS).write_bytes(b"0\n1\n2\n3\n")  # not stored yet when the worker dies
    follower.look()
    assert (driver / EVENTS).read_bytes() == b"0\n1\n2\n3\n"
    fetch(store, other)
    write_files(other, {EVENTS: b"0\n1\n2\n4\n"})
    push(store, other)  # the next rank 0 is elsewhere
    follower.look()
    assert (driver / EVENTS).read_bytes() == b"0\n1\n2\n3\n4\n"


def _look(folder: Path) -> Any:
    from treelora_platform.storage.snapshot import look

    return look(folder)


LINES = st.lists(st.sampled_from((b"a", b"bb", b"")), max_size=6).map(lambda lines: b"\n".join(lines))


@given(LINES, LINES)
def test_common_lines_are_counted_as_one_by_one(one: bytes, other: bytes) -> None:
    expected = 0
    for mine, theirs in zip(one.splitlines(keepends=True), other.splitlines(keepends=True), strict=False):
        if mine != theirs or not mine.endswith(b"\n"):
            break
        expected += len(mine)
    assert common(one, other) == expected


def test_the_end_is_collected_from_another_node_or_is_here(tmp_path: Path) -> None:
    config = stored_config(tmp_path, str(tmp_path / "driver"))
    driver = storage(config)
    store = folder_store(tmp_path / "store")
    write_files(driver.run_dir, RUN)
    driver.send()
    other, later = tmp_path / "other", RUN | commit("00000009-0000-trained000009")
    fetch(store, other, "tiny")
    write_files(other, later)
    push(store, other, "tiny")
    assert driver.newest_name() == "00000009-0000-trained000009"
    assert driver.collect(hurry=False) is None
    assert read_files(driver.run_dir) == later
    shutil.move(tmp_path / "store", tmp_path / "away")
    (tmp_path / "store").write_text("no folder")
    said = driver.collect(hurry=True)
    assert said
    assert "what the workers did last is not here yet" in said
    (driver.run_dir / ENDED).write_text(driver._token)  # rank 0 wrote to this very folder
    assert driver.collect(hurry=True) is None
    assert f"`treelora storage push {driver.run_dir}` sends the rest" in (driver.close() or "")
    assert driver.newest_name() == "00000009-0000-trained000009"


def test_two_drivers_of_one_run_are_not_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    one, two = (storage(stored_config(tmp_path, str(tmp_path / name))) for name in ("one", "two"))
    with one.held(), pytest.raises(ConfigError, match="is being executed on"), two.held():
        raise AssertionError("two drivers")
    with two.held():
        pass


def test_a_driver_that_was_taken_over_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    one = storage(stored_config(tmp_path, str(tmp_path / "one")))
    stopped = threading.Event()
    one._lease._on_lost = stopped.set  # in a real driver: Ctrl-C
    with pytest.raises(ConfigError, match=r"machine-2 has taken run 'tiny' over .* this process has stopped"):
        _work_until(one, stopped, folder_store(tmp_path / "store"))


def _work_until(driver: RunStorage, stopped: threading.Event, store: FailingStore) -> None:
    """Lose the lease to another machine."""
    with driver.held():
        store.write("tiny/lease.json", json.dumps({"owner": "other", "host": "machine-2", "beat": 1}).encode())
        assert stopped.wait(30)
        assert (driver.collect(hurry=True), driver.close()) == (None, None)
        raise KeyboardInterrupt
