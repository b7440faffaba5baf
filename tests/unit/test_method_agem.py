"""A-GEM: the projection, its reference gradient, the rows kept and drawn, cost, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.support.regularising import assert_resumes, context, loop_with, mean_gradient, row_loss, scramble
from tests.support.streams import STEPS, recorded
from treelora.methods.agem import AGEM, AGEMOptions, project
from treelora.methods.episodic import memory_gradients
from treelora.methods.extra_gradient import flatten

vectors = arrays("float64", 5, elements=st.floats(-3, 3).map(lambda x: round(x, 2)))


@given(gradient=vectors, reference=vectors)
@settings(max_examples=200, deadline=None)
def test_projection_is_the_nearest_that_does_not_oppose(gradient: Any, reference: Any) -> None:
    g, r = torch.from_numpy(gradient), torch.from_numpy(reference)
    z = project(g, r)
    assert float(z @ r) >= -1e-12
    if float(g @ r) >= 0:
        assert torch.equal(z, g)
    else:
        assert abs(float(z @ r)) < 1e-12
        assert float((g - z).norm()) == pytest.approx(float(-(g @ r) / r.norm()), rel=1e-9)  # distance to the plane


def test_by_hand_and_without_a_reference() -> None:
    assert project(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 4.0])).tolist() == [1.0, 0.0]
    assert project(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 3.0])).tolist() == [1.5, -1.5]
    assert project(torch.tensor([1.0, -2.0]), torch.zeros(2)).tolist() == [1.0, -2.0]
    nan = torch.full((2,), torch.nan)
    assert project(torch.tensor([1.0, -2.0]), nan).tolist() == [1.0, -2.0]  # a memory that overflows spoils nothing


@pytest.mark.parametrize("micro_rows", [1, 2, 8])
def test_reference_is_the_mean_loss_gradient_of_the_drawn_rows(micro_rows: int, tmp_path: Path) -> None:
    method = AGEM(AGEMOptions(rows_per_task=4))
    loop = loop_with(method, tmp_path)
    for index in (0, 1):
        method.begin_task(context(loop, index), loop.engine, [])
        method.end_task(loop.engine)
    scramble(loop, 2)
    rows_M3 = method.memory.draw(5, 0, 2, 1)
    assert set(rows_M3[:, 0].tolist()) == {0, 1}
    [reference_D] = memory_gradients(loop.engine, context(loop, 2), [rows_M3], micro_rows)
    rows = [(unit, row) for unit, row, _ in rows_M3.tolist()]
    assert [row_loss(loop, *row)[1] for row in rows] == rows_M3[:, 2].tolist()
    torch.testing.assert_close(reference_D, mean_gradient(loop, rows), rtol=1e-4, atol=1e-7)


def test_the_memory_keeps_distinct_rows_and_draws_them_evenly(tmp_path: Path) -> None:
    method = AGEM(AGEMOptions(rows_per_task=10), seed=1)
    loop = loop_with(method, tmp_path)
    for index in range(3):
        method.begin_task(context(loop, index), loop.engine, [])
        method.end_task(loop.engine)
    kept = [(unit, row) for unit, row, _ in method.memory.rows_M3.tolist()]
    assert len(set(kept)) == len(kept) == 30
    assert {unit: sum(u == unit for u, _ in kept) for unit in range(3)} == {0: 10, 1: 10, 2: 10}
    assert all(0 <= row < 24 for _, row in kept)
    assert [row for unit, row in kept if unit == 0] != [row for unit, row in kept if unit == 1]
    drawn = [tuple(row[:2]) for step in range(300) for row in method.memory.draw(8, 1, 3, step).tolist()]
    counts = [drawn.count(row) for row in kept]
    assert sum(counts) == 2400
    chi_square = sum((count - 80) ** 2 / 80 for count in counts)
    assert 8 < chi_square < 59  # 29 degrees of freedom; without replacement within a step it is a little smaller
    again = method.memory.draw(70, 1, 3, 5).tolist()
    assert sorted(again[:30]) == sorted(again[30:60]) == sorted(method.memory.rows_M3.tolist())


def test_gradients_after_a_step_never_oppose_the_memory(tmp_path: Path) -> None:
    method: Any = AGEM(AGEMOptions(rows_per_task=6, batch_rows=6))
    loop = loop_with(method, tmp_path, train={"steps": 12, "learning_rate": 0.2})
    products: list[tuple[float, float, bool]] = []
    after_backward = method.after_backward

    def spy(engine: Any) -> None:
        before = flatten(engine.adapter_gradients())
        after_backward(engine)
        if len(method.memory):
            rows = method.memory.draw(6, 0, method.task.index, method.step).tolist()
            reference = mean_gradient(loop, [(unit, row) for unit, row, _ in rows])
            after = flatten(engine.adapter_gradients())
            scale = float(reference.norm() * before.norm())
            products.append((float(before @ reference) / scale, float(after @ reference) / scale, before.equal(after)))

    method.after_backward = spy
    loop.run()
    assert len(products) == 24
    assert all(after > -1e-5 for _, after, _ in products)
    assert [before >= 0 for before, _, _ in products] == [same for _, _, same in products]
    assert 0 < sum(same for _, _, same in products) < 24  # both cases were seen
    ratios = [record.penalty_ratio for record in recorded(loop).steps]
    assert ratios[:12] == [None] * 12
    for ratio, (before, _, _) in zip(ratios[12:], products, strict=True):
        assert ratio == pytest.approx(max(0.0, -before), rel=1e-2, abs=1e-6)  # |g - z| / |g| = -cos where it is cut


def test_cost(tmp_path: Path) -> None:
    loop = loop_with(AGEM(AGEMOptions(rows_per_task=8, batch_rows=8, micro_rows=3)), tmp_path)
    loop.run()
    tasks = recorded(loop).tasks
    assert [task.passes for task in tasks] == [STEPS, STEPS * (1 + 3), STEPS * (1 + 3)]
    assert [task.state_bytes for task in tasks] == [8 * 24, 16 * 24, 24 * 24]


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(lambda: AGEM(AGEMOptions(rows_per_task=3, batch_rows=4)), tmp_path)
