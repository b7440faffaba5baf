"""A finished stream goes on: one more task for a run that may be months old."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from treelora.errors import ConfigError
from treelora_platform.config import parse_config
from treelora_platform.run import Outcome, run_experiment
from treelora_platform.run_record import load_run_config
from treelora_platform.run_tables import read_run_json


def extend_run(run_dir: Path, source: str, path: str | None, task: str, console: Console) -> Outcome:
    """Learn one more task, starting from what the run has learnt.

    Raises:
        ConfigError: the run is not finished, or has learnt the task already.
    """
    config = load_run_config(run_dir)
    record = read_run_json(run_dir)
    if config.method in ("joint", "frozen"):
        raise ConfigError(f"{run_dir}: method {config.method} learns no stream that could go on")
    if record.get("status") != "FINISHED":
        raise ConfigError(f"{run_dir}: the run is {record.get('status', 'unknown')}; `treelora run` finishes it first")
    if task in record.get("tasks", []):
        raise ConfigError(f"{run_dir}: task {task!r} is already learnt; it knows {', '.join(record['tasks'])}")
    plain = config.as_dict()
    rows = {key: plain["stream"][key] for key in ("train_rows", "test_rows", "seed")}
    plain["stream"]["order"] = plain["stream"]["order"] or record["tasks"]
    plain["extensions"] = [*plain["extensions"], {"source": source, "path": path, "order": [task], **rows}]
    extended = parse_config(plain, origin=f"{run_dir} with task {task!r}")
    return run_experiment(extended, console, force=True)
