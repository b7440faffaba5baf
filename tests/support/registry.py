"""Runs to be registered, and what `treelora predict` says, in a registered model's columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from tests.support.serving import file_of, learnt
from tests.support.streams import TASKS, tiny_config
from treelora.loop import StreamLoop
from treelora_platform.predict import PredictOptions, open_predictor
from treelora_platform.predict_io import Prompt, read_prompts
from treelora_platform.tracking import finish_run, start_run

COLUMNS = ["answer", "task", "margin", "runner_up", "fallback"]


def routed_run(folder: Path) -> tuple[Path, StreamLoop]:
    """A run that is meant for routed inference, and whose tracking server has an address that is nobody else's."""
    config = tiny_config(
        folder,
        treelora={"preset": "plus"},
        lora={"alpha": 64, "dropout": 0.0},
        train={"steps": 12, "learning_rate": 0.07},
        seed=4,  # of some that were tried, the one after which the ways to choose an adapter differ most
        tracking={"uri": "http://inner.example", "tags": {"team": "x"}},
    )
    return folder / "run", learnt(config, folder / "run")


def tracked(run_dir: Path, address: str, experiment: str = "exp") -> str:
    """Put a run into MLflow; returns its id there."""
    config = tiny_config(run_dir.parent)
    tags = {"method": "treelora", "stream": "builtin", "order": ", ".join(TASKS), "data_hash": "d00d"}
    (run_dir / "tracking.json").unlink(missing_ok=True)
    run_id = start_run(address, experiment, run_dir.name, config.as_dict(), tags, run_dir=run_dir)
    assert run_id
    assert finish_run(run_dir, address, run_id, "FINISHED").sent
    return run_id


def load(address: str, uri: str, **model_config: Any) -> Any:
    mlflow.set_tracking_uri(address)
    return mlflow.pyfunc.load_model(uri, model_config=model_config or None)


def prompts_of(loop: StreamLoop) -> list[Prompt]:
    return [prompt for test in loop.evaluator.tests for prompt in read_prompts(file_of(test.task))]


def table_of(prompts: list[Prompt]) -> pd.DataFrame:
    return pd.DataFrame(
        {"prompt": [prompt.text for prompt in prompts], "choices": [list(prompt.choices or ()) for prompt in prompts]}
    )


def rows_of(run_dir: Path, prompts: list[Prompt], options: PredictOptions) -> list[list[Any]]:
    """What `treelora predict` says, in the model's columns."""
    found = [answer for part in open_predictor(run_dir, options).answers(prompts) for answer in part]
    return [[getattr(answer, name) for name in COLUMNS] for answer in found]
