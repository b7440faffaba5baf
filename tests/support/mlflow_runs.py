"""Made-up runs in a real MLflow store: a SQLite database or a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from treelora_platform.tracking import PARAMS_BATCH, MlflowServer

START_MS = 1_700_000_000_000
Points = float | Sequence[tuple[int, float]]


def add_run(
    client_uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, object] | None = None,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, Points] | None = None,
    artifacts_folder: Path | None = None,
    parent: str | None = None,
    status: str = "FINISHED",
    start_ms: int | None = None,
) -> str:
    """Log a run and return its id; a metric is a number (step 0), or (step, value) pairs.

    `start_ms` None: one second after the newest run of the experiment, so that runs are in the order of the calls.
    """
    from mlflow.entities import Metric, Param, RunTag

    server = MlflowServer(client_uri)
    client, experiment_id = server.client, server._experiment(experiment)
    if start_ms is None:
        newest = client.search_runs([experiment_id], max_results=1, order_by=["attributes.start_time DESC"])
        start_ms = newest[0].info.start_time + 1000 if newest else START_MS
    own = {"mlflow.parentRunId": parent} if parent else {}
    run_id = client.create_run(experiment_id, start_time=start_ms, run_name=name).info.run_id
    entities = [Param(key, str(value)) for key, value in (params or {}).items()]
    for first in range(0, len(entities), PARAMS_BATCH):
        client.log_batch(run_id, params=entities[first : first + PARAMS_BATCH], synchronous=True)
    points = [
        Metric(key, float(value), start_ms, step)
        for key, found in (metrics or {}).items()
        for step, value in ([(0, found)] if isinstance(found, int | float) else found)
    ]
    all_tags = [RunTag(key, str(value)) for key, value in {**(tags or {}), **own}.items()]
    client.log_batch(run_id, metrics=points, tags=all_tags, synchronous=True)
    if artifacts_folder is not None:
        client.log_artifacts(run_id, str(artifacts_folder))
    if status != "RUNNING":
        client.set_terminated(run_id, status, start_ms + 60_000)
    return run_id


def run_tags(method: str, tasks: Sequence[str], seed: int = 0, **more: str) -> dict[str, str]:
    """Tags as `run.py` sets them."""
    return {"method": method, "stream": "builtin", "order": ", ".join(tasks), "seed": str(seed), **more}


def final_metrics(
    op: float | Mapping[str, float],
    bwt: float | Mapping[str, float] | None = None,
    fwt: float | None = None,
    seconds: float = 10.0,
    tokens: int = 1000,
    stored_bytes: int = 4096,
) -> dict[str, Points]:
    """`final/...` as a run logs them; a number instead of a mapping is of the mode `last`."""
    found: dict[str, Points] = {
        "final/seconds": seconds,
        "final/tokens": tokens,
        "final/tokens_per_second": tokens / seconds,
        "final/stored_bytes": stored_bytes,
    }
    for key, values in (("op", op), ("bwt", bwt), ("fwt", fwt)):
        by_mode = values if isinstance(values, Mapping) else {} if values is None else {"last": values}
        found |= {f"final/{key}/{mode}": float(value) for mode, value in by_mode.items()}
    return found
