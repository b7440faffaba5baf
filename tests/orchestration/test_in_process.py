"""Runs without Ray (`cluster.workers: 0`): the numbers of the bare loop, everything else as in any run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from tests.architecture.test_imports import run_python
from tests.support.streams import TASKS, execute, tiny_config
from tests.support.waiting import wait_for
from tests.support.whole_runs import STEPS, Result, adapters, events, points
from treelora.errors import ConfigError
from treelora_platform import tracking
from treelora_platform.config import ExperimentConfig
from treelora_platform.run import RunFailedError, run_experiment
from treelora_platform.run_tables import read_run_json
from treelora_platform.tracking import resolve_tracking_uri, start_run

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115  (for as long as this process)
TREELORA = str(Path(sys.executable).with_name("treelora"))


def config_here(folder: Path, **changes: Any) -> ExperimentConfig:
    settings: dict[str, Any] = {"cluster": {"workers": 0}, "train": {"steps": STEPS}, "checkpoint": {"every_steps": 2}}
    return tiny_config(folder, **settings | changes)


@pytest.fixture(scope="module")
def by_itself(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in a process of its own: its folder, and what it said at last."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "config.yaml").write_text(config_here(folder).as_yaml())
    code = (
        "import sys; from rich.console import Console; from treelora_platform.config import load_config; "
        "from treelora_platform.run import run_experiment; "
        f"run_experiment(load_config({str(folder / 'config.yaml')!r}), Console()); "
        "print('loaded:', sorted({'ray', 'deepspeed'} & set(sys.modules)))"
    )
    return folder / "tiny", run_python(code).splitlines()[-1]


@pytest.fixture(scope="module")
def whole_here(by_itself: tuple[Path, str]) -> Path:
    return by_itself[0]


def test_the_numbers_are_those_of_the_bare_loop(whole_here: Path, tmp_path: Path) -> None:
    execute(config_here(tmp_path), tmp_path / "bare")
    ours, bare = Result.of(whole_here), Result.of(tmp_path / "bare")
    memory = "memory.safetensors"  # has the run's name in it
    assert ours.digests.pop(memory) != bare.digests.pop(memory)
    assert ours == bare


def test_everything_is_left_behind(whole_here: Path) -> None:
    record = read_run_json(whole_here)
    assert record["status"] == "FINISHED"
    assert sorted(adapters(whole_here)) == [f"{i:04d}-{name}" for i, name in enumerate(TASKS)]
    assert points(whole_here) == list(range(1, 3 * STEPS + 1))
    run = MlflowClient(resolve_tracking_uri(None, whole_here.parent)).get_run(record["mlflow_run_id"])
    assert (run.info.status, run.data.params["cluster.workers"]) == ("FINISHED", "0")
    assert "</html>" in (whole_here / "report.html").read_text()


def test_no_ray_and_no_deepspeed(by_itself: tuple[Path, str]) -> None:
    assert by_itself[1] == "loaded: []"


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C is heard, also where these tests are a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_while_mlflow_is_slow_closes_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any, **options: Any) -> str | None:
        run_id = start_run(*args, **options)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.5)
        return run_id

    monkeypatch.setattr(tracking, "start_run", slow)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_here(tmp_path), QUIET)
    client = MlflowClient(resolve_tracking_uri(None, tmp_path))
    [run] = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.info.status == "KILLED"
    assert read_run_json(tmp_path / "tiny") == {}  # nothing was begun: another configuration may have the name
    monkeypatch.undo()
    assert run_experiment(config_here(tmp_path), QUIET).mlflow_run_id == run.info.run_id


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_it_goes_on_where_it_was_ended(whole_here: Path, tmp_path: Path, how: signal.Signals) -> None:
    config = config_here(tmp_path)
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    run_dir = tmp_path / "tiny"
    driver = subprocess.Popen(
        [TREELORA, "run", str(tmp_path / "config.yaml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(events(run_dir, "commit")) >= 3 or driver.poll() is not None, 300, "commits")
    driver.send_signal(how)
    code = driver.wait(120)
    assert code == (130 if how == signal.SIGTERM else -signal.SIGKILL)
    assert read_run_json(run_dir)["status"] == ("KILLED" if how == signal.SIGTERM else "RUNNING")
    run_experiment(config, QUIET)
    begins = [event["global_step"] for event in events(run_dir, "begin")]
    assert len(begins) == 2
    assert 0 < begins[1] < 3 * STEPS
    assert Result.of(run_dir) == Result.of(whole_here)
    assert points(run_dir) == list(range(1, 3 * STEPS + 1))


def test_a_failure_is_told_and_recorded(tmp_path: Path) -> None:
    config = config_here(tmp_path, train={"steps": STEPS, "learning_rate": 1e30})
    with pytest.raises(RunFailedError, match=r"not finite for .* in a row.*\n.*the same command goes on"):
        run_experiment(config, QUIET)
    assert read_run_json(tmp_path / "tiny")["status"] == "FAILED"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": {"kind": "deepspeed"}}, "which engine.kind deepspeed isn't for; set engine.kind to torch"),
        ({"cluster": {"workers": 0, "storage": "s3://b/runs"}}, "which cluster.storage isn't for"),
    ],
)
def test_what_needs_ray_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_here(tmp_path, **changes)
