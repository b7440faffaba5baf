"""What the command refuses before anything runs, and what it asks the experiment for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.support.chaos_events import OUTLINE
from tests.support.streams import tiny_config
from treelora_platform.chaos.command import RECIPE, SHORTER, chaos_app
from treelora_platform.chaos.harness import Plan, _kept_outline, _Trial
from treelora_platform.chaos.schedule import DEFAULT_KINDS, Kind
from treelora_platform.chaos.site import LocalSite
from treelora_platform.config import load_config
from treelora_platform.provenance import versions
from treelora_platform.recipes import recipe_path


def refused(folder: Path, *arguments: str) -> str:
    path = folder / "config.yaml"
    path.write_text(tiny_config(folder / "elsewhere").as_yaml())
    done = CliRunner().invoke(chaos_app, [str(path), "--out", str(folder / "out"), *arguments])
    assert done.exit_code == 2, done.output
    assert done.stderr.count("error: ") == 1
    return " ".join(done.stderr.split())


def test_kinds_that_make_no_sense(tmp_path: Path) -> None:
    assert "'volcano' is no kind of fault; there are worker, driver," in refused(tmp_path, "--kinds", "worker,volcano")
    assert "method sequential has no tree actor" in refused(tmp_path, "method=sequential")
    assert "set cluster.stall_seconds" in refused(tmp_path, "--kinds", "stall", "cluster.stall_seconds=null")
    assert "after --patience 39" in refused(
        tmp_path, "--kinds", "stall", "cluster.stall_seconds=20", "--patience", "39"
    )
    assert not (tmp_path / "out" / "chaos.json").exists()


def test_a_configuration_that_makes_no_sense(tmp_path: Path) -> None:
    assert "lora.rank" in refused(tmp_path, "lora.rank=0")
    assert "64 CPUs, this machine has" in refused(
        tmp_path, "engine.kind=deepspeed", "cluster.workers=64", "train.global_batch=64"
    )


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "is not empty and no folder of `treelora chaos`" in refused(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_the_default_is_a_shorter_demo() -> None:
    config = load_config(recipe_path(RECIPE), list(SHORTER))
    assert config.name == "demo"
    assert len(config.stream.order) == 3
    assert config.train.steps == 4
    assert config.checkpoint.every_steps == 2
    assert set(config.evaluation.modes) == {"last", "routed"}


def plan(folder: Path, kinds: tuple[Kind, ...] = DEFAULT_KINDS, faults: int = 3) -> Plan:
    return Plan(tiny_config(folder / "elsewhere"), folder / "out", 1, faults, 0, kinds)


def test_runs_differ_from_the_reference_in_nothing_but_the_folder(tmp_path: Path) -> None:
    trial = _Trial(plan(tmp_path, faults=7), Console(), LocalSite(), None, "http://127.0.0.1:5000")
    reference, other = trial._placed("reference"), trial._placed("schedule-1")
    assert reference.digest() == other.digest()
    before, after = reference.flat(), other.flat()
    assert {key for key in before if before[key] != after[key]} == {"output_dir", "tracking.experiment"}
    assert other.cluster.max_failures == 7
    assert other.tracking.uri == "http://127.0.0.1:5000"
    assert other.output_dir == str(tmp_path / "out" / "schedule-1")
    assert trial.plan.config.cluster.max_failures == 2


def test_a_reference_is_kept_while_it_fits(tmp_path: Path) -> None:
    config, kept, run_dir = tiny_config(tmp_path), tmp_path / "outline.json", tmp_path / "reference"
    run_dir.mkdir()
    OUTLINE.save(kept)
    record = {"status": "FINISHED", "config_hash": config.digest(), "versions": versions()}

    def found(**changes: object) -> bool:
        (run_dir / "run.json").write_text(json.dumps(record | changes))
        return _kept_outline(kept, run_dir, config) == OUTLINE

    assert found()
    assert not found(status="RUNNING")
    assert not found(config_hash=tiny_config(tmp_path, seed=1).digest())
    assert not found(versions=versions() | {"torch": "1.0"})
    kept.unlink()
    assert not found()


@pytest.mark.parametrize("name", ["worker", "stop", "mlflow"])
def test_help_says_what_kinds_are(name: str) -> None:
    done = CliRunner().invoke(chaos_app, ["--help"])
    assert done.exit_code == 0
    assert f"{name}: SIG" in done.output
