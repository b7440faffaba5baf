"""O-LoRA: the overlap penalty against sums by hand, its gradient, what it does to a stream, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.support.regularising import assert_resumes, context, gradient_of, row_loss, scramble
from tests.support.streams import STEPS, recorded
from tests.unit.test_method_slices import N, R, wide_loop
from treelora.methods.extra_gradient import flatten
from treelora.methods.olora import OLoRA, OLoRAOptions

STRENGTH = 0.7


def begun(folder: Path, index: int, strength: float = STRENGTH) -> Any:
    loop = wide_loop(OLoRA(OLoRAOptions(strength=strength), rank=R), folder)
    state = scramble(loop, 0)
    loop.method.resume_task(context(loop, index), loop.engine, [])
    return loop, state


def overlap(state: dict[str, torch.Tensor], index: int) -> float:
    """Sum over layers, past rows and own rows of |<past row, own row>|, number by number."""
    total = 0.0
    for name, tensor in state.items():
        if ".lora_A." in name:
            rows = tensor.double().tolist()
            for past in rows[: index * R]:
                for own in rows[index * R : (index + 1) * R]:
                    total += abs(sum(p * o for p, o in zip(past, own, strict=True)))
    return total


def test_penalty_by_hand(tmp_path: Path) -> None:
    loop, state = begun(tmp_path, 1, strength=0.5)
    axes = torch.zeros(N * R, 32)
    axes[0, 0], axes[1, 1] = 1.0, 2.0  # the past task's rows
    axes[2, 0], axes[2, 1] = 3.0, -1.0  # own rows: products 3 and -2,
    axes[3, 1] = 0.25  # then 0 and 0.5
    axes[4] = 100.0  # a task to come
    loop.engine.write_adapter({name: axes for name in state if ".lora_A." in name})
    loop.method.resume_task(context(loop, 1), loop.engine, [])
    layers = sum(".lora_A." in name for name in state)
    assert loop.method.penalty_loss(loop.engine).item() == 0.5 * layers * 5.5


@pytest.mark.parametrize("index", [1, 2])
def test_penalty_and_its_gradient(index: int, tmp_path: Path) -> None:
    loop, state = begun(tmp_path, index)
    penalty = loop.method.penalty_loss(loop.engine)
    assert penalty.item() == pytest.approx(STRENGTH * overlap(state, index), rel=1e-5)
    penalty.backward()
    for name, parameter in loop.engine.adapter_leaves().items():
        if ".lora_B." in name:
            assert parameter.grad is None
            continue
        expected = torch.zeros_like(parameter)
        for row, own in enumerate(range(index * R, (index + 1) * R)):
            for past in range(index * R):
                expected[row] += STRENGTH * torch.sign(state[name][own] @ state[name][past]) * state[name][past]
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(parameter.grad, expected)


def test_a_fresh_task_pays_at_once_and_the_first_never(tmp_path: Path) -> None:
    loop, _ = begun(tmp_path, 0)
    assert loop.method.penalty_loss(loop.engine) is None
    loop.method.begin_task(context(loop, 1), loop.engine, [])
    assert loop.method.penalty_loss(loop.engine).item() > 0.1


def test_metrics_tell_value_and_share(tmp_path: Path) -> None:
    loop, state = begun(tmp_path, 1)
    method, engine = loop.method, loop.engine
    engine.backward(row_loss(loop, 1, 0)[0], last=True)
    by_loss_D = flatten(engine.adapter_gradients())
    engine.drop_gradients()
    by_penalty_D = gradient_of(loop, method.penalty_loss(engine) + 0.0 * row_loss(loop, 1, 0)[0])
    engine.backward(row_loss(loop, 1, 0)[0] + method.penalty_loss(engine), last=True)
    method.after_backward(engine)
    scalars = method.metrics().scalars
    assert float(scalars["penalty_loss"]) == pytest.approx(STRENGTH * overlap(state, 1), rel=1e-5)
    assert float(scalars["penalty_ratio"]) == pytest.approx(float(by_penalty_D.norm() / by_loss_D.norm()), rel=1e-4)
    method.step_skipped()
    assert method.metrics().scalars == {}


def test_training_lowers_the_overlap(tmp_path: Path) -> None:
    found = {}
    for strength in (0.0, 0.5):
        loop = wide_loop(OLoRA(OLoRAOptions(strength=strength), rank=R), tmp_path, train={"steps": 30})
        loop.run()
        found[strength] = [overlap(loop.bank[index], index) for index in (1, 2)]
    assert found[0.5][0] < 0.5 * found[0.0][0], found
    assert found[0.5][1] < 0.5 * found[0.0][1], found


def test_records(tmp_path: Path) -> None:
    loop = wide_loop(OLoRA(rank=R), tmp_path)
    loop.run()
    steps, tasks = recorded(loop).steps, recorded(loop).tasks
    assert [record.penalty_loss for record in steps[:STEPS]] == [None] * STEPS
    assert all((record.penalty_loss or 0) > 0 for record in steps[STEPS:])
    assert all((record.penalty_ratio or 0) > 0 for record in steps[STEPS:])
    numbers = sum(tensor.numel() for tensor in loop.bank[-1].values())
    assert [(task.passes, task.state_bytes, task.adapter_bytes) for task in tasks] == [(STEPS, 0, 4 * numbers)] * N


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    wide = {"rank": N * R, "alpha": N * 8, "dropout": 0.1}
    assert_resumes(lambda: OLoRA(rank=R), tmp_path, lora=wide)


@pytest.mark.parametrize("wrong", [{"strength": -0.1}, {"lamda_1": 0.5}])
def test_options_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        OLoRAOptions(**wrong)
