"""What a study keeps of each finished run: a line of `finished.jsonl`, all that its tables need.

A run's folder may go, or be on another machine: while its line is there, the run isn't repeated. The lines are small
enough to be kept under version control, as evidence from which anyone can make the tables again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from treelora.evaluation.matrix import matrix_from_table
from treelora_platform.config import ExperimentConfig
from treelora_platform.jsonl import JsonLog
from treelora_platform.prepare import run_folder
from treelora_platform.run_record import finished_record
from treelora_platform.run_tables import read_scores, read_tasks
from treelora_platform.summary import summarise

Matrix = tuple[tuple[float | None, ...], ...]
FILE = "finished.jsonl"
"""Beside the folder of runs."""


@dataclass(frozen=True)
class Scores:
    """One way of inference, in percent, as in `summary.ModeSummary`; None where something was not measured."""

    op: float | None
    bwt: float | None
    fwt: float | None
    matrix: Matrix
    """R[i][j]: score on task i after task j."""


@dataclass(frozen=True)
class Finished:
    """One finished run. All that a method does between tasks counts in `seconds` and `passes`."""

    run: str
    config_hash: str
    """`ExperimentConfig.lasting_digest`."""
    data_hash: str
    commit: str
    """Of the source that the run was made with."""
    versions: dict[str, str]
    steps: int
    """Steps a task; of joint training, of all tasks together."""
    seconds: float
    """Training time: steps, and what the method does before and between them; no evaluation."""
    passes: int | None
    """Forward passes of one worker in training."""
    passes_per_step: float | None
    """Passes a micro-batch: 1 for plain training."""
    tokens: int
    stored_bytes: int
    router_accuracy: float | None
    modes: dict[str, Scores]


class FinishedLog(JsonLog[Finished]):
    """A study's finished runs, in the order in which they ended."""

    kind = Finished
    what = "a study's finished runs"


def finished(config: ExperimentConfig) -> Finished | None:
    """What is known of a run of exactly this configuration: from the study's log, else from the run's folder.

    Raises:
        DataError: the log or a table of the run is damaged.
    """
    path = log_of(config).path
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    known = _entries(path, stamp).get(config.name)
    if known and known.config_hash == config.lasting_digest():
        return known
    return _measured(config)


def keep(config: ExperimentConfig) -> Finished | None:
    """Write down what a run has found, if it is finished and isn't in the log."""
    found = finished(config)
    log = log_of(config)
    if found and found not in log.entries():
        log.add(found)
    return found


def log_of(config: ExperimentConfig) -> FinishedLog:
    """The log of the study that a run belongs to."""
    return FinishedLog(Path(config.output_dir).parent / FILE)


@lru_cache(maxsize=4)
def _entries(path: Path, stamp: int) -> dict[str, Finished]:
    return {entry.run: entry for entry in FinishedLog(path).entries()} if stamp else {}


def _measured(config: ExperimentConfig) -> Finished | None:
    folder, record = run_folder(config), finished_record(config)
    if record is None:
        return None
    summary, tasks, scores = summarise(folder), read_tasks(folder), read_scores(folder)
    steps = int(pc.sum(tasks["steps"]).as_py() or 0)
    passes = None if tasks["passes"].null_count else int(pc.sum(tasks["passes"]).as_py() or 0)
    micro_batches = steps * config.train.accumulation
    versions = {name: str(version) for name, version in record.get("versions", {}).items()}
    return Finished(
        run=config.name,
        config_hash=config.lasting_digest(),
        data_hash=str(record.get("data_hash", "")),
        commit=versions.pop("commit", "unknown"),
        versions=versions,
        steps=int(pc.max(tasks["steps"]).as_py() or 0),
        # the steps' own time (`summary.seconds`) leaves out what a method does before the first of them
        seconds=float(pc.sum(tasks["train_seconds"]).as_py() or 0.0),
        passes=passes if micro_batches else None,
        passes_per_step=passes / micro_batches if passes is not None and micro_batches else None,
        tokens=summary.tokens,
        stored_bytes=summary.stored_bytes,
        router_accuracy=pc.mean(tasks["router_accuracy"]).as_py(),
        modes={
            mode: Scores(found.op, found.bwt, found.fwt, _matrix(scores, mode)) for mode, found in summary.modes.items()
        },
    )


def _matrix(scores: pa.Table, mode: str) -> Matrix:
    return tuple(
        tuple(float(value) if value == value else None for value in row) for row in matrix_from_table(scores, mode)
    )
