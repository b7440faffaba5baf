"""LwF: the distillation by hand and row by row, zero at the old weights, the old model's mode, cost, resumption."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.support.regularising import assert_resumes, context, gradient_of, loop_with, row_loss, scramble
from tests.support.streams import STEPS, recorded, same_adapter
from treelora.engine import read_adapter
from treelora.loop import StreamLoop
from treelora.methods.base import Method
from treelora.methods.lwf import LwF, LwFOptions, distillation
from treelora.methods.sequential import Sequential


def test_distillation_by_hand() -> None:
    new, old = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # the second token agrees
    assert float(distillation(new, old, 1.0)) == pytest.approx(expected)
    assert float(distillation(2 * new, 2 * old, 2.0)) == pytest.approx(expected)
    softened = 1 / (1 + math.sqrt(3))
    expected = 0.5 * math.log(0.5 / softened) + 0.5 * math.log(0.5 / (1 - softened))
    assert float(distillation(new, old, 2.0)) == pytest.approx(expected)
    assert float(distillation(old, new, 1.0)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))  # not alike


def at_second_task(tmp_path: Path, options: LwFOptions, **changes: object) -> tuple[StreamLoop, LwF]:
    method = LwF(options)
    loop = loop_with(method, tmp_path, **changes)
    old = scramble(loop, 0)
    method.begin_task(context(loop, 1), loop.engine, [old])
    method.before_step(1)
    return loop, method


def test_at_the_old_weights_it_is_plain_training(tmp_path: Path) -> None:
    loop, method = at_second_task(tmp_path, LwFOptions(strength=50.0))
    loop.engine.module.train()
    task = context(loop, 1)
    [batch], normaliser = task.micro_batches(0), task.normaliser(0)
    ours = method.loss(loop.engine, batch, normaliser)
    plain = Method.loss(method, loop.engine, batch, normaliser)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(gradient_of(loop, ours), gradient_of(loop, plain), rtol=1e-4, atol=1e-6)
    method.after_backward(loop.engine)
    assert float(method.metrics().scalars["penalty_loss"]) == pytest.approx(0.0, abs=1e-6)


def test_value_against_rows_one_by_one(tmp_path: Path) -> None:
    loop, method = at_second_task(tmp_path, LwFOptions(strength=0.7, temperature=3.0), train={"accumulation": 2})
    task = context(loop, 1)
    old, unit = method.old, loop.units[1]
    assert old is not None
    now = scramble(loop, 1)
    found = sum(method.loss(loop.engine, batch, task.normaliser(0)).item() for batch in task.micro_batches(0))
    assert same_adapter(read_adapter(loop.engine), now)

    def logits(state: dict[str, torch.Tensor], row: int) -> torch.Tensor:
        loop.engine.write_adapter(state)
        prompt, answer = (np.asarray(ids).tolist() for ids in unit.item(row))
        with torch.no_grad():
            return loop.engine.module(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]

    losses, penalties, tokens = 0.0, 0.0, 0
    for row in unit.plan.rows(0):
        p_old = F.softmax(logits(old, int(row)) / 3.0, dim=-1)
        p_new = F.softmax(logits(now, int(row)) / 3.0, dim=-1)
        penalties += float((p_old * (p_old.log() - p_new.log())).sum())
        with torch.no_grad():
            loss, length = row_loss(loop, 1, int(row))
        losses, tokens = losses + float(loss), tokens + length
    assert found == pytest.approx((losses + 0.7 * penalties) / tokens, rel=1e-5)
    method.after_backward(loop.engine)
    assert float(method.metrics().scalars["penalty_loss"]) == pytest.approx(0.7 * penalties / tokens, rel=1e-4)
    assert penalties > 0.01
    method.step_skipped()
    assert method.metrics().scalars == {}


def test_the_old_model_answers_without_dropout(tmp_path: Path) -> None:
    loop, method = at_second_task(tmp_path, LwFOptions(), lora={"dropout": 0.5})
    module = loop.engine.module.train()
    modes: list[tuple[bool, bool]] = []
    handle = module.register_forward_pre_hook(lambda m, args: modes.append((m.training, torch.is_grad_enabled())))
    [batch] = context(loop, 1).micro_batches(0)
    method.loss(loop.engine, batch, 1.0)
    handle.remove()
    assert modes == [(False, False), (True, True)]
    assert all(part.training for part in module.modules())


def test_cost_and_the_first_task(tmp_path: Path) -> None:
    ours, plain = loop_with(LwF(), tmp_path), loop_with(Sequential(), tmp_path)
    ours.run()
    plain.run()
    assert same_adapter(ours.bank[0], plain.bank[0])
    tasks, steps = recorded(ours).tasks, recorded(ours).steps
    assert [task.passes for task in tasks] == [STEPS, 2 * STEPS, 2 * STEPS]
    assert [task.state_bytes for task in tasks] == [0, 0, 0]
    assert [record.penalty_loss for record in steps[:STEPS]] == [None] * STEPS
    assert steps[STEPS].penalty_loss == pytest.approx(0.0, abs=1e-6)
    assert all((record.penalty_loss or 0) > 1e-5 for record in steps[STEPS + 1 : 2 * STEPS])


def test_strength_holds_old_answers(tmp_path: Path) -> None:
    """The stronger the distillation, the less the answers' distribution moves over the second task."""
    moved = []
    for strength in (0.0, 30.0, 300.0):
        changes = {"train": {"steps": 10, "learning_rate": 0.05}}
        loop = loop_with(LwF(LwFOptions(strength=strength)), tmp_path, **changes)
        loop.units = loop.units[:2]
        loop.run()
        probe = LwF()
        probe.begin_task(context(loop, 1), loop.engine, loop.bank[:1])
        probe.before_step(1)
        [batch] = context(loop, 1).micro_batches(0)
        loop.engine.module.eval()
        probe.loss(loop.engine, batch, 1.0)
        probe.after_backward(loop.engine)
        moved.append(float(probe.metrics().scalars["penalty_loss"]))
    assert moved[0] > 1.2 * moved[1], moved
    assert moved[1] > 1.2 * moved[2], moved


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(LwF, tmp_path, every=4)
