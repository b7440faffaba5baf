"""One real run on a local Ray, and the same run again from nothing but MLflow."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from rich.console import Console

from tests.support.streams import tiny_config
from treelora_platform.experiments.best import RERUN_TAG
from treelora_platform.experiments.rerun import rerun, show_rerun
from treelora_platform.run import run_experiment
from treelora_platform.tracking_query import History


@pytest.fixture
def console() -> Iterator[Console]:
    with open(os.devnull, "w") as nothing:
        yield Console(file=nothing)
    ray.shutdown()


@pytest.mark.slow
def test_a_rerun_comes_out_equal(tmp_path: Path, console: Console) -> None:
    database = f"sqlite:///{tmp_path}/history/mlflow.db"
    (tmp_path / "history").mkdir()
    tracking = {"uri": database, "experiment": "exp"}
    config = tiny_config(tmp_path / "then", tracking=tracking, checkpoint={"every_steps": None, "keep": 1})
    first = run_experiment(config, console)
    assert first.mlflow_run_id
    shutil.rmtree(tmp_path / "then")  # MLflow is all that is left

    history = History(database)
    outcome = rerun(history, first.mlflow_run_id, console, output_dir=str(tmp_path / "now"))
    # three ways of inference x (1 + 2 + 3) scores; three tasks x four steps, with arms from the second on
    assert dict(outcome.equality.compared) == {"scores": 18, "losses": 12, "arms": 8, "trees": 3}
    assert (outcome.verdict, outcome.equality.differences, outcome.equality.notes) == ("equal", (), ())
    assert outcome.circumstances == ()
    assert outcome.run_dir == tmp_path / "now" / "tiny-rerun"

    [again] = history.runs("exp-rerun", finished_only=True)
    assert (again.run_id, again.tags[RERUN_TAG]) == (outcome.mlflow_run_id, first.mlflow_run_id)
    assert again.scores == history.run(first.mlflow_run_id).scores
    assert [run.run_id for run in history.runs("exp")] == [first.mlflow_run_id]

    out = io.StringIO()
    show_rerun(outcome, Console(file=out, width=200))
    assert out.getvalue().startswith("equal: ")
