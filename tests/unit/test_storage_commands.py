"""`treelora storage`: runs listed, fetched and pushed, and what is said where that can't be done."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.storage import FailingStore, commit, fetch, folder_store, push, read_files, write_files
from treelora_platform.storage import lease
from treelora_platform.storage.address import of_run
from treelora_platform.storage.commands import storage_app

RUN = {"run.json": b'{"status": "RUNNING"}', **commit("00000002-0000-step000002")}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FailingStore:
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)
    return folder_store(tmp_path / "store")


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(storage_app, arguments)
    return done.exit_code, " ".join((done.stdout + done.stderr).split())


def test_runs_are_listed_fetched_and_pushed(store: FailingStore, tmp_path: Path) -> None:
    here = tmp_path / "there" / "my-run"
    write_files(here, RUN | {"run.json": b'{"status": "FINISHED"}'})
    address = store.address
    assert invoke("push", str(here), "--storage", address) == (0, f"{here} is stored in {address}".replace("\n", " "))
    store.write("broken/index.json", b"{")
    code, said = invoke("list", address)
    assert code == 0
    assert "my-run │ FINISHED │ 00000002-0000-step000002 │ 3 │ 0.0" in said
    assert "broken │ damaged" in said
    for run, options in (("my run", ("--storage", address)), (of_run(address, "my-run"), ())):
        into = tmp_path / f"fetched-{len(options)}"
        assert invoke("fetch", run, *options, "--output-dir", str(into)) == (0, str(into / "my-run"))
        assert read_files(into / "my-run") == read_files(here)


def test_what_cannot_be_fetched_or_pushed_is_said_in_one_line(store: FailingStore, tmp_path: Path) -> None:
    here = tmp_path / "my-run"
    write_files(here, RUN)
    push(store, here, "my-run")
    fetch(store, tmp_path / "old" / "my-run", "my-run")
    write_files(here, RUN | commit("00000003-0000-step000003"))
    push(store, here, "my-run")
    cases: dict[tuple[str, ...], str] = {
        ("fetch", "none", "--storage", store.address): "has no run 'none'; `treelora storage list` says which",
        ("fetch", "none"): "give a run's name and --storage, or one address of both",
        ("push", str(tmp_path / "old" / "my-run"), "--storage", store.address): "has something newer",
        ("push", str(tmp_path / "empty")): "no run is there",
        ("list", "s3://a:b@c"): "the storage has credentials in it",
    }
    for arguments, message in cases.items():
        code, said = invoke(*arguments)
        assert code == 2
        assert said.startswith("error: ")
        assert message in said
