"""Faults that no exception tells of, and machines that are missing: the run ends as if nothing had happened."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.support.waiting import wait_for
from tests.support.whole_runs import STEPS, Result, config_in, events, points, ray_processes, striking
from treelora.errors import ConfigError
from treelora_platform import placement
from treelora_platform.chaos.processes import CONTROLLER
from treelora_platform.run import RunFailedError, run_experiment
from treelora_platform.run_tables import read_scores, read_steps

STALL_S = 8


@pytest.mark.slow
def test_a_frozen_worker_is_left_behind(expected: Result, console: Console, tmp_path: Path) -> None:
    config, step = config_in(tmp_path, cluster={"workers": 2, "stall_seconds": STALL_S}), random.randrange(3, 3 * STEPS)
    with striking(tmp_path / "tiny", step, psutil.Process.suspend) as frozen:
        outcome = run_experiment(config, console)
    begins = [event["global_step"] for event in events(outcome.run_dir, "begin")]
    assert len(begins) == 2, f"frozen after step {step}: {begins}"
    assert Result.of(outcome.run_dir) == expected, f"frozen after step {step}, resumed after {begins[1]}"
    assert points(outcome.run_dir) == list(range(1, 3 * STEPS + 1))
    assert not psutil.pid_exists(frozen[0])


@pytest.mark.slow
def test_a_worker_that_freezes_at_the_start_is_left_behind(expected: Result, console: Console, tmp_path: Path) -> None:
    frozen: list[psutil.Process] = []

    def freeze() -> None:
        frozen.append(wait_for(ray_processes, 120, "a worker")[0])
        frozen[0].suspend()

    thread = threading.Thread(target=freeze)
    thread.start()
    try:
        outcome = run_experiment(config_in(tmp_path, cluster={"workers": 2, "stall_seconds": STALL_S}), console)
    finally:
        thread.join()
    assert not frozen[0].is_running()
    assert [event["global_step"] for event in events(outcome.run_dir, "begin")] == [0]
    assert Result.of(outcome.run_dir) == expected


def test_a_lost_controller_is_replaced(expected: Result, console: Console, tmp_path: Path) -> None:
    step = random.randrange(3, 3 * STEPS)
    with striking(tmp_path / "tiny", step, title=CONTROLLER):
        outcome = run_experiment(config_in(tmp_path), console)
    begins = [event["global_step"] for event in events(outcome.run_dir, "begin")]
    assert len(begins) == 2, f"lost after step {step}: {begins}"
    assert Result.of(outcome.run_dir) == expected, f"lost after step {step}, resumed after {begins[1]}"
    assert points(outcome.run_dir) == list(range(1, 3 * STEPS + 1))


@pytest.mark.slow
def test_a_worker_that_stays_frozen_is_named(console: Console, tmp_path: Path) -> None:
    config = config_in(tmp_path, cluster={"workers": 2, "stall_seconds": STALL_S, "max_failures": 0})
    with (
        striking(tmp_path / "tiny", 3, psutil.Process.suspend),
        pytest.raises(RunFailedError, match=rf"no progress for {STALL_S} s after time-colours: step \d"),
    ):
        run_experiment(config, console)


@pytest.mark.slow
def test_fewer_workers_take_the_same_steps(console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_dropout = {"rank": 2, "alpha": 8, "dropout": 0.0}  # its masks are drawn rank by rank
    whole = run_experiment(config_in(tmp_path / "whole", lora=no_dropout), console).run_dir

    cluster = {"workers": 2, "max_failures": 0, "min_workers": 1, "wait_seconds": 0}
    config = config_in(tmp_path / "fewer", lora=no_dropout, cluster=cluster)
    with striking(tmp_path / "fewer" / "tiny", STEPS + 3), pytest.raises(RunFailedError):
        run_experiment(config, console)
    monkeypatch.setattr(placement, "_living_nodes", lambda: [{"CPU": 1.0}])
    fewer = run_experiment(config, console).run_dir

    begins = [event["global_step"] for event in events(fewer, "begin")]
    assert len(begins) == 2
    assert 0 < begins[1] < 3 * STEPS
    assert [row["arms"] for row in read_steps(fewer).to_pylist()] == [r["arms"] for r in read_steps(whole).to_pylist()]
    for path in sorted((whole / "adapters").glob("*/adapter_model.safetensors")):
        one, other = load_file(path), load_file(fewer / path.relative_to(whole))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)
    columns = ["mode", "task", "after_index", "score"]
    assert read_scores(fewer).select(columns).equals(read_scores(whole).select(columns))


def test_no_room_is_said_with_need_and_have(console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_living_nodes", lambda: [{"CPU": 1.0}])
    config = config_in(tmp_path, cluster={"workers": 2, "wait_seconds": 0.5})
    with pytest.raises(ConfigError, match="2 workers of 1 CPU each were asked for, and the cluster has room for 1"):
        run_experiment(config, console)
