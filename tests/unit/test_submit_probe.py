"""What a node finds when it looks around; how several of them do it is in tests/orchestration/test_submit.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from tests.support.web_server import answering
from treelora_platform.submit import probe
from treelora_platform.submit.probe import autoscaler, reachable, see_tokens, seen_paths, shared_folder, tracking_uri
from treelora_platform.submit.submission import Needs

SEARCH = "/api/2.0/mlflow/experiments/search"


def test_a_folder_is_made_and_taken_away_again(tmp_path: Path) -> None:
    with shared_folder(str(tmp_path / "a" / "b")) as found:
        assert Path(found["folder"]).is_dir()
        assert found["free_bytes"] > 0
        (Path(found["folder"]) / "token").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with shared_folder(str(tmp_path / "runs")):
        (tmp_path / "runs" / "another").write_text("x")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["another"]
    with shared_folder(str(tmp_path / "new" / "deep")) as found:
        Path(found["folder"]).with_name("another").write_text("x")
    assert (tmp_path / "new" / "deep" / "another").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with shared_folder(str(tmp_path / "file" / "runs")) as found:
        assert found == {"error": "Not a directory"}


def test_tokens_of_others_are_read_or_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SHARE_S", 0.0)
    for token in ("a", "b"):
        (tmp_path / token).write_text(token)
    (tmp_path / "c").write_text("half")
    assert see_tokens({"shared": str(tmp_path), "tokens": ["a", "b"]}) == {"missing": []}
    assert see_tokens({"shared": str(tmp_path), "tokens": ["a", "c", "d"]}) == {"missing": ["c", "d"]}


def test_a_token_that_comes_a_little_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SHARE_S", 60.0)
    timer = threading.Timer(0.3, (tmp_path / "a").write_text, ["a"])
    timer.start()
    assert see_tokens({"shared": str(tmp_path), "tokens": ["a"]}) == {"missing": []}
    timer.join()


def test_paths_and_uris(tmp_path: Path) -> None:
    there, gone = str(tmp_path), str(tmp_path / "gone")
    found = seen_paths([there, gone, f"file://{there}", "nonsense://x"])
    assert found[there] is True
    assert found[gone] is False
    assert found[f"file://{there}"] is True
    assert "pyarrow knows no file system" in str(found["nonsense://x"])


def test_mlflow_that_answers_refuses_or_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, str, dict[str, str]]] = []
    with answering({SEARCH: (200, {})}, heard) as url:
        assert reachable(url) is None
        assert heard[-1][:2] == ("GET", f"{SEARCH}?max_results=1")
        assert "Authorization" not in heard[-1][2]
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
        assert reachable(f"{url}/") is None
        assert heard[-1][2]["Authorization"] == "Bearer t0ken"
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
        assert reachable(url) is None
        assert heard[-1][2]["Authorization"].startswith("Basic ")
    with answering({SEARCH: (401, "no")}) as url:
        assert reachable(url) == "it answers 401 Unauthorized"
    assert reachable(url) == "connection refused"
    assert reachable("sqlite:////mnt/mlflow.db") is None
    assert reachable(None) is None


def test_where_the_job_will_look_for_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(Needs("/r", tracking_uri="http://m", tracking_base="/r")) == "http://m"
    assert tracking_uri(Needs("/r", tracking_base="/mnt/runs")) == "sqlite:////mnt/runs/mlflow.db"
    assert tracking_uri(Needs("/r")) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://e")
    assert tracking_uri(Needs("/r")) == tracking_uri(Needs("/r", tracking_base="/mnt/runs")) == "http://e"


def test_what_the_launcher_may_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autoscaler() is None
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(Path(__file__).parents[2].joinpath("cluster.yaml").read_text())
    assert autoscaler() == {"kind": "ray up", "most": 2, "types": [{"resources": {"CPU": 48.0, "GPU": 4.0}, "most": 2}]}
    for text in ("[", "[1]", yaml.safe_dump({"available_node_types": [1]})):
        path.write_text(text)
        assert autoscaler() is None
    monkeypatch.setenv("RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    assert autoscaler() == {"kind": "KubeRay"}


BLOCKED = """
import signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})   # as Ray's supervisor starts a driver
from treelora_platform.submit.entry import obey_signals
obey_signals()
try:
    print("ready", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_obeys_the_signals_that_ray_would_block(number: signal.Signals) -> None:
    driver = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout
        assert driver.stdout.readline() == "ready\n"
        driver.send_signal(number)
        assert driver.wait(60) == 130
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [(["run", "nowhere.yaml"], 2, "there is no such file"), (["schema"], 0, '"properties"')],
)
def test_the_entry_point_is_treelora_with_its_exit_codes(
    arguments: list[str], code: int, text: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "treelora_platform.submit.entry", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code
    assert text in done.stdout + done.stderr
