"""GEM: the quadratic programme against independent solutions, the constraints in training, cost, resumption."""

from __future__ import annotations

from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from tests.support.regularising import assert_resumes, loop_with, mean_gradient
from tests.support.streams import STEPS, recorded
from treelora.methods.extra_gradient import flatten
from treelora.methods.gem import GEM, GEMOptions, project

entries = st.floats(-2, 2).map(lambda x: round(x, 2))


def by_active_sets(gradient: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Nearest point with memory @ z >= 0: of all points where some constraints are tight, the nearest allowed."""
    best: np.ndarray | None = None
    distance = np.inf
    tasks = range(len(memory))
    for tight in chain.from_iterable(combinations(tasks, n) for n in range(len(memory) + 1)):
        rows = memory[list(tight)]
        z = gradient - rows.T @ np.linalg.lstsq(rows.T, gradient, rcond=None)[0] if tight else gradient
        if (memory @ z >= -1e-9).all() and np.linalg.norm(z - gradient) < distance:
            best, distance = z, float(np.linalg.norm(z - gradient))
    assert best is not None
    return best


@given(gradient=arrays("float64", 6, elements=entries), memory=arrays("float64", (4, 6), elements=entries))
@settings(max_examples=150, deadline=None)
def test_projection_is_the_nearest_allowed_point(gradient: np.ndarray, memory: np.ndarray) -> None:
    assume(np.linalg.svd(memory)[1].min() > 0.05)  # else the two disagree on what rounding makes of it
    z = project(torch.from_numpy(gradient), torch.from_numpy(memory)).numpy()
    np.testing.assert_allclose(z, by_active_sets(gradient, memory), atol=1e-7)
    assert (memory @ z >= -1e-9).all()
    if (memory @ gradient >= 0).all():
        assert (z == gradient).all()


@pytest.mark.parametrize("seed", range(5))
def test_with_a_margin_against_scipy(seed: int) -> None:
    """The dual's own objective, minimised by another solver over v >= margin; the constraints hold all the same."""
    generator = np.random.default_rng(seed)
    gradient, memory = generator.normal(size=20), generator.normal(size=(5, 20))
    memory[0] -= 0.5 * gradient  # one task objects

    def objective(v: np.ndarray) -> float:
        return float(0.5 * np.square(memory.T @ v).sum() + gradient @ (memory.T @ v))

    for margin in (0.0, 0.1, 0.5):
        found = minimize(objective, np.ones(5), bounds=[(margin, None)] * 5, tol=1e-14, method="L-BFGS-B")
        z = project(torch.from_numpy(gradient), torch.from_numpy(memory), margin).numpy()
        np.testing.assert_allclose(z, gradient + memory.T @ found.x, atol=1e-4)
        assert (memory @ z >= -1e-9).all()


def test_by_hand() -> None:
    g = torch.tensor([1.0, -1.0, 0.0])
    axis, diagonal = torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0], [-1.0, 0.0, 1.0]])
    assert project(g, axis).tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(project(g, diagonal), torch.tensor([0.5, 0.0, 0.5]))
    assert project(g, -axis, margin=0.5) is g  # nobody objects: the margin doesn't matter
    assert project(g, axis, margin=0.75).tolist() == [1.0, 0.5, 0.0]  # v = 3/4 where 1/2 would do


def test_dependent_tiny_and_spoilt_memories() -> None:
    g = torch.tensor([1.0, -1.0, 0.5])
    same = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, 3)
    torch.testing.assert_close(project(g, same), torch.tensor([1.0, 0.0, 0.5]))
    tiny = torch.tensor([[0.0, 1e-6, 0.0], [0.0, 0.0, 1e4], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(project(g, tiny), torch.tensor([1.0, 0.0, 0.5]))
    opposite = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    torch.testing.assert_close(project(g, opposite), torch.tensor([1.0, 0.0, 0.5]))
    assert project(g, torch.full((1, 3), torch.nan)) is g


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gradients_after_a_step_oppose_no_past_task(margin: float, tmp_path: Path) -> None:
    method: Any = GEM(GEMOptions(rows_per_task=4, margin=margin))
    loop = loop_with(method, tmp_path, train={"steps": 12, "learning_rate": 0.2})
    cosines: list[tuple[float, float]] = []
    after_backward = method.after_backward

    def spy(engine: Any) -> None:
        before = flatten(engine.adapter_gradients())
        after_backward(engine)
        after = flatten(engine.adapter_gradients())
        rows = [(unit, row) for unit, row, _ in method.memory.rows_M3.tolist()]
        references = [mean_gradient(loop, [row for row in rows if row[0] == task]) for task in range(method.task.index)]
        worst = [min((float(g @ r / r.norm() / g.norm()) for r in references), default=1.0) for g in (before, after)]
        cosines.append((worst[0], worst[1]))
        assert before.equal(after) == (worst[0] >= 0)

    method.after_backward = spy
    loop.run()
    assert len(cosines) == 36
    assert all(after > -1e-5 for _, after in cosines)
    objected = [step for step, (before, _) in enumerate(cosines) if before < 0]
    assert objected
    assert len(objected) < 24
    ratios = [record.penalty_ratio for record in recorded(loop).steps]
    assert ratios[:12] == [None] * 12
    assert [step for step, ratio in enumerate(ratios) if ratio] == objected


def test_cost_grows_with_the_tasks(tmp_path: Path) -> None:
    loop = loop_with(GEM(GEMOptions(rows_per_task=5, micro_rows=4)), tmp_path)
    loop.run()
    tasks = recorded(loop).tasks
    assert [task.passes for task in tasks] == [STEPS, STEPS * (1 + 2), STEPS * (1 + 4)]
    assert [task.state_bytes for task in tasks] == [5 * 24, 10 * 24, 15 * 24]


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(lambda: GEM(GEMOptions(rows_per_task=3)), tmp_path)
