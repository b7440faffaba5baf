"""How long a comparison takes: `python benchmarks/compare_runs.py --runs 2000`; made-up runs in a scratch database.

The runs have all fields of a configuration as parameters, the tags and final metrics of a real run of five tasks in
two ways of inference, four methods, two ranks, and an own seed each. Seconds of reading them, of selecting and
grouping, of means and tests, and of writing the tables; making the runs is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from treelora_platform.config import ExperimentConfig
from treelora_platform.experiments.analysis import compare_groups
from treelora_platform.experiments.compare import write_pages
from treelora_platform.experiments.groups import select
from treelora_platform.experiments.tables import rows_table, sheets_of
from treelora_platform.sheets import write_sheets, write_table
from treelora_platform.tracking import PARAMS_BATCH, MlflowServer
from treelora_platform.tracking_query import History
from treelora_platform.tracking_state import loggable_params

EXPERIMENT = "made-up"
METHODS, RANKS, MODES = ("treelora", "sequential", "ewc", "gem"), (4, 8), ("last", "routed")
TASKS = ("colours", "moods", "numbers", "places", "verbs")


def main() -> None:
    """Make runs, compare them, print seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--by", default="method,lora.rank")
    parser.add_argument("--uri", help="an empty server or database to take instead of a scratch database")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        uri = args.uri or f"sqlite:///{scratch}/mlflow.db"
        began = time.perf_counter()
        fill(uri, args.runs)
        print(f"made {args.runs} runs in {time.perf_counter() - began:.0f} s")
        took: dict[str, float] = {}
        history = History(uri)
        _timed(took, "connect", history.experiments)
        records = _timed(took, "read from MLflow", lambda: history.runs(EXPERIMENT))
        by = args.by.split(",")
        chosen = _timed(took, "select and group", lambda: select(records, by))
        found = _timed(took, "means, intervals, tests", lambda: compare_groups(EXPERIMENT, chosen))
        _timed(took, "write tables", lambda: _write(found, Path(scratch)))
    pairs = found.differences[0].found.pairs if found.differences else 0
    print(f"{len(records)} runs of {len(records[0].params)} parameters in {len(found.groups)} groups; "
          f"{len(found.differences)} comparisons of {pairs} pairs each")  # fmt: skip
    table = Table()
    table.add_column("what")
    table.add_column("seconds", justify="right")
    for what, seconds in (took | {"all": sum(took.values())}).items():
        table.add_row(what, f"{seconds:.2f}")
    Console().print(table)


def fill(uri: str, runs: int) -> None:
    """Log made-up runs through MLflow's store, three requests each."""
    from mlflow.entities import Metric, Param, RunTag

    server = MlflowServer(uri)
    experiment_id = server._experiment(EXPERIMENT)
    fields = loggable_params(ExperimentConfig().as_dict())
    rng = np.random.default_rng(0)
    for i in range(runs):
        method, rank = METHODS[i % 4], RANKS[i // 4 % 2]
        start, seed = 1_700_000_000_000 + i, i // 8
        run_id = server.client.create_run(experiment_id, start_time=start, run_name=f"run-{i}").info.run_id
        own = fields | {"name": f"run-{i}", "method": method, "seed": str(seed), "lora.rank": str(rank)}
        params = [Param(key, value) for key, value in own.items()]
        tags = {"method": method, "stream": "builtin", "order": ", ".join(TASKS), "seed": str(seed), "data_hash": "0"}
        tags |= {f"version.{package}": "1" for package in "abcdefghij"}
        metrics = [Metric(key, value, start, len(TASKS)) for key, value in _metrics(rng, METHODS.index(method)).items()]
        entities = [RunTag(key, value) for key, value in tags.items()]
        server.client.log_batch(run_id, metrics, params[:PARAMS_BATCH], entities)
        for first in range(PARAMS_BATCH, len(params), PARAMS_BATCH):
            server.client.log_batch(run_id, params=params[first : first + PARAMS_BATCH])
        server.client.set_terminated(run_id, "FINISHED", start + 1000)


def _metrics(rng: np.random.Generator, better: int) -> dict[str, float]:
    found = {"final/seconds": 100.0, "final/tokens": 1e5, "final/tokens_per_second": 1e3, "final/stored_bytes": 1e6}
    for mode in MODES:
        scores = 50.0 + better + 5 * rng.standard_normal(len(TASKS))
        found |= {f"score/{mode}/{task}": float(score) for task, score in zip(TASKS, scores, strict=True)}
        found |= {f"final/op/{mode}": float(scores.mean()), f"final/bwt/{mode}": 5.0 + float(rng.standard_normal())}
    return found


def _write(found: Any, folder: Path) -> None:
    write_table(folder, "rows", rows_table(found))
    write_sheets(folder, sheets_of(found))
    write_pages(found, folder)


def _timed(taken: dict[str, float], what: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    taken[what] = time.perf_counter() - began
    return result


if __name__ == "__main__":
    main()
