"""Sweeps on a real Ray: halving on a cluster barely large enough, a kill of the driver, Ctrl-C, and what is left then.

Each sweep is a process with a Ray of its own, as its users have it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from tests.support.streams import tiny_config
from tests.support.waiting import wait_for
from treelora_platform.run_tables import read_run_json, read_steps
from treelora_platform.sweep.journal import Entry, Journal

pytestmark = pytest.mark.slow  # their one sweep, begun three times, takes six minutes of two slow cores

TREELORA = str(Path(sys.executable).with_name("treelora"))
WAIT_S = 300.0


class Sweep:
    """A sweep in a folder: three trials of the tiny stream, one at a time, each wanting all that the machine has."""

    def __init__(self, folder: Path, **changes: Any):
        self.folder, self.runs = folder / "runs" / "tiny", folder / "runs" / "tiny" / "runs"
        recipe = folder / "recipe.yaml"
        cpus = {"cpus_per_worker": os.cpu_count(), "threads_per_worker": 1}
        recipe.write_text(
            tiny_config(folder / "runs", cluster=cpus, checkpoint={"every_steps": 10, "keep": 2}).as_yaml(),
            encoding="utf-8",
        )
        plain = {
            "name": "tiny",
            "recipe": str(recipe),
            # the first learns; the next one can't, and halving ends it after a task; the last one breaks
            "space": {"train.learning_rate": [0.3, 1e-6, 1e30]},
            "search": "grid",
            "retries": 0,
            "register_as": "tiny-model",
            "overrides": {"train.steps": 150, "stream.test_rows": 24},
        }
        (folder / "sweep.yaml").write_text(yaml.safe_dump(plain | changes), encoding="utf-8")
        self.command = [TREELORA, "sweep", str(folder / "sweep.yaml")]
        self.log = folder / "sweep.log"

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen([*self.command, *options], stdout=log, stderr=subprocess.STDOUT)

    def journal(self) -> dict[str, Entry]:
        return Journal(self.folder / "trials.jsonl").latest()

    def states(self) -> list[str]:
        return [entry.status for entry in self.journal().values()]

    def until(self, condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
        wait_for(lambda: condition() or process.poll() is not None, WAIT_S, self.log.read_text)
        assert process.poll() is None, self.log.read_text()

    def training(self) -> Path | None:
        """The run of a trial that has begun to train, and hasn't ended."""
        open_runs = [self.runs / entry.run for entry in self.journal().values() if entry.status == "begun"]
        return next((run for run in open_runs if (run / "tables").exists() and read_steps(run).num_rows), None)


def offspring(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    return set(psutil.Process(process.pid).children(recursive=True))


def gone(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after a while."""
    return psutil.wait_procs(list(processes), timeout=60)[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Killed by SIGKILL while its first trial trains, interrupted in a later one, then left to end."""
    sweep = Sweep(tmp_path_factory.mktemp("sweep"), scheduler={"kind": "asha", "reduction_factor": 2})
    process = sweep.start()
    sweep.until(sweep.training, process)
    first = sweep.training()
    family = offspring(process)
    process.kill()
    process.wait()
    assert gone(family) == []
    assert sweep.states() == ["begun"]

    process = sweep.start("--resume")
    sweep.until(lambda: "done" in sweep.states() and sweep.training(), process)
    family, second = offspring(process), sweep.training()
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 130
    assert second
    assert read_run_json(second)["status"] == "KILLED"  # it had the time to close its MLflow run
    assert gone(family) == []
    assert set(sweep.states()) == {"done", "begun"}
    assert first
    sweep.first = first  # type: ignore[attr-defined]

    process = sweep.start()
    assert process.wait(WAIT_S) == 0, sweep.log.read_text()
    return sweep


def test_stopped_trials_give_everything_back(finished: Sweep) -> None:
    """One trial takes every CPU, so each could only begin when the one before had let go."""
    entries = list(finished.journal().values())
    ends = [(entry.values["train.learning_rate"], entry.status, entry.tasks) for entry in entries]
    assert ends == [(0.3, "done", 3), (1e-6, "stopped", 1), (1e30, "failed", 0)]
    assert "not finite for" in entries[-1].message
    assert f"failed: {entries[-1].message}" in " ".join(finished.log.read_text().split())


def test_finished_trials_are_not_run_again_and_others_go_on(finished: Sweep) -> None:
    attempts = {
        entry.run: read_run_json(finished.runs / entry.run)["attempts"] for entry in finished.journal().values()
    }
    assert attempts[finished.first.name] == 2  # type: ignore[attr-defined]
    assert len(attempts) == 3
    interrupted = [
        entry.run for entry in Journal(finished.folder / "trials.jsonl").entries() if entry.status == "begun"
    ]
    assert max(Counter(interrupted).values()) == 2
    steps = read_steps(finished.runs / finished.first.name)  # type: ignore[attr-defined]
    assert steps["global_step"].to_pylist() == list(range(1, 451))


def test_one_mlflow_run_a_trial_however_often_it_was_killed(finished: Sweep) -> None:
    client = MlflowClient(f"sqlite:///{finished.folder.parent / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "treelora"]
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if run.data.tags.get("treelora.kind") == "sweep"]
    children = [run for run in runs if run is not parent]
    assert (parent.info.status, len(children)) == ("FINISHED", 3)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    status = {run.info.run_name: run.info.status for run in children}
    assert [status[entry.run] for entry in finished.journal().values() if entry.status == "done"] == ["FINISHED"]
    assert [status[entry.run] for entry in finished.journal().values() if entry.status == "failed"] == ["FAILED"]
    assert "RUNNING" not in status.values()  # tiny trials may be through before the word that stops them arrives
    for run in children:
        assert run.data.tags["treelora.sweep"] == "tiny"
        assert run.data.tags["treelora.trial"] == run.info.run_name
        assert run.data.params["sweep.train.learning_rate"] == run.data.params["train.learning_rate"]
        history = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
        assert sorted(history) == sorted(set(history))
    best = next(run for run in children if run.data.params["train.learning_rate"] == "0.3")
    assert len(client.get_metric_history(best.info.run_id, "loss")) == 450
    version = client.get_model_version_by_alias("tiny-model", "best")
    assert (int(version.version), version.run_id) == (1, best.info.run_id)
    assert {"trials.parquet", "trials.md", "sweep.json"} <= {a.path for a in client.list_artifacts(parent.info.run_id)}


def test_another_sweep_of_the_name_is_refused(finished: Sweep) -> None:
    changed = finished.folder.parents[1] / "sweep.yaml"
    plain = yaml.safe_load(changed.read_text())
    other = changed.with_name("other.yaml")
    other.write_text(yaml.safe_dump(plain | {"seed": 9}), encoding="utf-8")
    done = subprocess.run([TREELORA, "sweep", str(other)], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 2
    assert "was begun with another seed; choose another name, or --fresh" in " ".join(done.stderr.split())
