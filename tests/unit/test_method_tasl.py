"""TaSL: importance against a plain recomputation, the four classes of units, skipped steps, cost, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.regularising import assert_resumes, context, loop_with, row_loss, scramble
from tests.support.streams import STEPS, recorded, same_adapter
from treelora.adapters import layer_of
from treelora.engine import read_adapter
from treelora.methods.sequential import Sequential
from treelora.methods.tasl import TaSL, TaSLOptions, old_share, scale


def test_scale_and_classes_by_hand() -> None:
    assert scale(np.array([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert scale(np.array([2.0, 2.0])).tolist() == [0.0, 0.0]
    past, now = np.array([0.9, 0.8, 0.1, 0.0, 0.2, 0.3]), np.array([1.0, 0.0, 0.9, 0.1, 0.2, 0.3])
    # a third of six units is important: those above the quantile at 2/3, .467 before (two units) and .5 now (two)
    assert old_share(past, now, 1 / 3, 0.7).tolist() == [0.7, 1.0, 0.0, 0.5, 0.5, 0.5]
    assert old_share(past, now, 0.01, 0.6).tolist() == [0.6, 0.5, 0.5, 0.5, 0.5, 0.5]  # the largest, at least
    assert old_share(np.zeros(3), np.zeros(3), 0.2, 0.7).tolist() == [0.5] * 3


@pytest.mark.parametrize("unit", ["matrix", "module"])
def test_importance_over_the_steps(unit: Any, tmp_path: Path) -> None:
    method: Any = TaSL(TaSLOptions(unit=unit, smoothing=0.6))
    loop = loop_with(method, tmp_path)
    loop.units = loop.units[:1]
    seen: list[dict[str, np.ndarray]] = []
    scores: dict[str, float] = {}
    after_backward, end_task = method.after_backward, method.end_task

    def spy(engine: Any) -> None:
        after_backward(engine)
        gradients, weights = engine.adapter_gradients(), engine.adapter_tensors()
        seen.append({name: np.abs(weights[name].numpy() * gradients[name].numpy()) for name in weights})

    def spy_end(engine: Any) -> None:
        scores.update(method.importance())
        end_task(engine)

    method.after_backward, method.end_task = spy, spy_end
    loop.run()
    assert len(seen) == STEPS
    parts: dict[str, list[np.ndarray]] = {}
    for name in seen[0]:
        smooth = uncertain = np.zeros_like(seen[0][name])
        for step in seen:
            smooth = 0.6 * smooth + 0.4 * step[name]
            uncertain = 0.6 * uncertain + 0.4 * np.abs(step[name] - smooth)
        parts.setdefault(name if unit == "matrix" else layer_of(name), []).append((smooth * uncertain).ravel())
    assert len(parts) == {"matrix": 8, "module": 4}[unit]
    expected = {key: float(np.concatenate(arrays).mean()) for key, arrays in parts.items()}
    assert scores == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(method.past_U, scale(np.array(list(expected.values()))), rtol=1e-3)
    assert (min(method.past_U), max(method.past_U)) == (0.0, 1.0)


@pytest.mark.parametrize("unit", ["matrix", "module"])
def test_units_are_kept_replaced_or_averaged(unit: Any, tmp_path: Path) -> None:
    method = TaSL(TaSLOptions(unit=unit, top=0.5, past_weights=0.8, past_importance=0.6))
    loop = loop_with(method, tmp_path)
    old = scramble(loop, 0)
    new = scramble(loop, 1)
    units = list(dict.fromkeys(method.unit_of(name) for name in new))
    count = len(units)
    now = {name: [0.9, 0.0, 0.8, 0.1][place % 4] + place / 1000 for place, name in enumerate(units)}
    past_U = np.array([[0.9, 0.8, 0.0, 0.1][place % 4] for place in range(count)])
    state = {f"sensitivity/{name}": torch.full_like(w, now[method.unit_of(name)]) for name, w in new.items()}
    state |= {f"uncertainty/{name}": torch.full_like(w, 2.0) for name, w in new.items()}
    method.load_state_dict(state | {"past": torch.from_numpy(past_U)})
    method.resume_task(context(loop, 1), loop.engine, [{}, old])
    assert list(method.importance().values()) == pytest.approx([2 * value for value in now.values()], rel=1e-6)
    method.end_task(loop.engine)
    for name, w in read_adapter(loop.engine).items():
        place = units.index(method.unit_of(name)) % 4
        expected = [0.8 * old[name] + 0.2 * new[name], old[name], new[name], 0.5 * old[name] + 0.5 * new[name]][place]
        torch.testing.assert_close(w, expected, msg=name)
    now_U = np.array(list(now.values()))
    now_U = (now_U - now_U.min()) / (now_U.max() - now_U.min())
    mixed = 0.6 * past_U + 0.4 * now_U
    assert method.past_U is not None
    np.testing.assert_allclose(method.past_U, (mixed - mixed.min()) / (mixed.max() - mixed.min()), atol=1e-6)
    assert method.state_dict().keys() == {"past"}  # the next task starts anew


def test_training_is_plain_and_the_bank_holds_the_averages(tmp_path: Path) -> None:
    method: Any = TaSL()
    ours, plain = loop_with(method, tmp_path), loop_with(Sequential(), tmp_path)
    learnt = []
    end_task = method.end_task

    def spy(engine: Any) -> None:
        learnt.append(read_adapter(engine))
        end_task(engine)

    method.end_task = spy
    ours.run()
    plain.run()
    assert same_adapter(ours.bank[0], plain.bank[0])
    assert same_adapter(learnt[1], plain.bank[1])
    for name, w in ours.bank[1].items():
        ends = [ours.bank[0][name], learnt[1][name]]
        shares = [float((w - new).norm() / (old - new).norm()) for old, new in [ends]]
        assert min(abs(shares[0] - share) for share in (0.0, 0.5, 0.7, 1.0)) < 1e-4
    assert not same_adapter(ours.bank[1], learnt[1])
    tasks = recorded(ours).tasks
    assert [task.passes for task in tasks] == [STEPS] * 3
    assert [task.state_bytes for task in tasks] == [8 * 8] * 3


def test_a_skipped_step_is_not_taken_in(tmp_path: Path) -> None:
    method = TaSL()
    loop = loop_with(method, tmp_path)
    scramble(loop, 0)
    method.begin_task(context(loop, 0), loop.engine, [])
    for finite in (True, False):
        before = {key: value.clone() for key, value in method.state_dict().items()}
        loss = row_loss(loop, 0, 0)[0]
        loop.engine.backward(loss if finite else loss * torch.nan, last=True)
        method.after_backward(loop.engine)
        if finite:
            method.after_step(loop.engine, 0.1)
        else:
            method.step_skipped()
        loop.engine.drop_gradients()
        assert same_adapter(before, method.state_dict()) == (not finite)


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(TaSL, tmp_path, every=2)
