"""Online EWC: the Fisher information row by row, the penalty and its gradient, decay, cost, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.support.regularising import assert_resumes, context, gradient_of, loop_with, row_loss, scramble
from tests.support.streams import STEPS, recorded, same_adapter
from treelora.adapters import adapter_parameters
from treelora.engine import read_adapter
from treelora.methods import ewc
from treelora.methods.episodic import PURPOSE_FISHER, choose
from treelora.methods.ewc import EWC, EWCOptions
from treelora.methods.extra_gradient import flatten
from treelora.methods.sequential import Sequential


def test_fisher_is_the_mean_squared_gradient_of_single_rows(tmp_path: Path) -> None:
    method = EWC(EWCOptions(fisher_rows=5), seed=3)
    loop = loop_with(method, tmp_path, lora={"dropout": 0.5})  # it must be off while measuring
    loop.engine.module.train()
    scramble(loop, 0)
    method.begin_task(context(loop, 0), loop.engine, [])
    method.end_task(loop.engine)
    assert loop.engine.module.training
    chosen = choose(24, 5, 3, 0, PURPOSE_FISHER)
    assert len(set(chosen)) == 5
    loop.engine.module.eval()
    squares = [gradient_of(loop, row_loss(loop, 0, row)[0]).square() for row in chosen]
    assert method.fisher_D is not None
    torch.testing.assert_close(method.fisher_D, torch.stack(squares).mean(0), rtol=1e-4, atol=1e-9)
    assert float(method.fisher_D.max()) > 1e-3
    assert all(parameter.grad is None for parameter in adapter_parameters(loop.engine.module).values())


def test_a_row_whose_gradient_overflows_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([torch.inf, 1.0]), torch.tensor([3.0, torch.nan])]
    parts = [(place, gradient, 1.0) for place, gradient in enumerate([*gradients, torch.tensor([3.0, 0.0])])]
    monkeypatch.setattr(ewc, "row_gradients", lambda engine, task, rows: iter(parts))
    monkeypatch.setattr(ewc, "flatten", lambda tensors: torch.zeros(2))
    method = EWC(EWCOptions(fisher_rows=4))
    loop = loop_with(method, tmp_path)
    method.begin_task(context(loop, 0), loop.engine, [])
    method.end_task(loop.engine)
    assert method.fisher_D is not None
    assert method.fisher_D.tolist() == [5.0, 2.0]


def test_fisher_decays_by_gamma(tmp_path: Path) -> None:
    method = EWC(EWCOptions(fisher_rows=3, gamma=0.25))
    alone = EWC(EWCOptions(fisher_rows=3))
    loop = loop_with(method, tmp_path)
    first = scramble(loop, 0)
    method.begin_task(context(loop, 0), loop.engine, [])
    method.end_task(loop.engine)
    assert method.fisher_D is not None
    before = method.fisher_D.clone()
    scramble(loop, 1)
    method.begin_task(context(loop, 1), loop.engine, [first])
    method.end_task(loop.engine)
    alone.begin_task(context(loop, 1), loop.engine, [])
    alone.end_task(loop.engine)
    assert alone.fisher_D is not None
    torch.testing.assert_close(method.fisher_D, 0.25 * before + alone.fisher_D)


def test_penalty_and_its_gradient(tmp_path: Path) -> None:
    method = EWC(EWCOptions(strength=8.0))
    loop = loop_with(method, tmp_path)
    old = scramble(loop, 0)
    fisher_D = torch.rand(flatten(old).numel(), generator=torch.Generator().manual_seed(7))
    method.load_state_dict({"fisher": fisher_D})
    method.begin_task(context(loop, 1), loop.engine, [{}, old])

    at_old = method.penalty_loss(loop.engine)
    assert at_old is not None
    assert at_old.item() == 0.0
    assert not gradient_of(loop, at_old).any()

    moved_D = flatten(scramble(loop, 1)) - flatten(old)
    penalty = method.penalty_loss(loop.engine)
    assert penalty is not None
    assert penalty.item() == pytest.approx(4.0 * float((fisher_D * moved_D**2).sum()), rel=1e-5)
    torch.testing.assert_close(gradient_of(loop, penalty), 8.0 * fisher_D * moved_D)

    penalty = method.penalty_loss(loop.engine)
    assert penalty is not None
    loop.engine.backward(0.0 * row_loss(loop, 1, 0)[0] + 3.0 * row_loss(loop, 1, 1)[0] + penalty, last=True)
    method.after_backward(loop.engine)
    by_loss = flatten(loop.engine.adapter_gradients()) - 8.0 * fisher_D * moved_D
    scalars = method.metrics().scalars
    assert float(scalars["penalty_loss"]) == penalty.item()
    assert float(scalars["penalty_ratio"]) == pytest.approx(
        float((8.0 * fisher_D * moved_D).norm() / by_loss.norm()), rel=1e-4
    )
    method.step_skipped()
    assert method.metrics().scalars == {}


def test_nothing_is_paid_for_the_first_task(tmp_path: Path) -> None:
    loop = loop_with(EWC(), tmp_path)
    loop.method.begin_task(context(loop, 0), loop.engine, [])
    assert loop.method.penalty_loss(loop.engine) is None
    assert loop.method.state_dict() == {}


def test_a_stream_is_held_back_as_far_as_lambda_says(tmp_path: Path) -> None:
    """What the penalty weighs, sum F (w - w*)^2 over the second task, falls as lambda rises; 0 is plain training."""
    changes = {"train": {"steps": 12, "learning_rate": 0.02}}
    plain = loop_with(Sequential(), tmp_path, **changes)
    plain.run()
    moved = []
    for strength in (0.0, 10.0, 100.0):
        loop = loop_with(EWC(EWCOptions(strength=strength, fisher_rows=24)), tmp_path, **changes)
        loop.units = loop.units[:2]
        method: Any = loop.method
        fishers: list[torch.Tensor] = []
        end_task = method.end_task
        method.end_task = lambda engine, end_task=end_task, m=method, f=fishers: (
            end_task(engine),
            f.append(m.fisher_D),
        )
        loop.run()
        w1_D, w2_D = (flatten(state) for state in loop.bank)
        torch.testing.assert_close(w1_D, flatten(plain.bank[0]))
        if strength == 0:
            torch.testing.assert_close(w2_D, flatten(plain.bank[1]), rtol=1e-4, atol=1e-6)
        moved.append(float((fishers[0] * (w2_D - w1_D).square()).sum()))
    assert moved[0] > 1.2 * moved[1], moved
    assert moved[1] > 1.2 * moved[2], moved


def test_records_and_cost(tmp_path: Path) -> None:
    method = EWC(EWCOptions(fisher_rows=7))
    loop = loop_with(method, tmp_path)
    loop.run()
    steps, tasks = recorded(loop).steps, recorded(loop).tasks
    assert [task.passes for task in tasks] == [STEPS + 7] * 3
    numbers = flatten(loop.bank[0]).numel()
    assert [task.state_bytes for task in tasks] == [4 * numbers] * 3
    assert all(record.penalty_loss is None for record in steps[:STEPS])
    assert steps[STEPS].penalty_loss == 0.0  # nothing has moved yet
    assert all((record.penalty_loss or 0) > 0 for record in steps[STEPS + 1 : 2 * STEPS])
    assert all((record.penalty_ratio or 0) > 0 for record in steps[STEPS + 1 : 2 * STEPS])
    assert same_adapter(read_adapter(loop.engine), loop.bank[-1])


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(lambda: EWC(EWCOptions(fisher_rows=4, strength=1e4)), tmp_path)


@pytest.mark.parametrize("wrong", [{"gamma": 1.1}, {"strength": -1.0}, {"fisher_rows": 0}, {"lambda": 1.0}])
def test_options_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EWCOptions(**wrong)
