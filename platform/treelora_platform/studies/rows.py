"""What a study's finished runs say, one row a run and way of inference."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from treelora_platform.prepare import run_folder
from treelora_platform.run_tables import read_run_json, read_scores, read_tasks
from treelora_platform.studies.run import is_complete
from treelora_platform.studies.spec import Job, Study
from treelora_platform.summary import summarise

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Row:
    """One run in one way of inference; None where something was not measured.

    Scores in percent, as in `summary.ModeSummary`. All that a method does between tasks counts in `seconds` and
    `passes` as far as the run's table of tasks counts it.
    """

    variant: str
    method: str
    mode: str
    order: int
    seed: int
    steps: int
    """Steps a task; of joint training, of all tasks together."""
    op: float | None
    bwt: float | None
    fwt: float | None
    seconds: float
    """Training time: steps, and what the method does before and between them; no evaluation."""
    passes: int | None
    """Forward passes of one worker in training."""
    passes_per_step: float | None
    """Passes a micro-batch: 1 for plain training."""
    tokens: int
    stored_bytes: int
    router_accuracy: float | None
    settings: str
    """What tuning chose, as JSON."""
    run: str
    commit: str
    """Of the source that the run was made with."""
    tasks: tuple[str, ...]
    matrix: Matrix
    """R[i][j]: score on task i after task j."""

    @property
    def pair(self) -> tuple[int, int]:
        """What runs are paired by."""
        return self.order, self.seed


def collect(study: Study, jobs: Iterable[Job]) -> list[Row]:
    """Rows of all complete runs among the jobs, in their order; of a bound, in its own way of inference only.

    Raises:
        DataError: a table of a run is damaged.
    """
    rows = [row for job in jobs if is_complete(job.config) for row in rows_of(job)]
    # a bound has one adapter at most, so that ways of inference make no difference
    return [row for row in rows if study.in_order(row.variant) or row.mode == study.variants[row.variant].mode]


def rows_of(job: Job) -> list[Row]:
    """Rows of one complete run."""
    folder = run_folder(job.config)
    summary, tasks, scores, record = summarise(folder), read_tasks(folder), read_scores(folder), read_run_json(folder)
    steps = int(pc.sum(tasks["steps"]).as_py() or 0)
    passes = None if tasks["passes"].null_count else int(pc.sum(tasks["passes"]).as_py() or 0)
    micro_batches = steps * job.config.train.accumulation
    # the steps' own time (`summary.seconds`) leaves out what a method does before the first of them
    seconds = float(pc.sum(tasks["train_seconds"]).as_py() or 0.0)
    return [
        Row(
            variant=job.variant,
            method=job.config.method,
            mode=mode,
            order=job.order,
            seed=job.seed,
            steps=int(pc.max(tasks["steps"]).as_py() or 0),
            op=found.op,
            bwt=found.bwt,
            fwt=found.fwt,
            seconds=seconds,
            passes=passes if micro_batches else None,
            passes_per_step=passes / micro_batches if passes is not None and micro_batches else None,
            tokens=summary.tokens,
            stored_bytes=summary.stored_bytes,
            router_accuracy=pc.mean(tasks["router_accuracy"]).as_py(),
            settings=json.dumps(job.setting),
            run=job.config.name,
            commit=str(record.get("versions", {}).get("commit", "unknown")),
            tasks=tuple(job.config.stream.order),
            matrix=_matrix(scores, mode),
        )
        for mode, found in summary.modes.items()
    ]


def _matrix(scores: pa.Table, mode: str) -> Matrix:
    from treelora.evaluation.matrix import matrix_from_table

    return tuple(
        tuple(float(value) if value == value else None for value in row) for row in matrix_from_table(scores, mode)
    )


def at_equal_steps(rows: Sequence[Row], jobs: Iterable[Job]) -> list[Row]:
    """The rows that belong to these jobs; the others are of other numbers of steps."""
    wanted = {(job.variant, job.config.name) for job in jobs}
    return [row for row in rows if (row.variant, row.run) in wanted]


def rows_table(rows: Sequence[Row]) -> pa.Table:
    """All rows with all columns, for Parquet."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)


SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("variant", "method", "mode")),
        *((name, pa.int64()) for name in ("order", "seed", "steps")),
        *((name, pa.float64()) for name in ("op", "bwt", "fwt", "seconds")),
        ("passes", pa.int64()),
        ("passes_per_step", pa.float64()),
        *((name, pa.int64()) for name in ("tokens", "stored_bytes")),
        ("router_accuracy", pa.float64()),
        *((name, pa.string()) for name in ("settings", "run", "commit")),
        ("tasks", pa.list_(pa.string())),
        ("matrix", pa.list_(pa.list_(pa.float64()))),
    ]
)
