"""What a study's finished runs say, one row a run and way of inference."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from treelora_platform.studies.finished import Finished, Matrix, finished
from treelora_platform.studies.spec import Job, Study


@dataclass(frozen=True)
class Row:
    """One run in one way of inference; the fields are those of `Finished` and `Scores`, and of the job."""

    variant: str
    method: str
    mode: str
    order: int
    seed: int
    steps: int
    op: float | None
    bwt: float | None
    fwt: float | None
    seconds: float
    passes: int | None
    passes_per_step: float | None
    tokens: int
    stored_bytes: int
    router_accuracy: float | None
    settings: str
    """What tuning chose, as JSON."""
    run: str
    commit: str
    tasks: tuple[str, ...]
    matrix: Matrix

    @property
    def pair(self) -> tuple[int, int]:
        """What runs are paired by."""
        return self.order, self.seed


def collect(study: Study, jobs: Iterable[Job]) -> list[Row]:
    """Rows of all complete runs among the jobs, in their order.

    Of a bound, and of the reference's twin, in its own way of inference only.

    Raises:
        DataError: a table of a run is damaged.
    """
    rows = [row for job in jobs if (found := finished(job.config)) for row in rows_of(job, found)]
    # a bound has one adapter at most, so that ways of inference make no difference
    whole = {name for name in study.variants if study.in_order(name) and not study.twin_of_reference(name)}
    return [row for row in rows if row.variant in whole or row.mode == study.variants[row.variant].mode]


def rows_of(job: Job, found: Finished) -> list[Row]:
    """Rows of one finished run: of the ways of inference that all tasks were scored by at its end."""
    return [
        Row(
            variant=job.variant,
            method=job.config.method,
            mode=mode,
            order=job.order,
            seed=job.seed,
            steps=found.steps,
            op=scores.op,
            bwt=scores.bwt,
            fwt=scores.fwt,
            seconds=found.seconds,
            passes=found.passes,
            passes_per_step=found.passes_per_step,
            tokens=found.tokens,
            stored_bytes=found.stored_bytes,
            router_accuracy=found.router_accuracy,
            settings=json.dumps(job.setting),
            run=found.run,
            commit=found.commit,
            tasks=tuple(job.config.stream.order),
            matrix=scores.matrix,
        )
        for mode, scores in found.modes.items()
        if _scored(scores.matrix)
    ]


def _scored(matrix: Matrix) -> bool:
    cells = [cell for task in matrix for cell in task]
    never = all(cell is None for cell in cells)  # a model that isn't trained has scores from before the first task only
    return never or all(task[-1] is not None for task in matrix)


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
