"""The learning rate of a task's steps."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora.schedule import learning_rate


def rates(steps: int, warmup: float, floor: float, peak: float = 1.0) -> list[float]:
    return [learning_rate(step, steps, peak, warmup, floor) for step in range(1, steps + 1)]


def test_by_hand() -> None:
    # two rising steps of ten: thirds of the peak; then half a cosine over eight
    expected = [1 / 3, 2 / 3, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9))]
    assert rates(10, 0.2, 0.1) == pytest.approx(expected)
    assert rates(10, 0.2, 0.1)[5] == pytest.approx(0.55)  # half-way down
    assert rates(4, 0.0, 0.0) == pytest.approx([0.5 + 0.5 / 2**0.5, 0.5, 0.5 - 0.5 / 2**0.5, 0.0])
    assert rates(3, 1 - 2**-53, 0.25)[-1] == 0.25  # the last step never rises
    assert rates(1, 0.9, 0.25) == pytest.approx([0.25])
    assert rates(3, 0.0, 1.0, peak=7.0) == pytest.approx([7.0] * 3)


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1, exclude_max=True),
    floor=st.floats(0, 1),
    peak=st.floats(1e-6, 10),
)
def test_rises_then_falls_to_the_floor(steps: int, warmup: float, floor: float, peak: float) -> None:
    found = rates(steps, warmup, floor, peak)
    rising = min(int(warmup * steps), steps - 1)
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in found)
    assert all(a < b for a, b in pairwise(found[:rising]))
    assert all(a >= b for a, b in pairwise(found[rising:]))
    assert found[-1] == pytest.approx(peak * floor, abs=1e-12)
