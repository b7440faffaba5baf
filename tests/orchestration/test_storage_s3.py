"""Whole runs that are kept in S3: they end as if they weren't, on machines that know nothing of each other.

The oracle is the run without a storage: adapters, tree, memory and scores equal, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from rich.console import Console

from tests.support.ray_cluster import ray_cluster
from tests.support.s3 import CREDENTIALS, S3, s3_server
from tests.support.waiting import wait_for
from tests.support.whole_runs import STEPS, Result, config_in, events, points
from treelora_platform.config import ExperimentConfig
from treelora_platform.run import run_experiment
from treelora_platform.run_tables import read_run_json
from treelora_platform.storage import lease
from treelora_platform.storage.folder import StoredFolder
from treelora_platform.storage.objects import StorageError, connect

TREELORA = str(Path(sys.executable).with_name("treelora"))
QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 0}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """A server; Ray's processes inherit its credentials, and begin anew therefore."""
    ray.shutdown()
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)
    with s3_server() as found:
        yield found
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def stored_in(folder: Path | str, address: str, **changes: Any) -> ExperimentConfig:
    config = config_in(Path(folder), cluster={"workers": 2, "storage": address}, **changes)
    return ExperimentConfig(**config.as_dict() | {"output_dir": str(folder)})


def newest_commit(address: str) -> str:
    index = StoredFolder(connect(address), "tiny").newest()
    return index.newest_commit() if index else ""


def driver(config: ExperimentConfig, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """`treelora run` as a process of its own; its output is in `run.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.as_yaml())
    with (folder / "run.log").open("wb") as log:
        return subprocess.Popen(
            [TREELORA, "run", str(folder / "config.yaml")], env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def power_off(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that has grown from it at once."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for member in (process, *family):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


@pytest.mark.slow
def test_a_lost_machine_and_an_outage_cost_nothing(
    s3: S3, expected: Result, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine is lost with all it has; another goes on from the storage, which is out of reach for a while."""
    monkeypatch.setattr(lease, "LASTS_S", 4.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.5)
    address = s3.address(s3.bucket())
    first = driver(stored_in(tmp_path / "one", address), tmp_path / "one", os.environ | {"RAY_ADDRESS": ""})
    try:
        wait_for(lambda: newest_commit(address) > "00000008" or first.poll() is not None, 300, "commits")
        assert first.poll() is None, (tmp_path / "one" / "run.log").read_text()
    finally:
        power_off(first)
    shutil.rmtree(tmp_path / "one")

    run_dir, resumed = tmp_path / "two" / "tiny", newest_commit(address)
    outage = threading.Thread(target=cut, args=(s3, run_dir))
    outage.start()
    outcome = run_experiment(stored_in(tmp_path / "two", address), console)
    outage.join()
    assert not outcome.already_complete
    begins = [event["global_step"] for event in events(run_dir, "begin")]
    assert begins[0] == 0
    assert begins[1:] == [int(resumed[:8])]
    assert begins[1] >= 8
    assert "not stored: storage s3://" in events(run_dir, "warning")[0]["what"]
    assert Result.of(run_dir) == expected
    assert points(run_dir) == list(range(1, 3 * STEPS + 1))

    # whoever has the storage has the run
    again = run_experiment(stored_in(tmp_path / "three", address), console)
    assert again.already_complete
    assert Result.of(again.run_dir) == expected
    assert (again.run_dir / "report.html").read_bytes() == (run_dir / "report.html").read_bytes()
    assert read_run_json(again.run_dir)["status"] == "FINISHED"


def cut(s3: S3, run_dir: Path) -> None:
    """An outage from a step on, until it was noticed and a little longer."""
    wait_for(lambda: len(events(run_dir, "begin")) > 1, 300, "the beginning")
    done = len(events(run_dir, "step"))
    wait_for(lambda: len(events(run_dir, "step")) > done, 300, "a step")
    s3.wire.set("refused")
    wait_for(lambda: events(run_dir, "warning"), 300, "a warning")
    time.sleep(0.5)
    s3.wire.set("up")


def test_a_storage_that_does_not_answer_is_said_before_anything_starts(
    s3: S3, console: Console, tmp_path: Path
) -> None:
    address = s3.address(s3.bucket())
    s3.wire.set("refused")
    try:
        with pytest.raises(StorageError, match=r"storage s3://.*Could not connect to server while listing it"):
            run_experiment(stored_in(tmp_path, address), console)
    finally:
        s3.wire.set("up")
    assert not (tmp_path / "tiny").exists()


@pytest.mark.slow
def test_nodes_that_share_no_folder(s3: S3, expected: Result, tmp_path: Path) -> None:
    """Each node has a home of its own, and `output_dir` is in it; the head, where the driver is, has no worker."""
    address = s3.address(s3.bucket())
    homes = {name: tmp_path / name for name in ("head", "a", "b", "spare")}
    for home in homes.values():
        home.mkdir()
    with ray_cluster((0,), environment=home_of(homes["head"]), system_config=QUICK) as cluster:
        nodes = {}
        for name in ("a", "b", "spare"):
            cluster.extra = home_of(homes[name])
            nodes[name] = cluster.add_node(1)
        environment = cluster.client_environment | {"RAY_ADDRESS": cluster.gcs_address} | home_of(homes["head"])
        process = driver(stored_in("~/runs", address), homes["head"], environment)
        try:
            wait_for(lambda: newest_commit(address) > "00000008" or process.poll() is not None, 300, "commits")
            said = (homes["head"] / "run.log").read_text()
            assert process.poll() is None, said
            lost = with_the_run(homes)
            nodes[lost].kill()
            code = process.wait(timeout=300)
        finally:
            process.kill()
            process.wait()
    said = (homes["head"] / "run.log").read_text()
    assert code == 0, said
    run_dir = homes["head"] / "runs" / "tiny"
    assert lost != "head"
    begins = [event["global_step"] for event in events(run_dir, "begin")]
    assert len(begins) == 2
    assert begins[1] >= 8
    assert Result.of(run_dir) == expected
    assert points(run_dir) == list(range(1, 3 * STEPS + 1))
    # only rank 0's nodes, the lost one and its successor, have the run; all have the tasks
    kept = [name for name, home in homes.items() if (home / "runs" / "tiny" / "checkpoints").exists()]
    assert "head" in kept
    assert lost in kept
    assert 3 <= len(kept) <= 4


def home_of(home: Path) -> dict[str, str]:
    return {"HOME": str(home), **CREDENTIALS}


def with_the_run(homes: dict[str, Path]) -> str:
    """The node that rank 0 is on."""
    [name] = [
        name for name, home in homes.items() if (home / "runs" / "tiny" / "events.jsonl").exists() and name != "head"
    ]
    return name
