"""Table rows as points of metrics: key, value, time stamp, step. Time stamps are the rows' own, never now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from treelora.data.names import slugify
from treelora_platform.run_tables import read_steps

STEP_METRICS = (
    *("loss", "lr", "grad_norm", "step_seconds", "data_seconds", "peak_memory_mb"),
    *("penalty_ratio", "sparsity", "lcb_mean", "observation_mean"),
)


class Point(NamedTuple):
    """One value of a metric; `time_unix_ms` in milliseconds since 1970."""

    key: str
    value: float
    time_unix_ms: int
    step: int


def step_points(steps: pa.Table, names: Mapping[int, str]) -> Iterator[tuple[int, list[Point]]]:
    """Global step and all its points, in order; empty cells give no point.

    `arms/<slug>` is the share (0 to 1) of the layers whose arm is that past task; `names` gives the tasks'
    names.
    """
    for row in steps.to_pylist():
        step, when = row["global_step"], row["time_unix_ms"]
        values = {key: row[key] for key in STEP_METRICS if row[key] is not None}
        if row["step_seconds"] > 0:
            values["tokens_per_second"] = row["tokens"] / row["step_seconds"]
        arms = Counter(row["arms"] or ())
        for index, count in arms.most_common():
            values[f"arms/{slugify(names.get(index, f'task {index}'))}"] = count / arms.total()
        yield step, [Point(key, float(value), when, step) for key, value in values.items()]


def score_points(scores: pa.Table, times: Mapping[int, int]) -> list[Point]:
    """`score/<mode>/<slug>`, `op/<mode>` and `bwt/<mode>`, in percent, at step = after_index.

    `times` maps a task's index to the time of its last training step, which a score after that task takes
    over.
    """
    from treelora.evaluation.matrix import backward_transfer, matrix_from_table, overall_performance

    def point(key: str, value: float, after: int) -> Point:
        return Point(key, float(value), times.get(after, 0), after)

    points = [
        point(f"score/{row['mode']}/{slugify(row['task'])}", row["score"], row["after_index"])
        for row in scores.to_pylist()
    ]
    for mode in sorted(set(scores["mode"].to_pylist())):
        matrix = matrix_from_table(scores, mode)
        for n in range(1, len(matrix) + 1):
            if np.isfinite(matrix[:n, n - 1]).all():
                points.append(point(f"op/{mode}", overall_performance(matrix, n), n - 1))
                if np.isfinite(np.diagonal(matrix)[:n]).all():
                    points.append(point(f"bwt/{mode}", backward_transfer(matrix, n), n - 1))
    return points


def final_points(run_dir: Path) -> list[Point]:
    """`final/...` of the run's summary, at step = number of tasks learnt."""
    from treelora_platform.summary import summarise

    summary = summarise(run_dir)
    times = read_steps(run_dir, columns=["time_unix_ms"])["time_unix_ms"].to_numpy()
    when = int(times[-1]) if len(times) else 0
    values: dict[str, float | None] = {
        "final/seconds": summary.seconds,
        "final/tokens": summary.tokens,
        "final/tokens_per_second": summary.tokens_per_second,
        "final/stored_bytes": summary.stored_bytes,
    }
    for mode, found in summary.modes.items():
        values |= {
            f"final/op/{mode}": found.op,
            f"final/bwt/{mode}": found.bwt,
            f"final/fwt/{mode}": found.fwt,
        }
    return [Point(k, float(v), when, len(summary.tasks)) for k, v in values.items() if v is not None]
