"""Reading back from real MLflow: a SQLite store and a server."""

import socket
import time
from pathlib import Path

import pytest

from tests.orchestration.test_tracking import NAMES, Server
from tests.support.mlflow_runs import START_MS, add_run, final_metrics, run_tags
from tests.support.run_dir import finished_run
from treelora.errors import DataError
from treelora_platform import tracking_query
from treelora_platform.experiments.records import ModeScores
from treelora_platform.run_tables import read_steps, read_trees
from treelora_platform.summary import summarise
from treelora_platform.tracking import TrackingError, Uploader, finish_run, start_run
from treelora_platform.tracking_query import History


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def tracked_run(uri, path, experiment):
    """A run as `treelora run` leaves it on the disk and in MLflow."""
    run = finished_run(path, NAMES)
    tags = run_tags("treelora", NAMES)
    run_id = start_run(uri, experiment, "whole", {"method": "treelora", "lora": {"rank": 8}}, tags, run_dir=run.path)
    uploader = Uploader(run.path, uri, run_id)
    assert uploader.close(120)
    parts = [run.path / name for name in ("config.yaml", "run.json", "tables", "tree")]
    assert finish_run(run.path, uri, run_id, "FINISHED", parts).sent
    return run, run_id


def check_whole_run(history, run, run_id, folder):
    """What MLflow gives back is what the run's folder says."""
    (found,) = history.runs("whole runs")
    assert found == history.run(run_id) == history.named("whole")[0]
    summary = summarise(run.path)
    assert found.scores == {m: ModeScores(s.op, s.bwt, s.fwt) for m, s in summary.modes.items()}
    assert (found.method, found.seed, found.tasks, found.status) == ("treelora", 0, tuple(NAMES), "FINISHED")
    assert (found.seconds, found.tokens, found.stored_bytes) == (summary.seconds, summary.tokens, summary.stored_bytes)
    assert found.params == {"method": "treelora", "lora.rank": "8"}
    # after gamma, alpha has lost 20 points of 90
    assert found.task_scores["last"]["alpha"] == 70.0
    assert history.curve(run_id, "loss") == [(step, pytest.approx(4 / step)) for step in range(1, 19)]
    assert history.download(run_id, folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "run.json", "tables", "tree"]
    assert summarise(folder) == summary
    assert read_steps(folder).equals(read_steps(run.path))
    assert read_trees(folder) == read_trees(run.path)


def test_a_whole_run_comes_back_from_sqlite(tmp_path, store):
    run, run_id = tracked_run(store, tmp_path / "run", "whole runs")
    check_whole_run(History(store), run, run_id, tmp_path / "copy")
    assert not any(
        path.name == "tree" for path in History(store).download(run_id, tmp_path / "x", ["tables"]).iterdir()
    )
    nested = History(store).download(run_id, tmp_path / "y", ["tables/scores.parquet", "tables/none.parquet", "a/b"])
    files = [path.relative_to(nested) for path in nested.rglob("*") if path.is_file()]
    assert files == [Path("tables", "scores.parquet")]


def test_a_whole_run_comes_back_from_a_server(tmp_path):
    server = Server(tmp_path)
    server.start()
    try:
        run, run_id = tracked_run(server.uri, tmp_path / "run", "whole runs")
        history = History(server.uri)
        check_whole_run(history, run, run_id, tmp_path / "copy")
        with pytest.raises(DataError, match=r"'nothing' does not exist in http.*; there are: .*'whole runs'"):
            history.runs("nothing")
        for ask in (history.run, lambda unknown: history.curve(unknown, "loss")):
            with pytest.raises(DataError, match=r"no MLflow run '0+' in http"):
                ask("0" * 32)
        with pytest.raises(DataError, match="filter 'rank > 3' is none that MLflow takes"):
            history.runs("whole runs", "rank > 3")
    finally:
        server.kill()
    began = time.monotonic()
    with pytest.raises(TrackingError, match=rf"^MLflow at {server.uri}: can't be reached: .*(refused|reset by peer)$"):
        History(server.uri).runs("whole runs")
    assert time.monotonic() - began < 60  # MLflow's own retries take minutes


def test_runs_come_in_order_by_pages_without_the_parents_of_sweeps(store, monkeypatch):
    parent = add_run(store, "pages", "sweep", tags={"treelora.kind": "sweep", "treelora.sweep": "s"})
    for i in range(7):
        tags = run_tags("ewc", ["a"], i, **{"treelora.sweep": "s", "treelora.trial": f"t{i}"})
        add_run(store, "pages", f"r{i}", {"lora.rank": i}, tags, final_metrics(float(i)), parent=parent,
                status="RUNNING" if i == 6 else "FINISHED")  # fmt: skip
    monkeypatch.setattr(tracking_query, "PAGE", 3)
    found = History(store).runs("pages")
    assert [(run.name, run.trial, run.parent_id) for run in found] == [(f"r{i}", f"t{i}", parent) for i in range(7)]
    assert [run.scores["last"].op for run in found[:6]] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert [run.start_unix_ms for run in found[:2]] == [START_MS + 1000, START_MS + 2000]
    assert [run.name for run in History(store).runs("pages", finished_only=True)] == [f"r{i}" for i in range(6)]
    assert [run.name for run in History(store).runs("pages", "params.`lora.rank` = '4'")] == ["r4"]
    assert History(store).run(parent).is_sweep
    assert "pages" in History(store).experiments()


def test_a_server_that_takes_too_long_for_a_page_is_asked_for_smaller_ones(store, monkeypatch):
    from mlflow.exceptions import MlflowException

    for i in range(12):
        add_run(store, "slow", f"r{i}")
    history, asked = History(store), []
    search = history._client.search_runs

    def slow(ids, text, max_results, **more):
        asked.append(max_results)
        if max_results > limit:
            raise MlflowException("Max retries exceeded (Caused by E('Read timed out. (read timeout=10)'))")
        return search(ids, text, max_results=max_results, **more)

    monkeypatch.setattr(history._client, "search_runs", slow)
    limit = 10
    assert [run.name for run in history.runs("slow")] == [f"r{i}" for i in range(12)]
    assert asked == [250, 50, 10, 10]
    limit = 9
    with pytest.raises(TrackingError, match=r"can't be reached: Read timed out\.$"):
        history.runs("slow")


def test_a_server_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(TrackingError, match=r"^MLflow at http://[\d.]+:\d+: can't be reached: Read timed out\.$"):
            History(f"http://127.0.0.1:{deaf.getsockname()[1]}").runs("any")


def test_collection_of_garbage_goes_on_after_reading(store):
    import gc

    add_run(store, "garbage", "one")
    History(store).runs("garbage")
    assert gc.isenabled()


def test_a_curve_has_the_newest_value_of_each_step(store):
    run_id = add_run(store, "curves", "one", metrics={"loss": [(2, 0.5), (1, 1.0), (3, 0.25)]})
    from mlflow.entities import Metric

    from treelora_platform.tracking import MlflowServer

    MlflowServer(store).client.log_batch(run_id, [Metric("loss", 0.75, START_MS + 10**6, 2)])
    assert History(store).curve(run_id, "loss") == [(1, 1.0), (2, 0.75), (3, 0.25)]
    assert History(store).curve(run_id, "nothing") == []


def test_what_is_not_there_is_said(tmp_path, store):
    history = History(store)
    parent = add_run(store, "only a sweep", "sweep", tags={"treelora.kind": "sweep"})
    add_run(store, "unfinished", "dead", status="FAILED")
    add_run(store, "unfinished", "busy", status="RUNNING")
    for experiment, message in (
        ("nothing", "experiment 'nothing' does not exist in sqlite.*; there are: 'Default'.*'only a sweep'"),
        ("only a sweep", "experiment 'only a sweep' has no run in sqlite"),
        ("Default", "experiment 'Default' has no run in sqlite"),
    ):
        with pytest.raises(DataError, match=message):
            history.runs(experiment)
    with pytest.raises(DataError, match="'unfinished' has no finished run: 1 FAILED, 1 RUNNING"):
        history.runs("unfinished", finished_only=True)
    with pytest.raises(DataError, match=r"has no run that fits \"tags.seed = '9'\""):
        history.runs("unfinished", "tags.seed = '9'")
    with pytest.raises(DataError, match="filter 'seed ==' is none that MLflow takes"):
        history.runs("unfinished", "seed ==")
    for ask in (history.run, lambda unknown: history.curve(unknown, "loss")):
        with pytest.raises(DataError, match=r"no MLflow run 'abc' in sqlite"):
            ask("abc")
    assert list(history.download(parent, tmp_path / "empty").iterdir()) == []
    assert history.named("it's") == []


def test_a_deleted_experiment_is_said_to_be(store):
    from treelora_platform.tracking import MlflowServer

    add_run(store, "gone", "one")
    client = MlflowServer(store).client
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(DataError, match="experiment 'gone' was deleted in sqlite"):
        History(store).runs("gone")


def test_names_find_the_newest_run_in_all_experiments(store):
    first, second = add_run(store, "x1", "twice"), add_run(store, "x2", "twice", start_ms=START_MS + 1)
    assert [run.run_id for run in History(store).named("twice")] == [second, first]


def test_the_address_comes_from_the_environment_or_the_folder_of_runs(tmp_path, store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(DataError, match=r"mlflow.db: there is no such MLflow database; give another with --uri"):
        History(None, tmp_path)
    assert list(tmp_path.iterdir()) == []  # looking makes nothing
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert History(None, tmp_path).uri == store


def test_credentials_are_not_shown(tmp_path):
    server = Server(tmp_path)  # nobody listens
    with pytest.raises(TrackingError) as caught:
        History(f"http://ada:hunter2@127.0.0.1:{server.port}").experiments()
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).startswith(f"MLflow at http://***@127.0.0.1:{server.port}: can't be reached: ")
