"""`treelora submit` and `treelora jobs` on a real cluster of two raylets with token authentication.

Everything is done by commands, as its users do it; what they left is then looked at.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.support.ray_cluster import RayCluster, two_nodes
from tests.support.streams import TASKS, tiny_config
from tests.support.waiting import wait_for
from tests.support.whole_runs import events
from treelora_platform.run_tables import read_run_json, read_scores, read_steps
from treelora_platform.tracking import resolve_tracking_uri

TREELORA = str(Path(sys.executable).with_name("treelora"))
STEPS = 40
WAIT_S = 300.0


@dataclass(frozen=True)
class Site:
    """A cluster, and a user with a configuration and a folder that all nodes see."""

    cluster: RayCluster
    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TREELORA, *arguments],
            env=self.cluster.client_environment | {"RAY_API_SERVER_ADDRESS": self.cluster.address} | environment,
            cwd=self.folder / "home",
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    def submit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("submit", "experiment.yaml", *arguments, **environment)

    def actors(self, kind: str) -> list[dict[str, Any]]:
        """The actors that there are and have been, by the name of their class."""
        rows = self.cluster.ask("/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
        return [row for row in rows if row["class_name"] == kind]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("submit")
    (folder / "home").mkdir()
    (folder / "home" / "private.txt").write_text("stays here")
    config = tiny_config(
        folder / "runs",
        engine={"kind": "deepspeed", "zero_stage": 2},
        cluster={"workers": 2},
        train={"steps": STEPS},
        checkpoint={"every_steps": 5, "keep": 2},
    )
    (folder / "home" / "experiment.yaml").write_text(config.as_yaml())
    with two_nodes((1, 1)) as cluster:
        yield Site(cluster, folder)


@pytest.fixture(scope="module")
def stopped(site: Site) -> subprocess.CompletedProcess[str]:
    """A first submission that isn't followed, and is stopped in the middle of its training."""
    begun = site.submit("--no-wait")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    assert "jobs logs tiny-1 --follow" in begun.stdout
    wait_for(lambda: len(events(site.runs / "tiny", "commit")) > 1, WAIT_S, "a commit")
    return site.run("jobs", "stop", "tiny")


@pytest.fixture(scope="module")
def submitted(site: Site, stopped: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The same submission once more, followed to its end."""
    return site.submit()


def test_a_stopped_job_closes_its_run(site: Site, stopped: subprocess.CompletedProcess[str]) -> None:
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "tiny-1 stopped after" in stopped.stdout
    assert "interrupted; the same command goes on from the last commit" in stopped.stdout
    record = read_run_json(site.runs / "tiny")
    assert record["status"] == "KILLED"
    client = MlflowClient(resolve_tracking_uri(None, site.runs))
    assert client.get_run(record["mlflow_run_id"]).info.status == "KILLED"
    assert site.run("jobs", "logs", "tiny-1", "-f").returncode == 130
    assert "has ended before: STOPPED" in site.run("jobs", "stop", "tiny-1").stdout


def test_the_same_submission_goes_on(site: Site, submitted: subprocess.CompletedProcess[str]) -> None:
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "tiny-2, after tiny-1 (stopped)" in submitted.stdout
    run_dir = site.runs / "tiny"
    assert read_run_json(run_dir)["attempts"] == 2
    assert [event["global_step"] > 0 for event in events(run_dir, "begin")] == [False, True]


def test_workers_run_on_both_nodes_and_the_tree_actor_on_the_head(
    site: Site, submitted: subprocess.CompletedProcess[str]
) -> None:
    head, other = (node.node_id for node in site.cluster.nodes)
    workers = site.actors("RayTrainWorker")
    assert len(workers) >= 4  # two jobs of two workers each; a group that Ray can't start in time is begun again
    assert {worker["node_id"] for worker in workers} - {""} == {head, other}
    assert [actor["node_id"] for actor in site.actors("TreeKeeper")] == [head] * 2
    assert {actor["state"] for actor in [*workers, *site.actors("TreeKeeper")]} == {"DEAD"}


def test_its_artifacts_are_complete(site: Site, submitted: subprocess.CompletedProcess[str]) -> None:
    run_dir = site.runs / "tiny"
    assert read_run_json(run_dir)["status"] == "FINISHED"
    assert read_steps(run_dir)["global_step"].to_pylist() == list(range(1, 3 * STEPS + 1))
    assert read_scores(run_dir).num_rows == 3 * (1 + 2 + 3)
    assert len(list((run_dir / "adapters").iterdir())) == len(TASKS)
    assert "</html>" in (run_dir / "report.html").read_text()
    client, run_id = MlflowClient(resolve_tracking_uri(None, site.runs)), read_run_json(run_dir)["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == list(range(1, 3 * STEPS + 1))
    assert not [path for path in site.runs.iterdir() if path.name.startswith(".probe")]


def test_what_is_said_on_the_way(site: Site, submitted: subprocess.CompletedProcess[str]) -> None:
    lines = submitted.stdout.splitlines()
    checks = [tuple(line.split(maxsplit=2)[:2]) for line in lines[: lines.index("submitted tiny-2")]]
    assert checks == [
        *[("ok", name) for name in ("experiment", "package", "cluster", "token", "name", "Ray")],
        *[("ok", name) for name in ("Python", "packages", "storage", "resources")],
        ("note", "MLflow"),
    ]
    assert "report: " in submitted.stdout
    assert lines[-1].startswith("tiny-2 succeeded after ")
    assert submitted.stderr == ""


def test_the_shipped_package_ran_and_nothing_else_was_sent(
    site: Site, submitted: subprocess.CompletedProcess[str]
) -> None:
    [job] = [job for job in site.cluster.ask("/api/jobs/") if job["submission_id"] == "tiny-2"]
    metadata = job["metadata"]
    assert (metadata["treelora.kind"], metadata["treelora.name"]) == ("experiment", "tiny")
    assert metadata["treelora.config_hash"] == read_run_json(site.runs / "tiny")["config_hash"]
    assert len(metadata["treelora.package_hash"]) == 64
    assert len(job["runtime_env"]["py_modules"]) == 2
    unpacked = site.cluster.folder.glob("ray/session_*/runtime_resources/working_dir_files/*/*")
    assert {path.name for path in unpacked} == {"config.yaml", "needs.json"}


@pytest.mark.slow
def test_a_complete_run_is_left_alone(site: Site, submitted: subprocess.CompletedProcess[str]) -> None:
    before = read_run_json(site.runs / "tiny")
    again = site.submit()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "tiny-3, after tiny-2 (succeeded)" in again.stdout
    assert "already complete: " in again.stdout
    assert read_run_json(site.runs / "tiny") == before


def test_another_configuration_of_that_name_is_refused(site: Site, submitted: subprocess.CompletedProcess[str]) -> None:
    before = len(site.cluster.ask("/api/jobs/"))
    refused = site.submit("lora.rank=4")
    assert refused.returncode == 2
    assert "'tiny' was submitted before with another configuration" in refused.stdout
    assert "lora.rank: 2 -> 4" in refused.stdout
    assert refused.stderr == "error: 1 of 6 checks failed; nothing was submitted\n"
    assert len(site.cluster.ask("/api/jobs/")) == before


@pytest.mark.slow
def test_a_failing_job_ends_with_its_own_code(site: Site) -> None:
    hopeless = ["method=sequential", "train.learning_rate=1e30", "train.max_bad_steps=2", "cluster.workers=1"]
    failed = site.submit("name=hopeless", *hopeless)
    assert failed.returncode == 1
    assert "submitted hopeless-1" in failed.stdout
    assert "not finite for 2 steps in a row" in failed.stdout
    assert failed.stdout.splitlines()[-1].endswith(", exit code 1")
    assert read_run_json(site.runs / "hopeless")["status"] == "FAILED"
    shown = site.run("jobs", "logs", "hopeless", "--follow")
    assert shown.returncode == 1
    assert "not finite for 2 steps in a row" in shown.stdout


def test_jobs_are_listed(site: Site, submitted: subprocess.CompletedProcess[str]) -> None:
    listed = site.run("jobs", "list")
    assert listed.returncode == 0
    header, *rows = [line.split() for line in listed.stdout.splitlines()]
    assert header == ["job", "kind", "status", "begun", "duration", "message"]
    assert [row[:3] for row in rows[:2]] == [["tiny-1", "experiment", "STOPPED"], ["tiny-2", "experiment", "SUCCEEDED"]]
    assert not any("probe" in row[0] for row in rows)
    assert "treelora-probe-" in site.run("jobs", "list", "--all").stdout
    unknown = site.run("jobs", "logs", "nobody-1")
    assert unknown.returncode == 2
    assert "knows no job 'nobody-1'" in unknown.stderr


def test_all_that_the_cluster_lacks_is_said_at_once(site: Site) -> None:
    wrong = ["stream.source=parquet", "stream.path=/no/such/tasks", "stream.order=[]", "cluster.workers=4"]
    found = site.submit("--check", *wrong, "name=wanting", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert found.returncode == 2
    failed = [line.split(maxsplit=2)[1:] for line in found.stdout.splitlines() if line.startswith("failed")]
    assert [name for name, _ in failed] == ["data", "resources", "MLflow"]
    assert failed[0][1].startswith("/no/such/tasks isn't seen by the head;")
    assert failed[1][1].startswith("4 workers of 1 CPU: room for 2 (node-0 (head) 1 CPU, node-1 1 CPU);")
    assert failed[2][1].startswith("http://127.0.0.1:9 can't be used by node-0 (head) (connection refused), node-1 (")
    assert found.stderr.startswith("error: 3 of ")
    assert not (site.runs / "wanting").exists()


def test_without_the_clusters_token_nobody_comes_in(site: Site, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    wrong = site.run("jobs", "list", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert wrong.returncode == 2
    assert f"refuses the token from {tmp_path / 'token'}" in wrong.stderr
    none = site.run("jobs", "list", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path))
    assert none.returncode == 2
    assert "wants a token, and there is none here" in none.stderr
    assert "0" * 64 not in wrong.stderr


@pytest.mark.slow
def test_a_comparison_is_a_job_too(site: Site, submitted: subprocess.CompletedProcess[str]) -> None:
    options = ["--uri", resolve_tracking_uri(None, site.runs), "--no-html", "--filter", "name=tiny"]
    done = site.run("submit", "--compare", "treelora", "--output-dir", str(site.folder), "--", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site.folder / "comparison" / "treelora" / "comparison.md").exists()
    assert "compare-treelora-1 succeeded" in done.stdout


@pytest.mark.slow
def test_a_sweep_is_a_job_too(site: Site) -> None:
    home = site.folder / "home"
    recipe = yaml.safe_load((home / "experiment.yaml").read_text())
    recipe |= {"cluster": {"workers": 1}, "train": recipe["train"] | {"steps": 4}}
    (home / "base.yaml").write_text(yaml.safe_dump(recipe))
    spec = {"name": "ranks", "recipe": "base.yaml", "space": {"lora.rank": [2, 4]}, "search": "grid"}
    (home / "sweep.yaml").write_text(yaml.safe_dump(spec))
    done = site.run("submit", "sweep.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ranks-1 succeeded" in done.stdout
    assert (site.runs / "ranks" / "trials.md").exists()
    statuses = [read_run_json(run)["status"] for run in (site.runs / "ranks" / "runs").iterdir() if run.name[0] != "."]
    assert statuses == ["FINISHED", "FINISHED"]
