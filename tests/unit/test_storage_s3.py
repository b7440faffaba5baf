"""Storages on a real S3 server, with a wire that is cut or held: what people are told, and what is there afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.s3 import CREDENTIALS, S3, s3_server
from tests.support.storage import commit, fetch, push, write_files
from treelora.errors import LostError
from treelora_platform.storage import objects
from treelora_platform.storage.folder import StoredFolder
from treelora_platform.storage.index import sha256
from treelora_platform.storage.objects import ObjectStore, StorageError, UnreachableError, connect, open_storage
from treelora_platform.storage.snapshot import look
from treelora_platform.storage.writer import Writer

FIRST = {"run.json": b"1", **commit("00000002-0000-step000002", os.urandom(1 << 20))}
SECOND = {"run.json": b"2", "empty": b"", **commit("00000004-0000-step000004", os.urandom(3 << 20))}


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as found:
        yield found


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "SILENCE_S", 1)
    server.wire.bytes_left = None
    server.wire.set("up")
    yield server
    server.wire.set("up")


def test_objects_are_written_read_listed_and_removed(s3: S3) -> None:
    bucket = s3.bucket()
    store = open_storage(s3.address(bucket))
    assert store.names() == []  # nothing is left of the look at whether it answers
    assert store.read("a/b") is None
    for name, data in {"a/b": b"1", "a/c": b"", "a/d/e": b"2"}.items():
        store.write(name, data)
        assert store.read(name) == data
    store.write("a/b", b"other")
    assert store.read("a/b") == b"other"
    assert (store.names(), store.names("a"), store.names("none")) == (["a"], ["b", "c", "d"], [])
    store.remove("a/b")
    store.remove("a/b")
    assert (store.read("a/b"), store.names("a")) == (None, ["c", "d"])
    assert store.written_at("none") is None
    written = store.written_at("a/c")
    assert written
    assert written <= (open_storage(s3.address(bucket)).written_at("a/c") or 0)
    assert s3.files(bucket).open_input_stream("runs/a/d/e").read() == b"2"


def test_a_bucket_may_be_a_storage_itself(s3: S3, tmp_path: Path) -> None:
    bucket = s3.bucket()
    store = open_storage(s3.address(bucket).replace(f"{bucket}/runs", bucket))
    write_files(tmp_path / "here", SECOND)
    push(store, tmp_path / "here", "run")
    assert fetch(store, tmp_path / "there", "run") == SECOND
    assert s3.files(bucket).get_file_info("run/index.json").is_file


@pytest.mark.parametrize("state", ["refused", "held"])
def test_a_server_that_does_not_answer_is_said_in_one_line(s3: S3, state: str) -> None:
    address = s3.address(s3.bucket())
    s3.wire.set(state)
    with pytest.raises(UnreachableError) as caught:
        open_storage(address)
    said = str(caught.value)
    assert said.startswith(f"storage {address}: ")
    assert said.endswith("while listing it; is the address right, the network up?")
    assert {"refused": "Could not connect to server", "held": "Operation too slow"}[state] in said
    assert "\n" not in said
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in said


def test_a_storage_that_says_nothing_at_all_is_given_up(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "OPEN_S", 0.3)
    s3.wire.set("held")
    with pytest.raises(UnreachableError, match=r"no answer within 0\.3 s"):
        open_storage(s3.address("any"))


def test_a_missing_bucket_is_said(s3: S3) -> None:
    with pytest.raises(StorageError, match=r"there is no such bucket; make it first$"):
        open_storage(s3.address("no-such-bucket"))
    with pytest.raises(StorageError, match=r"there is no such bucket; make it first$"):
        connect(s3.address("no-such-bucket")).write("a", b"1")


def test_wrong_credentials_are_said(s3: S3) -> None:
    with s3_server(INITIAL_NO_AUTH_ACTION_COUNT="1") as strict:
        address = strict.address(strict.bucket())
        with pytest.raises(
            StorageError, match=r"access denied while listing it; the credentials .* must allow"
        ) as caught:
            open_storage(address)
    assert not isinstance(caught.value, LostError)  # another try would be refused as well


def test_an_unknown_host_is_said() -> None:
    with pytest.raises(StorageError, match=r"Could not resolve host: nowhere\.invalid while listing it"):
        open_storage("s3://bucket/runs?region=us-east-1&endpoint_override=nowhere.invalid:9000")


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"not a directory \(.*\) while"):
        open_storage((tmp_path / "file" / "runs").as_uri())


@pytest.mark.parametrize("mebibytes", [0, 0.5, 1.5, 2.9, 3.05, 9])
def test_an_upload_that_is_cut_leaves_a_whole_state(s3: S3, tmp_path: Path, mebibytes: float) -> None:
    store = connect(s3.address(s3.bucket()))
    here = tmp_path / "here"
    write_files(here, FIRST)
    writer = push(store, here)
    write_files(here, SECOND)
    s3.wire.bytes_left = int(mebibytes * 2**20) + 1
    try:
        done = writer.push(look(here))
    except StorageError:
        done = False
    assert done == (mebibytes == 9)
    s3.wire.bytes_left = None
    s3.wire.set("up")
    assert fetch(store, tmp_path / "there") == (SECOND if done else FIRST)
    assert writer.push(look(here))  # the same writer goes on
    assert fetch(store, tmp_path / "there") == SECOND


def test_what_is_sent_again_after_a_cut_is_what_was_not_sent(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = connect(s3.address(s3.bucket()))
    here = tmp_path / "here"
    write_files(here, {f"part-{i}": os.urandom(1 << 20) for i in range(16)})
    sent: list[str] = []
    write = ObjectStore.write

    def counting(self: ObjectStore, name: str, data: bytes) -> None:
        write(self, name, data)
        sent.append(name)

    monkeypatch.setattr(ObjectStore, "write", counting)
    writer = Writer(StoredFolder(store, "run"), here)
    s3.wire.bytes_left = 10 << 20
    with pytest.raises(StorageError):
        writer.push(look(here))
    s3.wire.set("up")
    before = len(sent)
    assert 0 < before <= 10
    assert writer.push(look(here))
    assert len(sent) == len(set(sent)) == 16 + 1  # each piece once, and the index


def test_nothing_stored_holds_credentials(s3: S3, tmp_path: Path) -> None:
    bucket = s3.bucket()
    address = s3.address(bucket)
    write_files(tmp_path / "here", {"config.yaml": f"storage: {address}".encode()})
    push(connect(address), tmp_path / "here", "run")
    files = s3.files(bucket)
    from pyarrow.fs import FileSelector

    stored = [info for info in files.get_file_info(FileSelector("", recursive=True)) if info.is_file]
    assert {info.base_name for info in stored} == {"index.json", sha256(f"storage: {address}".encode())}
    for info in stored:
        content = files.open_input_stream(info.path).read()
        assert not [secret for secret in CREDENTIALS.values() if secret.encode() in content and secret != "true"]
    assert urlsplit(address).username is None
