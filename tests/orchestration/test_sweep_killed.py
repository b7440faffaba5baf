"""Trials that had to be killed while they closed their runs: the sweep closes them, on a real MLflow database."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient

from tests.support.streams import tiny_config
from treelora_platform.run_lock import only_one
from treelora_platform.run_record import write_record
from treelora_platform.run_tables import read_run_json
from treelora_platform.sweep.driver import close_killed
from treelora_platform.sweep.journal import Entry, Journal
from treelora_platform.tracking import start_run


def test_runs_of_killed_trials_are_closed(tmp_path: Path) -> None:
    journal, uri = Journal(tmp_path / "trials.jsonl"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    ids = {}
    for name, status in (("killed", "RUNNING"), ("busy", "RUNNING"), ("through", "FINISHED")):
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        config = tiny_config(tmp_path / "runs", name=name, tracking={"uri": uri})
        (run_dir / "config.yaml").write_text(config.as_yaml())
        ids[name] = start_run(uri, "e", name, {}, run_dir=run_dir)
        write_record(run_dir, {"name": name, "status": status, "mlflow_run_id": ids[name]})
        journal.add(Entry(run=name, values={}, status="begun"))
    journal.add(Entry(run="never began", values={}, status="begun"))
    with only_one(tmp_path / "runs" / "busy"):
        close_killed(journal, tmp_path)
    told = {name: read_run_json(tmp_path / "runs" / name)["status"] for name in ids}
    assert told == {"killed": "KILLED", "busy": "RUNNING", "through": "FINISHED"}
    client = MlflowClient(uri)
    seen = {name: client.get_run(str(run_id)).info.status for name, run_id in ids.items()}
    assert seen == {"killed": "KILLED", "busy": "RUNNING", "through": "RUNNING"}
