"""Whole runs on a local Ray: two workers, DeepSpeed ZeRO-2, the tree actor, MLflow on sqlite. And what kills them.

The oracle of every fault is the same: adapters, tree, memory and scores equal those of the uninterrupted run, bit for
bit. Ray is started once for all runs in this process.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from rich.console import Console

from tests.support.streams import TASKS, commits
from tests.support.waiting import wait_for
from tests.support.whole_runs import (
    STEPS,
    TRAIN_WORKER,
    Result,
    adapters,
    command,
    config_in,
    events,
    points,
    striking,
)
from treelora.errors import ConfigError
from treelora_platform.extend import extend_run
from treelora_platform.run import RunFailedError, run_experiment
from treelora_platform.run_tables import read_run_json, read_scores, read_steps, read_tasks
from treelora_platform.tracking import resolve_tracking_uri

TREELORA = str(Path(sys.executable).with_name("treelora"))


def test_everything_is_left_behind(whole: Path, expected: Result) -> None:
    assert read_run_json(whole)["status"] == "FINISHED"
    steps = read_steps(whole)
    assert steps["global_step"].to_pylist() == list(range(1, 3 * STEPS + 1))
    assert read_tasks(whole)["task"].to_pylist() == list(TASKS)
    assert len(expected.scores) == 3 * (1 + 2 + 3)
    assert [json.loads(tree)["names"] for tree in expected.trees.values()] == [list(TASKS[: i + 1]) for i in range(3)]
    folders = sorted((whole / "adapters").iterdir())
    assert [path.name for path in folders] == [f"{i:04d}-{name}" for i, name in enumerate(TASKS)]
    assert all((path / "adapter_config.json").exists() for path in folders)
    assert "</html>" in (whole / "report.html").read_text()
    assert len(list((whole / "figures").glob("*.png"))) >= 2
    assert len(commits(whole)) == 2
    assert not list((whole / "checkpoints").glob(".writing-*"))


def test_mlflow_has_one_point_a_step(whole: Path) -> None:
    record = read_run_json(whole)
    client = MlflowClient(resolve_tracking_uri(None, whole.parent))
    run = client.get_run(record["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert points(whole) == list(range(1, 3 * STEPS + 1))
    assert run.data.params["train.learning_rate"] == "0.02"
    assert run.data.params["cluster.workers"] == "2"
    artifacts = {entry.path for entry in client.list_artifacts(record["mlflow_run_id"])}
    assert {"config.yaml", "report.html", "tables", "tree"} <= artifacts


def test_a_complete_run_is_left_alone(whole: Path, console: Console) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    outcome = run_experiment(config_in(whole.parent), console)
    assert outcome.already_complete
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"} == before


def test_a_run_of_an_earlier_version_is_the_same_run(whole: Path, console: Console, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "tiny")
    config = tmp_path / "tiny" / "config.yaml"
    plain = yaml.safe_load(config.read_text())
    assert plain["ogd"].pop("project_step") is True  # a field that it hadn't, say
    assert plain["lora"].pop("layers") is None
    config.write_text(yaml.safe_dump(plain | {"output_dir": str(tmp_path)}))
    record = tmp_path / "tiny" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"config_hash": "another, since fields came"}))
    assert run_experiment(config_in(tmp_path), console).already_complete


def test_a_run_without_ray_is_the_same_run(console: Console, tmp_path: Path) -> None:
    settings = {"engine": {"kind": "torch"}, "checkpoint": {"every_steps": None}}
    on_ray = run_experiment(config_in(tmp_path / "ray", cluster={"workers": 1}, **settings), console).run_dir
    here = run_experiment(config_in(tmp_path / "here", cluster={"workers": 0}, **settings), console).run_dir
    assert Result.of(here) == Result.of(on_ray)


def test_another_configuration_is_refused(whole: Path, console: Console) -> None:
    changed = config_in(whole.parent, train={"steps": STEPS, "learning_rate": 0.5})
    with pytest.raises(ConfigError, match=r"train.learning_rate: 0.02 -> 0.5\n"):
        run_experiment(changed, console)


def test_a_second_live_run_is_refused(whole: Path, console: Console) -> None:
    with (whole / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="executed by another process"):
            run_experiment(config_in(whole.parent), console)


@pytest.mark.slow
def test_fresh_and_a_killed_worker(whole: Path, expected: Result, console: Console, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "tiny")
    config, step = config_in(tmp_path), random.randrange(3, 3 * STEPS)
    (tmp_path / "tiny" / "events.jsonl").unlink()
    with striking(tmp_path / "tiny", step) as killed:
        outcome = run_experiment(config, console, fresh=True)
    begins = [event["global_step"] for event in events(outcome.run_dir, "begin")]
    assert len(killed) == 1
    assert len(begins) == 2, f"killed after step {step}: {begins}"
    assert begins[0] == 0
    assert 0 < begins[1] <= step + 1
    assert Result.of(outcome.run_dir) == expected, f"killed after step {step}, resumed after {begins[1]}"
    assert points(outcome.run_dir) == list(range(1, 3 * STEPS + 1))


def test_a_killed_driver_is_taken_up_by_the_same_command(expected: Result, console: Console, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    run_dir = tmp_path / "tiny"
    driver = subprocess.Popen(
        [TREELORA, "run", str(tmp_path / "config.yaml")],
        env=os.environ | {"RAY_ADDRESS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(events(run_dir, "commit")) >= 5 or driver.poll() is not None, 300, "commits")
        assert driver.poll() is None
        family = psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert any(TRAIN_WORKER in part for process in family for part in command(process))
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [command(process) for process in alive]

    done = len(events(run_dir, "step"))
    assert run_experiment(config, console).run_dir == run_dir
    begins = [event["global_step"] for event in events(run_dir, "begin")]
    assert begins[0] == 0
    assert 0 < begins[1] <= done
    assert Result.of(run_dir) == expected
    assert points(run_dir) == list(range(1, 3 * STEPS + 1))
    assert len(MlflowClient(resolve_tracking_uri(None, tmp_path)).search_runs(["1"])) == 1


def test_a_finished_run_learns_one_more_task(whole: Path, expected: Result, console: Console) -> None:
    with pytest.raises(ConfigError, match="'time-colours' is already learnt"):
        extend_run(whole, "builtin", None, "time-colours", console)
    before = adapters(whole)
    extended = extend_run(whole, "builtin", None, "subject-directions", console).run_dir
    assert extended == whole
    result = Result.of(whole)
    names = [*TASKS, "subject-directions"]
    assert len(result.losses) == 4 * STEPS
    assert result.losses[: 3 * STEPS] == expected.losses
    assert before.items() < adapters(whole).items()
    assert result.scores[: len(expected.scores)] == expected.scores
    assert len(result.scores) == len(expected.scores) + 3 * 4
    assert expected.trees.items() <= result.trees.items()
    tree = json.loads(list(result.trees.values())[-1])
    assert tree["names"] == names
    assert sorted(task for task in tree["task"] if task >= 0) == [0, 1, 2, 3]
    assert all(0 <= arm < 3 for arms in result.arms[3 * STEPS :] for arm in arms)
    assert read_run_json(whole)["status"] == "FINISHED"
    with pytest.raises(ConfigError, match="'subject-directions' is already learnt"):
        extend_run(whole, "builtin", None, "subject-directions", console)


def test_a_failure_that_would_come_again_is_not_retried(console: Console, tmp_path: Path) -> None:
    hopeless = config_in(
        tmp_path,
        method="sequential",
        train={"steps": STEPS, "learning_rate": 1e30, "max_bad_steps": 2},
        engine={"kind": "torch"},
        cluster={"workers": 1},
        checkpoint={"every_steps": None},
    )
    with pytest.raises(RunFailedError, match=r"task 'time-colours', step \d: loss .* for 2 steps in a row"):
        run_experiment(hopeless, console)
    run_dir = tmp_path / "tiny"
    assert len(events(run_dir, "begin")) == 1
    record = read_run_json(run_dir)
    assert record["status"] == "FAILED"
    client = MlflowClient(resolve_tracking_uri(None, tmp_path))
    assert client.get_run(record["mlflow_run_id"]).info.status == "FAILED"


REFUSED = {
    "unknown key": (["train.learning_rat=1"], r"train.learning_rat: no such key; did you mean 'learning_rate'?"),
    "too many workers": (["cluster.workers=64", "train.global_batch=64"], "64 CPUs, this machine has"),
    "rank 0": (["lora.rank=0"], "lora.rank: Input should be greater than or equal to 1 (found 0)"),
    "task twice": (["stream.order=[time-colours,time-colours]"], "names 'time-colours' more than once"),
    "missing file": (None, "there is no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    overrides, message = REFUSED[case]
    path = tmp_path / "config.yaml"
    if overrides is not None:
        path.write_text(config_in(tmp_path / "runs").as_yaml())
    done = subprocess.run(
        [TREELORA, "run", str(path), *(overrides or [])],
        env=os.environ | {"RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.slow
def test_a_frozen_model_is_scored_by_two_workers(console: Console, tmp_path: Path) -> None:
    """Nothing is trained between start and first commit: a rank may look for a commit when another has made one."""
    config = config_in(tmp_path, name="frozen", method="frozen", evaluation={"in_context_examples": 2})
    run_dir = run_experiment(config, console).run_dir
    scores = read_scores(run_dir).to_pylist()
    assert [score["task"] for score in scores] == list(TASKS)
    assert {(score["mode"], score["after_index"]) for score in scores} == {("last", len(TASKS) - 1)}
    assert read_steps(run_dir).num_rows == 0
    assert not adapters(run_dir)
