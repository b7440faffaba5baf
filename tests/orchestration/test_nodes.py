"""A cluster of three nodes on one machine that loses some: the run ends as if it hadn't.

Each node has room for one of the two workers, so that one node is spare. Four minutes: run it with `-m slow`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.ray_cluster import RAY, RayCluster, RayNode, ray_cluster
from tests.support.waiting import wait_for
from tests.support.whole_runs import STEPS, TRAIN_WORKER, Result, command, config_in, events, points
from treelora_platform.run_tables import read_run_json

pytestmark = pytest.mark.slow
QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 0}
TREELORA = str(Path(sys.executable).with_name("treelora"))


@contextmanager
def running(on: RayCluster, folder: Path, **changes: Any) -> Iterator[subprocess.Popen[bytes]]:
    """`treelora run` on the cluster; its output is in `run.log`."""
    config = folder / "config.yaml"
    config.write_text(config_in(folder, **changes).as_yaml())
    with (folder / "run.log").open("wb") as log:
        driver = subprocess.Popen(
            [TREELORA, "run", str(config)],
            env=on.client_environment | {"RAY_ADDRESS": on.gcs_address},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def workers_on(node: RayNode) -> list[psutil.Process]:
    return [process for process in node.family() if any(TRAIN_WORKER in part for part in command(process))]


def worked_on(cluster: RayCluster) -> RayNode:
    """A node that is not the head and that has a worker."""
    for node in cluster.nodes[1:]:
        if workers_on(node):
            return node
    raise AssertionError("no node but the head has a worker")


@contextmanager
def halted(cluster: RayCluster) -> Iterator[None]:
    """Its workers stand still."""
    workers = [worker for node in cluster.nodes for worker in workers_on(node)]
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            worker.resume()


def after_steps(run_dir: Path, count: int, driver: subprocess.Popen[bytes]) -> None:
    wait_for(lambda: len(events(run_dir, "step")) >= count or driver.poll() is not None, 300, f"{count} steps")
    assert driver.poll() is None, (run_dir.parent / "run.log").read_text()


def ended(driver: subprocess.Popen[bytes], folder: Path) -> str:
    """Wait for a good end; what was printed."""
    code = driver.wait(timeout=400)
    said = (folder / "run.log").read_text()
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster((1, 1, 1), system_config=QUICK) as found:
        yield found


def test_a_notice_of_preemption_costs_no_step(cluster: RayCluster, expected: Result, tmp_path: Path) -> None:
    run_dir = tmp_path / "tiny"
    # commits at the ends of tasks only: what is there in between is the notice's
    with running(cluster, tmp_path, checkpoint={"every_steps": None, "keep": 2}) as driver:
        after_steps(run_dir, 2, driver)
        with halted(cluster):  # the whole run takes less time than giving notice, which Train looks for every 5 s
            node = worked_on(cluster)
            subprocess.run(
                [RAY, "drain-node", "--address", cluster.gcs_address, "--node-id", node.node_id, "--reason",
                 "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "120"],
                env=cluster.client_environment,
                check=True,
                capture_output=True,
            )  # fmt: skip
            time.sleep(6)
        said = ended(driver, tmp_path)
    assert "a machine was taken away; beginning again from the last commit" in " ".join(said.split())
    begins = [event["global_step"] for event in events(run_dir, "begin")]
    steps = [event["unit"] * STEPS + event["step"] for event in events(run_dir, "step")]
    assert len(begins) == 2
    assert begins[1] > 0
    assert steps == list(range(1, 3 * STEPS + 1))  # none was made twice
    assert Result.of(run_dir) == expected
    node.kill()
    cluster.add_node(1)


def test_a_lost_node_is_replaced_by_the_spare_one(cluster: RayCluster, expected: Result, tmp_path: Path) -> None:
    run_dir = tmp_path / "tiny"
    with running(cluster, tmp_path) as driver:
        after_steps(run_dir, STEPS + 3, driver)
        worked_on(cluster).kill()
        ended(driver, tmp_path)
    begins = [event["global_step"] for event in events(run_dir, "begin")]
    assert len(begins) >= 2
    assert begins[-1] > 0
    assert Result.of(run_dir) == expected
    assert points(run_dir) == list(range(1, 3 * STEPS + 1))


def test_without_a_spare_node_fewer_workers_go_on(cluster: RayCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "tiny"
    with running(cluster, tmp_path, cluster={"workers": 2, "min_workers": 1, "wait_seconds": 1}) as driver:
        after_steps(run_dir, 3, driver)
        for node in cluster.nodes[1:]:
            node.kill()
        said = ended(driver, tmp_path)
    assert "going on with 1 of 2 workers, with the same global batch" in " ".join(said.split())
    assert read_run_json(run_dir)["status"] == "FINISHED"
    assert points(run_dir) == list(range(1, 3 * STEPS + 1))
