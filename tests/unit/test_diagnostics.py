import math

import pytest

from treelora.loop_records import StepRecord
from treelora_platform.diagnostics import PenaltyWatch


def record(task, step, ratio):
    return StepRecord(
        global_step=step, task=task, task_index=0, step=step, time_unix_ms=0, loss=1.0, lr=0.1, grad_norm=1.0,
        step_seconds=0.1, tokens=1, rows=1, peak_memory_mb=1.0, penalty_ratio=ratio,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "warned_at", "text"),
    [
        ([None, None, None], None, ""),
        ([0.1, 9.9, 0.3], None, ""),
        ([0.1, 10.5, 400.0], 2, "is 10.5 times"),
        ([0.1, math.nan, 0.1], 2, "is nan times"),
        ([0.0, 1e-9, 1e-8], 3, "at most 1e-08"),
        ([1e-9, 0.2, 1e-8], None, ""),
    ],
)
def test_one_warning_a_task(ratios, warned_at, text):
    watch = PenaltyWatch()
    for task in ("first", "second"):
        said = [watch.see(record(task, step, ratio), len(ratios)) for step, ratio in enumerate(ratios, start=1)]
        assert [step for step, warning in enumerate(said, start=1) if warning] == ([warned_at] if warned_at else [])
        assert all(f"{task}, step" in warning and text in warning for warning in said if warning)
