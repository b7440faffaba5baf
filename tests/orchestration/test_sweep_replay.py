"""A sweep whose tracking server was away is sent whole, once, by `treelora track`."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.run_dir import finished_run
from treelora_platform.sweep.journal import Entry, Journal
from treelora_platform.sweep.replay import is_sweep, replay_sweep
from treelora_platform.tracking import finish_run, start_run

AWAY = "http://127.0.0.1:9"


def test_a_sweep_is_replayed_with_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    folder = tmp_path / "runs" / "s"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text("{}", encoding="utf-8")
    assert start_run(AWAY, "e", "s", {}, {"treelora.kind": "sweep"}, run_dir=folder) is None
    journal = Journal(folder / "trials.jsonl")
    for name in ("a", "b"):
        run = finished_run(folder / "runs" / name).path
        journal.add(Entry(name, {"lora.rank": 2}, "done", 3))
        assert start_run(AWAY, "e", name, {"sweep": {"lora.rank": 2}}, {}, run_dir=run) is None
        assert not finish_run(run, AWAY, None, "FINISHED", [run / "tables"], drain_s=1).sent
    journal.add(Entry("never-began", {"lora.rank": 3}, "begun"))
    assert not finish_run(folder, AWAY, None, "FINISHED", [folder / "sweep.json"], drain_s=1).sent
    assert is_sweep(folder)
    assert not is_sweep(folder / "runs" / "a")

    server = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for _ in range(2):
        reports = replay_sweep(folder, server)
        assert [report.sent for report in reports] == [True, True, True]
    client = MlflowClient(server)
    [experiment] = client.search_experiments(filter_string="name = 'e'")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if "treelora.kind" in run.data.tags)
    children = [run for run in runs if run is not parent]
    assert sorted(run.info.run_name for run in children) == ["a", "b"]
    assert all(run.info.status == "FINISHED" for run in runs)
    for run in children:
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["sweep.lora.rank"] == "2"
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
        assert steps
        assert len(steps) == len(set(steps))
