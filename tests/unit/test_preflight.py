"""What is looked at before Ray starts: that the folder takes files and has room, and that somebody answers."""

import shutil
import socket
from types import SimpleNamespace

import pytest

from treelora.errors import ConfigError, TreeLoRAError
from treelora_platform import cluster
from treelora_platform.cluster import connect
from treelora_platform.config import ExperimentConfig
from treelora_platform.prepare import FREE_BYTES_NEEDED, check_storage


def config(folder):
    return ExperimentConfig(output_dir=str(folder))


def test_a_folder_that_takes_no_files_is_refused_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir '.*file/runs' can't be written to: Not a directory"):
        check_storage(config(tmp_path / "file" / "runs"))


@pytest.mark.parametrize("free", [0, FREE_BYTES_NEEDED - 1])
def test_a_disk_without_room_is_refused_with_need_and_have(tmp_path, monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    said = rf"has {free / 1e6:.0f} MB free; a run needs {FREE_BYTES_NEEDED / 1e6:.0f} MB"
    with pytest.raises(ConfigError, match=said):
        check_storage(config(tmp_path))


def test_a_folder_with_room_is_left_empty(tmp_path):
    check_storage(config(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


def test_an_address_where_nobody_answers_is_named_at_once(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(
            TreeLoRAError, match=f"RAY_ADDRESS '{address}': nothing answers there .*; is the cluster up"
        ):
            connect(ExperimentConfig())


@pytest.mark.parametrize(
    ("address", "mode", "warned"),
    [
        ("10.0.0.1:6379", None, True),
        ("ray://10.0.0.1:10001", "disabled", True),
        ("[2001:db8::1]:6379", None, True),
        ("10.0.0.1:6379", "token", False),
        ("127.0.0.1:6379", None, False),
        ("ray://[::1]:10001", None, False),
        ("auto", None, False),
    ],
)
def test_a_cluster_that_lets_everybody_in_is_told_of(monkeypatch, caplog, address, mode, warned):
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr(cluster, "_expect_answer", lambda _: None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    connect(ExperimentConfig())
    assert ("without token authentication" in caplog.text) == warned
