"""Tracking against real MLflow: a SQLite store, and a server that is killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.support.run_dir import LAYERS, START_MS, SyntheticRun, finished_run
from tests.support.waiting import wait_for
from treelora.errors import DataError
from treelora_platform.run_points import Point
from treelora_platform.spool import BATCH
from treelora_platform.tracking import (
    MlflowServer,
    TrackingError,
    Uploader,
    finish_run,
    replay,
    resolve_tracking_uri,
    start_run,
)

NAMES = ["alpha", "beta", "gamma"]


class Server:
    """`mlflow server` on a free port of the loopback address; the same database before and after a kill."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self, within_s=180):
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"),
            *("--artifacts-destination", f"{self.folder}/files"),
        ]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)
        wait_for(lambda: self.healthy() or self.process.poll() is not None, within_s, "the server")
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]

    def healthy(self):
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def signal(self, number):
        os.killpg(self.process.pid, number)  # the group that `start` made: the server and its worker

    def kill(self):
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One SQLite store for the tests that need no server: creating it takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def history(uri, run_id, key):
    """(step, time, value) of every point that the store has, by step."""
    points = MlflowServer(uri).client.get_metric_history(run_id, key)
    return sorted((p.step, p.timestamp, p.value) for p in points)


def expected_losses(last):
    return [(g, START_MS + 1000 * g, 4 / g) for g in range(1, last + 1)]


def test_default_store_lies_beside_the_runs(tmp_path):
    assert resolve_tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_tracking_uri("http://host", tmp_path) == "http://host"


def test_a_whole_run_in_sqlite(tmp_path, database):
    run = finished_run(tmp_path / "run", NAMES)
    params = {
        "method": "treelora",
        "lora": {"rank": 8, "target_modules": ["q_proj"]},
        "model.name": "m" * 900,
        "stream.path": "s3://user:hunter2@host/bucket",
        "stream.options.endpoint": "free-form",
        "output_dir": "a path",
        "tracking.uri": "http://u:p@h",
        "model.hub_token": "secret",
        "evaluation.max_new_tokens": 64,
        "cluster.password": "secret",
    }
    tags = {"team": "a", "api_key": "k"}
    run_id = start_run(database, "exp", "first", params, tags, run_dir=run.path)

    uploader = Uploader(run.path, database, run_id)
    uploader.notify()
    assert uploader.close(60)
    (run.path / "report.html").write_text("<p>report</p>")
    report = finish_run(
        run.path, database, run_id, "FINISHED",
        [run.path / "config.yaml", run.path / "tables", run.path / "tree", run.path / "report.html"],
    )  # fmt: skip
    assert (report.sent, report.error, report.run_id) == (True, None, run_id)

    client = MlflowServer(database).client
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "first"
    assert stored.data.params == {
        "evaluation.max_new_tokens": "64",
        "method": "treelora",
        "lora.rank": "8",
        "lora.target_modules": '["q_proj"]',
        "model.name": "m" * 499 + "…",
        "stream.path": "s3://***@host/bucket",
    }
    assert stored.data.tags["team"] == "a"
    assert "api_key" not in stored.data.tags

    assert history(database, run_id, "loss") == expected_losses(18)
    assert history(database, run_id, "tokens_per_second")[0] == (1, START_MS + 1000, 200.0)
    # task beta has one past task; from gamma on the four layers alternate between two
    assert [value for _, _, value in history(database, run_id, "arms/alpha")] == [1.0] * 6 + [0.5] * 6
    assert [step for step, _, _ in history(database, run_id, "arms/beta")] == list(range(13, 19))
    assert "sparsity" not in stored.data.metrics
    # after task a (0, 1, 2) the scores carry the time of its last step: 6, 12, 18
    assert history(database, run_id, "score/last/alpha") == [
        (a, START_MS + 6000 * (a + 1), 90.0 - 10 * a) for a in range(3)
    ]
    assert [value for _, _, value in history(database, run_id, "op/last")] == [90.0, 85.0, 80.0]
    assert [value for _, _, value in history(database, run_id, "bwt/last")] == [0.0, 5.0, 10.0]
    assert stored.data.metrics["final/op/routed"] == pytest.approx(89.0)
    assert stored.data.metrics["final/tokens_per_second"] == 200.0
    assert stored.data.metrics["final/stored_bytes"] == 3300

    assert {file.path for file in client.list_artifacts(run_id)} == {
        "config.yaml",
        "report.html",
        "tables",
        "tree",
    }
    parts = {file.path for file in client.list_artifacts(run_id, "tables/steps")}
    assert len(parts) == 6
    assert "tables/steps/00000001-00000003.parquet" in parts


def test_replay_three_times_changes_nothing(tmp_path, database):
    run = finished_run(tmp_path / "run", NAMES)
    start_run(database, "exp", "again", {}, run_dir=run.path)
    assert finish_run(run.path, None, None, "KILLED").sent
    run_id = json.loads((run.path / "tracking.json").read_text())["run_id"]
    metrics = MlflowServer(database).client.get_run(run_id).data.metrics
    before = {key: history(database, run_id, key) for key in metrics}
    assert before["loss"] == expected_losses(18)
    for _ in range(3):
        assert replay(run.path).sent
    assert {key: history(database, run_id, key) for key in metrics} == before
    assert MlflowServer(database).client.get_run(run_id).info.status == "KILLED"


def test_nothing_doubles_when_the_memory_is_lost_or_steps_are_written_again(tmp_path, database):
    run = SyntheticRun(tmp_path / "run", NAMES)
    run_id = start_run(database, "exp", "resumed", {}, run_dir=run.path)
    run.write_steps(1, 3)
    run.write_steps(4, 6)
    uploader = Uploader(run.path, database, run_id)
    assert uploader.close(60)
    # the run goes back to step 3 and writes parts that are cut elsewhere, with the time of the second attempt
    (run.path / "tables/steps/00000004-00000006.parquet").unlink()
    run.write_steps(4, 8, late_ms=500_000)
    (run.path / "tracking.json").unlink()
    uploader = Uploader(run.path, database, run_id)
    assert uploader.close(60)
    assert [step for step, _, _ in history(database, run_id, "loss")] == list(range(1, 9))
    assert history(database, run_id, "loss")[:6] == expected_losses(6)
    state = json.loads((run.path / "tracking.json").read_text())
    assert state["steps_until"] == 8


def test_starting_again_continues_the_same_run(tmp_path, database):
    run = finished_run(tmp_path / "run", NAMES)
    run_id = start_run(database, "exp", "one", {"seed": 1}, run_dir=run.path)
    finish_run(run.path, database, run_id, "KILLED")
    assert start_run(database, "exp", "one", {"seed": 1, "method": "treelora"}, run_dir=run.path) == run_id
    stored = MlflowServer(database).client.get_run(run_id)
    assert stored.info.status == "RUNNING"
    assert stored.data.params == {"seed": "1", "method": "treelora"}
    assert json.loads((run.path / "tracking.json").read_text())["finish"] is None


def test_runs_that_make_the_database_at_the_same_time(tmp_path):
    code = (
        "import sys; from treelora_platform.tracking import start_run\n"
        f"sys.stdin.readline(); print(start_run('sqlite:///{tmp_path}/mlflow.db', 'together', 'run', {{}}))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    said = [run.communicate(timeout=300)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(set(said)) == 3
    client = MlflowServer(f"sqlite:///{tmp_path}/mlflow.db").client
    assert {run.info.run_id for run in client.search_runs(["1"])} == set(said)


def test_children_know_their_parent(tmp_path, database):
    parent = start_run(database, "exp", "sweep", {"sweep.trials": 2}, base=tmp_path)
    child = start_run(database, "exp", "trial", {}, {}, parent, base=tmp_path)
    assert MlflowServer(database).client.get_run(child).data.tags["mlflow.parentRunId"] == parent


def test_more_points_than_one_request_takes(tmp_path, database):
    run = SyntheticRun(tmp_path / "run", NAMES, steps_per_task=200)
    run.write_steps(1, 600)
    run_id = start_run(database, "exp", "long", {}, run_dir=run.path)
    uploader = Uploader(run.path, database, run_id)
    assert uploader.close(60)
    assert BATCH < 600 * 6
    assert history(database, run_id, "loss") == expected_losses(600)
    assert len(history(database, run_id, "arms/alpha")) == 400


def test_a_killed_server_neither_stops_training_nor_loses_a_point(tmp_path, server):
    run = SyntheticRun(tmp_path / "run", NAMES)
    run_id = start_run(server.uri, "outage", "run", {"seed": 0}, run_dir=run.path)
    uploader = Uploader(run.path, server.uri, run_id)
    run.write_steps(1, 3)
    uploader.notify()
    wait_for(lambda: len(history(server.uri, run_id, "loss")) == 3, 90, "three losses")

    server.kill()
    longest = 0.0
    for first in range(4, 19, 3):
        run.write_steps(first, first + 2)
        began = time.perf_counter()
        uploader.notify()
        longest = max(longest, time.perf_counter() - began)
    wait_for(lambda: uploader.last_error is not None, 90, "an error")
    assert longest < 1

    server.start()
    assert uploader.close(60)
    assert uploader.last_error is None
    assert history(server.uri, run_id, "loss") == expected_losses(18)
    assert finish_run(run.path, server.uri, run_id, "FINISHED", [run.path / "config.yaml"]).sent
    client = MlflowServer(server.uri).client
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.yaml"]


def test_a_server_that_hangs_does_not_hold_anybody(tmp_path, server):
    run = SyntheticRun(tmp_path / "run", NAMES)
    run_id = start_run(server.uri, "hang", "run", {}, run_dir=run.path)
    run.write_steps(1, 3)
    uploader = Uploader(run.path, server.uri, run_id)
    server.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(100):
            uploader.notify()
        assert uploader.close(1.0) is False
        assert time.monotonic() - began < 8  # a request that hangs takes 10 s
    finally:
        server.signal(signal.SIGCONT)
    assert replay(run.path).sent
    assert history(server.uri, run_id, "loss") == expected_losses(3)


def test_a_server_that_is_down_at_the_start(tmp_path):
    server = Server(tmp_path)  # its port is free: nobody listens
    run = finished_run(tmp_path / "run", NAMES)
    assert start_run(server.uri, "late", "run", {"seed": 7}, run_dir=run.path) is None
    report = finish_run(run.path, server.uri, None, "FINISHED", drain_s=1)
    assert (report.sent, report.hint) == (False, f"treelora track {run.path}")
    database = f"sqlite:///{tmp_path}/server.db"
    # the same plan is sent to whatever address replay is given; twice must not open two runs
    first = replay(run.path, database)
    assert first.sent
    state = json.loads((run.path / "tracking.json").read_text())
    (run.path / "tracking.json").write_text(json.dumps(state | {"run_id": None}))
    assert replay(run.path, database).run_id == first.run_id
    assert history(database, first.run_id, "loss") == expected_losses(18)
    assert MlflowServer(database).client.get_run(first.run_id).data.params == {"seed": "7"}


def test_without_a_run_directory_an_unreachable_server_is_an_error(tmp_path):
    with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:\d+: "):
        start_run(Server(tmp_path).uri, "exp", "run", {})


def test_faults_of_the_memory_are_named(tmp_path):
    run = SyntheticRun(tmp_path / "run", NAMES)
    with pytest.raises(DataError, match="has no MLflow run"):
        replay(run.path)
    (run.path / "tracking.json").write_text("{")
    with pytest.raises(DataError, match=r"tracking\.json: can't be read"):
        replay(run.path)
    report = finish_run(run.path, None, "some-id", "FAILED")
    assert report.sent is False
    assert "tracking.json" in report.error


def test_credentials_are_not_written_down(tmp_path, monkeypatch):
    run = SyntheticRun(tmp_path / "run", NAMES)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    port = Server(tmp_path).port
    start_run(f"http://ada:hunter2@127.0.0.1:{port}", "exp", "run", {}, run_dir=run.path)
    assert "hunter2" not in (run.path / "tracking.json").read_text()
    with pytest.raises(DataError, match="MLFLOW_TRACKING_URI"):
        replay(run.path)


def test_a_request_whose_answer_was_lost_is_sent_again_without_harm(tmp_path, database):
    run_id = start_run(database, "exp", "lost answer", {}, base=tmp_path)
    points = [Point("loss", value, START_MS + step, step) for step, value in enumerate([1.0, float("nan"), 3.0])]
    for sent in (points[:2], points, points):
        MlflowServer(database).log(run_id, sent)
    assert [(step, time) for step, time, _ in history(database, run_id, "loss")] == [
        (step, START_MS + step) for step in range(3)
    ]


def test_a_damaged_part_is_reported_and_the_rest_waits(tmp_path, database):
    run = SyntheticRun(tmp_path / "run", NAMES)
    run_id = start_run(database, "exp", "damaged", {}, run_dir=run.path)
    run.write_steps(1, 3)
    part = run.path / "tables/steps/00000004-00000006.parquet"
    part.write_bytes(b"PAR1 half a file")
    uploader = Uploader(run.path, database, run_id)
    uploader.notify()
    wait_for(lambda: uploader.last_error is not None, 90, "an error")
    assert part.name in uploader.last_error
    run.write_steps(4, 6)
    assert uploader.close(60)
    assert history(database, run_id, "loss") == expected_losses(6)


def test_arms_are_shares_of_layers(tmp_path, database):
    run = SyntheticRun(tmp_path / "run", ["a b", "../c", "日本", "d"])
    run.write_steps(1, 24)
    run_id = start_run(database, "exp", "arms", {}, run_dir=run.path)
    uploader = Uploader(run.path, database, run_id)
    assert uploader.close(60)
    keys = [key for key in MlflowServer(database).client.get_run(run_id).data.metrics if key.startswith("arms/")]
    assert len(keys) == 3
    assert "arms/a-b" in keys
    total = dict.fromkeys(range(7, 25), 0.0)
    for key in keys:
        for step, _, share in history(database, run_id, key):
            assert share * LAYERS == int(share * LAYERS)
            total[step] += share
    assert set(total.values()) == {1.0}
