"""The best runs of an experiment as versions of a registered model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from treelora.data.names import slugify
from treelora.errors import DataError
from treelora_platform.experiments.best import Best, find_best
from treelora_platform.experiments.records import RunRecord
from treelora_platform.model_registry import register_run
from treelora_platform.packing import PACKED
from treelora_platform.redaction import HIDDEN
from treelora_platform.run_tables import read_run_json
from treelora_platform.tracking_state import State

if TYPE_CHECKING:
    from treelora_platform.tracking_query import History

ALIAS = "best"
RUN_DIR_TAG = "treelora.run_dir"
DEPTH = 4  # runs/, a sweep's folder, its trials, a run


@dataclass(frozen=True)
class Registered:
    """A version of a registered model, and the run that it is of."""

    uri: str
    """`models:/<name>/<version>`."""
    run: RunRecord
    value: float
    """The metric's mean over the run's configuration."""


def register_best(
    history: History,
    experiment: str,
    count: int = 1,
    metric: str = "op",
    mode: str | None = None,
    registered_name: str | None = None,
    filters: Sequence[str] = (),
    runs: Path = Path("runs"),
) -> tuple[Best, list[Registered]]:
    """Register the best run of each of the best configurations; the very best gets alias `best`.

    Args:
        history: What MLflow knows.
        experiment: Its name there.
        count: How many configurations.
        metric, mode, filters: See `find_best`.
        registered_name: Of the model; None: the experiment's.
        runs: Folder under which the runs' own folders lie, for those that MLflow doesn't have whole.

    Returns:
        The ranking, and what was registered, the best first.

    Raises:
        ConfigError, DataError, CheckpointError, TrackingError: see `find_best`, `find_learnt` and `register_run`.
    """
    best = find_best(history, experiment, metric, mode, filters)
    name = registered_name or slugify(experiment)
    found: list[Registered] = []
    with tempfile.TemporaryDirectory(prefix="treelora-register-") as scratch:
        chosen = [(config, config.best_run(best.larger)) for config in best.ranking[:count]]
        folders = [find_learnt(history, run, Path(scratch) / run.run_id, runs) for _, run in chosen]
        # the best comes last, so that `latest` means it as well
        for place, ((config, run), folder) in reversed([*enumerate(zip(chosen, folders, strict=True))]):
            uri = register_run(folder, history.uri, run.run_id, name, None if place else ALIAS)
            found.insert(0, Registered(uri, run, config.mean))
    return best, found


def register_folder(
    run_dir: Path, registered_name: str | None = None, alias: str | None = None, tracking_uri: str | None = None
) -> str:
    """Register what lies in a run's folder, in the MLflow that has the run; returns `models:/<name>/<version>`.

    Args:
        run_dir: The run.
        registered_name: Of the model; None: the folder's name.
        alias: See `register_run`.
        tracking_uri: Server or database; None: where the run is tracked.

    Raises:
        DataError: MLflow has no run of it yet, or wants a password that isn't given.
        ConfigError, CheckpointError, TrackingError: see `register_run`.
    """
    state = State.load(run_dir)
    run_id = state.run_id or read_run_json(run_dir).get("mlflow_run_id")
    if not run_id:
        raise DataError(f"{run_dir}: MLflow has no run of it; `treelora track {run_dir}` sends it")
    address = tracking_uri or state.tracking_uri
    if address is not None and HIDDEN in address:
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            raise DataError(f"{run_dir}: the tracking server wants a password; set MLFLOW_TRACKING_URI, or give --uri")
    return register_run(run_dir, address, run_id, registered_name or run_dir.resolve().name, alias)


def find_learnt(history: History, run: RunRecord, scratch: Path, runs: Path) -> Path:
    """Folder with a run's adapters: MLflow's copy (artifact `learnt`), the folder that the run named, or one in `runs`.

    Raises:
        DataError: there is none; the message says what to do.
        TrackingError: the server can't be reached.
    """
    packed = history.download(run.run_id, scratch, (PACKED,)) / PACKED
    if (packed / "config.yaml").exists():
        return packed
    named = run.tags.get(RUN_DIR_TAG)
    for folder in [*([Path(named)] if named else []), *_run_folders(runs)]:
        if read_run_json(folder).get("mlflow_run_id") == run.run_id:
            return folder
    raise DataError(
        f"run {run.name!r} ({run.run_id}): its adapters are neither in MLflow (artifact {PACKED!r}) nor in a folder "
        f"under {runs}; go to where it was run, or name the folder of runs with --runs"
    )


def _run_folders(runs: Path) -> Iterator[Path]:
    for depth in range(1, DEPTH + 1):
        found = (path.parent for path in sorted(runs.glob("*/" * depth + "run.json")))
        # MLflow's copies of runs may lie there too, and have no commits
        yield from (folder for folder in found if (folder / "checkpoints").is_dir())
