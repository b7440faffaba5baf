"""`treelora chaos` for real: drivers that are killed, workers that are killed, and a command that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.support.waiting import wait_for
from tests.support.whole_runs import config_in, events
from treelora_platform.chaos.harness import Plan, run_chaos
from treelora_platform.chaos.processes import title
from treelora_platform.chaos.schedule import DEFAULT_KINDS, Kind
from treelora_platform.chaos.site import LocalSite
from treelora_platform.chaos.verdict import differences, run_digest
from treelora_platform.run_tables import read_run_json, read_steps

CALLS = [
    f"{service}.grpc_server.{call}"
    for service, calls in {
        "CoreWorkerService": ("PushTask", "GetObjectStatus", "PubsubLongPolling", "PubsubCommandBatch"),
        "NodeManagerService": ("RequestWorkerLease", "PrepareBundleResources", "CommitBundleResources"),
        "ActorInfoGcsService": ("RegisterActor", "CreateActor", "GetActorInfo", "GetNamedActorInfo"),
        "PlacementGroupInfoGcsService": ("CreatePlacementGroup", "WaitPlacementGroupUntilReady"),
        "InternalKVGcsService": ("InternalKVGet", "InternalKVPut"),
    }.items()
    for call in calls
]
CHAOS = "from treelora_platform.chaos.command import chaos_app; chaos_app()"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder of a name so short that Ray's sockets fit below it; pytest's own grow with its count of runs."""
    with tempfile.TemporaryDirectory(prefix="c-", dir="/tmp") as folder:
        yield Path(folder)


def plan(folder: Path, schedules: int, faults: int, kinds: tuple[Kind, ...], seed: int = 0) -> Plan:
    return Plan(config_in(folder), folder / "chaos", schedules, faults, seed, kinds)


def of_drivers(folder: Path) -> list[psutil.Process]:
    """Processes of drivers that execute runs of a folder, and of MLflow servers there."""
    return [process for process in psutil.process_iter() if str(folder) in title(process)]


@pytest.mark.slow
def test_a_schedule_is_survived_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = plan(tmp_path, 1, 2, ("worker", "driver"))
    [outcome] = run_chaos(wanted, Console(width=200))
    said = capsys.readouterr().out
    assert outcome.reasons == [], said
    assert outcome.survived
    assert len(outcome.story.hits) == 2
    assert not outcome.story.missed

    reference, other = wanted.out / "reference" / "tiny", wanted.out / "schedule-1" / "tiny"
    address = f"sqlite:///{wanted.out}/mlflow.db"
    expected, found = run_digest(reference, address), run_digest(other, address)
    assert differences(expected, found) == []
    assert found["MLflow points of loss by step"] == dict.fromkeys(range(1, 19), 1)
    assert (found["MLflow runs"], found["MLflow status"]) == (1, "FINISHED")
    assert len(events(reference, "step")) == read_steps(reference).num_rows == 18
    assert len(events(other, "begin")) >= 2
    assert read_run_json(other)["attempts"] == len(outcome.story.commands)

    plain = json.loads((wanted.out / "chaos.json").read_text())
    assert plain["summary"]["survived"] == 1
    assert plain["summary"]["steps_lost"] == len(events(other, "step")) - 18
    rows = pq.read_table(wanted.out / "faults.parquet").to_pylist()
    assert [row["kind"] for row in rows] == [hit.fault.kind for hit in outcome.story.hits]
    assert not of_drivers(tmp_path)


@pytest.mark.slow
def test_an_interrupted_command_leaves_nothing_running(tmp_path: Path, short: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(config_in(tmp_path).as_yaml())
    arguments = [str(config), "--out", str(tmp_path / "chaos"), "--kinds", "worker,mlflow"]
    chaos = subprocess.Popen(
        [sys.executable, "-c", CHAOS, *arguments],
        env=os.environ | {"TMPDIR": str(short)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        reference = tmp_path / "chaos" / "reference" / "tiny"
        wait_for(lambda: events(reference, "stage") or chaos.poll() is not None, 300, "the reference's stage")
        assert chaos.poll() is None
        family = psutil.Process(chaos.pid).children(recursive=True)
        chaos.send_signal(signal.SIGINT)
        _, said = chaos.communicate(timeout=120)
    finally:
        chaos.kill()
        chaos.wait()
    assert chaos.returncode == 130, said
    assert len(family) > 5
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [title(process) for process in alive] == []
    assert not of_drivers(tmp_path)
    assert list(short.glob("tl-*")) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_delays_in_rays_calls_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_chaos(plan(tmp_path, 1, 0, ("worker",)), Console(width=200))
    # `*`, which is all that Ray's processes do, ends its raylet (ray 2.60: a failed check in object_manager.cc)
    slow = LocalSite({"RAY_testing_asio_delay_us": ",".join(f"{call}=0:20000" for call in CALLS)})
    [outcome] = run_chaos(plan(tmp_path, 1, 0, ("worker",)), Console(width=200), slow)
    assert outcome.reasons == [], capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_frozen_workers_and_a_dead_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_in(tmp_path, cluster={"workers": 2, "stall_seconds": 20})
    outcomes = run_chaos(Plan(config, tmp_path / "chaos", 3, 2, 0, ("stall", "head")), Console(width=200))
    said = capsys.readouterr().out
    assert [outcome.name for outcome in outcomes if not outcome.survived] == [], said
    assert {hit.fault.kind for outcome in outcomes for hit in outcome.story.hits} == {"stall", "head"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run_chaos(plan(tmp_path, 10, 3, DEFAULT_KINDS), Console(width=200))
    said = capsys.readouterr().out
    assert [outcome.name for outcome in outcomes if not outcome.survived] == [], said
    assert sum(len(outcome.story.hits) for outcome in outcomes) >= 25, said
