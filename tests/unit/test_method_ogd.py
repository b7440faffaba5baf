"""OGD: the basis, orthogonality of gradients and steps, what it buys to first order, bounds, cost, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.regularising import assert_resumes, context, gradient_of, loop_with, row_loss, scramble
from tests.support.streams import STEPS, recorded
from treelora.methods.episodic import PURPOSE_BASIS, choose
from treelora.methods.extra_gradient import flatten, unflatten
from treelora.methods.ogd import OGD, OGDOptions, extend
from treelora.methods.sequential import Sequential


def gram(basis_KD: torch.Tensor) -> torch.Tensor:
    return basis_KD @ basis_KD.T


def in_span(vectors_RD: torch.Tensor, basis_KD: torch.Tensor) -> bool:
    rest = vectors_RD - vectors_RD @ basis_KD.T @ basis_KD
    return bool((rest.norm(dim=1) < 1e-5 * vectors_RD.norm(dim=1)).all())


def test_basis_is_orthonormal_and_spans_all_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(4, 50, generator=generator), 1e-3 * torch.randn(5, 50, generator=generator)
    second[0] = 7.0 * first[1] - first[2]  # nothing new
    second[1] = torch.nan
    basis, strength = extend(torch.zeros(0, 50), torch.zeros(0), first, 20)
    assert basis.shape == (4, 50)
    basis, strength = extend(basis, strength, second, 20)
    assert basis.shape == (7, 50)
    torch.testing.assert_close(gram(basis), torch.eye(7), rtol=0, atol=1e-6)
    assert in_span(torch.cat([first, second[2:]]), basis)
    assert not in_span(torch.randn(1, 50, generator=generator), basis)
    assert float(strength.square().sum()) == pytest.approx(8.0)  # so many unit vectors went in


def test_where_the_basis_is_full_the_strongest_directions_stay() -> None:
    e = torch.eye(6)
    often = torch.stack([e[0], e[0], e[0], e[1], e[1], e[2]])
    basis, strength = extend(torch.zeros(0, 6), torch.zeros(0), often, 2)
    torch.testing.assert_close(basis.square(), e[:2].square(), atol=1e-6, rtol=0)
    basis, strength = extend(basis, strength, torch.stack([e[3]] * 4), 2)
    torch.testing.assert_close(basis.square(), torch.stack([e[3], e[0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(strength.square(), torch.tensor([4.0, 3.0]))
    basis, _ = extend(torch.zeros(0, 6), torch.zeros(0), torch.zeros(2, 6), 2)
    assert basis.shape == (0, 6)


def test_basis_comes_from_gradients_of_single_rows(tmp_path: Path) -> None:
    method = OGD(OGDOptions(rows_per_task=3), seed=4)
    loop = loop_with(method, tmp_path, lora={"dropout": 0.5})
    gradients = []
    for index in (0, 1):
        scramble(loop, index)
        method.begin_task(context(loop, index), loop.engine, [])
        method.end_task(loop.engine)
        loop.engine.module.eval()
        rows = choose(24, 3, 4, index, PURPOSE_BASIS)
        gradients += [gradient_of(loop, row_loss(loop, index, row)[0]) for row in rows]
    assert len(method.basis_KD) == 6
    torch.testing.assert_close(gram(method.basis_KD), torch.eye(6), rtol=0, atol=1e-5)
    assert in_span(torch.stack(gradients), method.basis_KD)


def test_a_step_leaves_past_rows_as_likely_to_first_order(tmp_path: Path) -> None:
    """Along the projected direction a row's log-likelihood changes with the square of the step, else in proportion."""
    method = OGD(OGDOptions(rows_per_task=4))
    loop = loop_with(method, tmp_path)
    loop.engine.module.eval()
    start = scramble(loop, 0)
    method.begin_task(context(loop, 0), loop.engine, [])
    method.end_task(loop.engine)
    past = [(0, row) for row in choose(24, 4, 0, 0, PURPOSE_BASIS)]
    shapes = {name: tensor.shape for name, tensor in start.items()}
    new = gradient_of(loop, row_loss(loop, 1, 0)[0])
    allowed = new - method.within(new)

    def change(direction: torch.Tensor, size: float) -> float:
        before = sum(float(row_loss(loop, *row)[0]) for row in past)
        moved = flatten(start) - size * direction / direction.norm()
        loop.engine.write_adapter(unflatten(moved, shapes))
        after = sum(float(row_loss(loop, *row)[0]) for row in past)
        loop.engine.write_adapter(start)
        return abs(after - before)

    with torch.no_grad():
        assert change(new, 0.08) / change(new, 0.02) < 6  # about 4
        assert change(allowed, 0.08) / change(allowed, 0.02) > 10  # about 16
        assert change(allowed, 0.02) < 0.05 * change(new, 0.02)


@pytest.mark.parametrize("project_step", [True, False])
def test_steps_of_adamw_are_orthogonal_only_where_they_are_projected(project_step: bool, tmp_path: Path) -> None:
    method: Any = OGD(OGDOptions(rows_per_task=3, project_step=project_step))
    loop = loop_with(method, tmp_path)
    gradients, steps = [], []
    after_backward, after_step = method.after_backward, method.after_step

    def spy_backward(engine: Any) -> None:
        before = flatten(engine.adapter_gradients())
        after_backward(engine)
        after = flatten(engine.adapter_gradients())
        if len(method.basis_KD):
            gradients.append(float((method.basis_KD @ after).norm() / before.norm()))
            removed = before - after
            assert in_span(removed[None], method.basis_KD)
        spy_backward.start = flatten(engine.adapter_tensors())  # type: ignore[attr-defined]

    def spy_step(engine: Any, lr: float) -> None:
        after_step(engine, lr)
        step = flatten(engine.adapter_tensors()) - spy_backward.start  # type: ignore[attr-defined]
        if len(method.basis_KD):
            steps.append(float((method.basis_KD @ step).norm() / step.norm()))

    method.after_backward, method.after_step = spy_backward, spy_step
    loop.run()
    assert len(gradients) == len(steps) == 2 * STEPS
    assert max(gradients) < 1e-5
    assert max(steps) < 1e-4 if project_step else min(steps) > 1e-3
    ratios = [record.penalty_ratio for record in recorded(loop).steps]
    assert ratios[:STEPS] == [None] * STEPS
    assert all(ratio and 0 < ratio < 1 for ratio in ratios[STEPS:])


def test_the_first_task_is_plain_training(tmp_path: Path) -> None:
    ours, plain = loop_with(OGD(), tmp_path), loop_with(Sequential(), tmp_path)
    ours.run()
    plain.run()
    assert torch.equal(flatten(ours.bank[0]), flatten(plain.bank[0]))
    assert not torch.allclose(flatten(ours.bank[1]), flatten(plain.bank[1]), atol=1e-3)


def test_bounds_and_cost(tmp_path: Path) -> None:
    method = OGD(OGDOptions(rows_per_task=5, basis_rows=8))
    loop = loop_with(method, tmp_path)
    loop.run()
    tasks = recorded(loop).tasks
    assert [task.passes for task in tasks] == [STEPS + 5] * 3
    numbers = flatten(loop.bank[0]).numel()
    assert [task.state_bytes for task in tasks] == [rows * 4 * (numbers + 1) for rows in (5, 8, 8)]


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(lambda: OGD(OGDOptions(rows_per_task=3, basis_rows=5)), tmp_path)
