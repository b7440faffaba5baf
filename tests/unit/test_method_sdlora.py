"""SD-LoRA: the magnitudes' gradient and optimizer against oracles, fixed directions, boundaries, resumption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.support.regularising import assert_resumes, context, row_loss, scramble
from tests.support.streams import STEPS, recorded, same_adapter
from tests.unit.test_method_slices import N, R, wide_loop
from treelora.adapters import AdapterState, layer_names
from treelora.engine import read_adapter
from treelora.methods.sdlora import SDLoRA, SDLoRAOptions, direction, size
from treelora.methods.slices import Slices
from treelora.schedule import learning_rate
from treelora.sliced import sliced_factors


def product(state: AdapterState, layer: str, index: int) -> Tensor:
    """B_k A_k, in full, float64."""
    own = Slices(R, index).own
    return state[f"{layer}.lora_B.weight"][:, own].double() @ state[f"{layer}.lora_A.weight"][own].double()


def run(folder: Path, options: SDLoRAOptions | None = None, **changes: Any) -> tuple[Any, list[Tensor]]:
    """A stream to its end, and the magnitudes after each task."""
    loop = wide_loop(SDLoRA(options, rank=R), folder, **changes)
    method: Any = loop.method
    magnitudes: list[Tensor] = []
    end_task = method.end_task

    def ended(engine: Any) -> None:
        end_task(engine)
        magnitudes.append(method.magnitudes_Lt.clone())

    method.end_task = ended
    loop.run()
    return loop, magnitudes


def test_size_and_direction(tmp_path: Path) -> None:
    state = scramble(wide_loop(SDLoRA(rank=R), tmp_path), 0)
    for layer in layer_names(list(state)):
        for index in range(N):
            whole, part = product(state, layer, index), Slices(R, index)
            assert float(size(state, layer, part)) == pytest.approx(float(whole.norm()), rel=1e-5)
            unit = direction(state, layer, part).double() @ state[f"{layer}.lora_A.weight"][part.own].double()
            torch.testing.assert_close(unit, whole / whole.norm(), rtol=1e-4, atol=1e-6)
    nothing = {name: torch.zeros_like(t) if ".lora_B." in name else t for name, t in state.items()}
    assert not direction(nothing, layer, part).any()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradient_of_the_magnitudes(micro_batches: int, tmp_path: Path) -> None:
    """Against central differences of the loss."""
    loop = wide_loop(SDLoRA(rank=R), tmp_path)
    engine, method = loop.engine, loop.method
    past = [scramble(loop, seed) for seed in (0, 1)]
    current = scramble(loop, 2)
    layers = layer_names(list(current))
    directions = {(layer, k): direction(past[k], layer, Slices(R, k)) for layer in layers for k in (0, 1)}
    for layer in layers:
        for k in (0, 1):
            own = Slices(R, k).own
            current[f"{layer}.lora_A.weight"][own] = past[k][f"{layer}.lora_A.weight"][own]
            current[f"{layer}.lora_B.weight"][:, own] = 0.5 * directions[layer, k]
    engine.write_adapter(current)
    method.load_state_dict({"magnitudes": torch.full((len(layers), 2), 0.5)})
    method.resume_task(context(loop, 2), engine, past)

    def losses() -> list[Tensor]:
        return [row_loss(loop, 2, row)[0] for row in range(micro_batches)]

    method.before_step(1)
    for number, loss in enumerate(losses()):
        engine.backward(loss, last=number == micro_batches - 1)
    method.after_backward(engine)
    gradient_Lt = method.magnitudes_Lt.grad  # type: ignore[attr-defined]
    assert gradient_Lt.abs().max() > 0.05

    for row, layer in enumerate(layers):
        past_OP: Any = sliced_factors(engine.module)[f"{layer}.lora_B.weight"].past
        for k in (0, 1):
            values = []
            for magnitude in (0.52, 0.48):
                past_OP.data[:, Slices(R, k).own] = magnitude * directions[layer, k]
                values.append(torch.stack(losses()).sum().item())
            past_OP.data[:, Slices(R, k).own] = 0.5 * directions[layer, k]
            assert float(gradient_Lt[row, k]) == pytest.approx((values[0] - values[1]) / 0.04, rel=1e-2, abs=2e-4)


def test_past_directions_stay_and_magnitudes_move(tmp_path: Path) -> None:
    loop, magnitudes = run(tmp_path, train={"steps": 12})
    layers = layer_names(list(loop.bank[0]))
    assert [m.shape for m in magnitudes] == [(len(layers), index + 1) for index in range(N)]
    for row, layer in enumerate(layers):
        for k in range(N):
            first = product(loop.bank[k], layer, k)
            assert float(magnitudes[k][row, k]) == pytest.approx(float(first.norm()), rel=1e-5)
            for later in range(k + 1, N):
                now, scale = product(loop.bank[later], layer, k), float(magnitudes[later][row, k])
                torch.testing.assert_close(now, scale * first / first.norm(), rtol=1e-4, atol=1e-7)
                a, own = f"{layer}.lora_A.weight", Slices(R, k).own
                assert torch.equal(loop.bank[later][a][own], loop.bank[k][a][own])
    moved = torch.stack([magnitudes[2][:, 0] - magnitudes[0][:, 0], magnitudes[2][:, 1] - magnitudes[1][:, 1]])
    assert moved.abs().min() > 1e-3


def test_magnitudes_follow_adamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = wide_loop(SDLoRA(SDLoRAOptions(magnitude_rate=3.0), rank=R), tmp_path)
    loop.units = loop.units[:2]
    method: Any = loop.method
    seen: list[tuple[Tensor, Tensor]] = []
    after_backward = method.after_backward

    def spy(engine: Any) -> None:
        after_backward(engine)
        if method.magnitudes_Lt.numel():
            seen.append((method.magnitudes_Lt.clone(), method.magnitudes_Lt.grad.clone()))

    monkeypatch.setattr(method, "after_backward", spy)
    loop.run()
    assert len(seen) == STEPS
    value = seen[0][0].double()
    m = v = torch.zeros_like(value)
    for step, (before, gradient) in enumerate(seen, start=1):
        torch.testing.assert_close(before.double(), value, rtol=1e-5, atol=1e-7)
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.999 * v + 0.001 * gradient.double() ** 2
        lr = 3.0 * learning_rate(step, STEPS, 0.02, 0.1, 0.1)
        value = value - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(method.magnitudes_Lt[:, :1].double(), value, rtol=1e-5, atol=1e-7)


def test_a_task_starts_from_the_function_that_the_last_one_ended_with(tmp_path: Path) -> None:
    loop, _ = run(tmp_path)
    loop.engine.write_adapter(loop.bank[1])
    expected = row_loss(loop, 0, 0)[0].item()
    loop.engine.write_adapter({name: t for name, t in scramble(loop, 0).items() if ".lora_A." in name})
    loop.engine.write_adapter({name: t for name, t in loop.bank[1].items() if ".lora_B." in name})
    assert row_loss(loop, 0, 0)[0].item() != pytest.approx(expected, rel=1e-4)

    loop.engine.write_adapter(loop.bank[1])
    loop.method.begin_task(context(loop, 2), loop.engine, loop.bank[:2])
    assert row_loss(loop, 0, 0)[0].item() == expected


def test_without_a_rate_past_slices_stay_as_they_were(tmp_path: Path) -> None:
    loop, magnitudes = run(tmp_path, SDLoRAOptions(magnitude_rate=0.0))
    assert torch.equal(magnitudes[2][:, :2], magnitudes[1])
    for name, tensor in loop.bank[0].items():
        if ".lora_B." in name:
            torch.testing.assert_close(loop.bank[2][name][:, :R], tensor[:, :R], rtol=1e-5, atol=1e-9)


def test_no_step_along_an_infinite_gradient(tmp_path: Path) -> None:
    loop = wide_loop(SDLoRA(rank=R), tmp_path)
    everything, loop.units = loop.units, loop.units[:1]
    loop.run()
    loop.units = everything
    engine, method = loop.engine, loop.method
    method.begin_task(context(loop, 1), engine, loop.bank)
    before, magnitudes = read_adapter(engine), method.magnitudes_Lt.clone()  # type: ignore[attr-defined]
    method.before_step(1)
    engine.backward(math.inf * row_loss(loop, 1, 0)[0], last=True)
    method.after_backward(engine)
    assert not math.isfinite(float(engine.step(0.02)))
    method.step_skipped()
    assert same_adapter(read_adapter(engine), before)
    assert torch.equal(method.magnitudes_Lt, magnitudes)  # type: ignore[attr-defined]

    method.before_step(2)  # nothing of it is left
    engine.backward(row_loss(loop, 1, 0)[0], last=True)
    method.after_backward(engine)
    engine.step(0.02)
    method.after_step(engine, 0.02)
    assert all(tensor.isfinite().all() for tensor in read_adapter(engine).values())
    assert (method.magnitudes_Lt - magnitudes).abs().max() == pytest.approx(0.02, rel=1e-2)  # type: ignore[attr-defined]


def test_records(tmp_path: Path) -> None:
    loop, _ = run(tmp_path)
    layers = len(layer_names(list(loop.bank[0])))
    assert [(task.passes, task.state_bytes) for task in recorded(loop).tasks] == [
        (STEPS, 4 * layers * (index + 1)) for index in range(N)
    ]


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    wide = {"rank": N * R, "alpha": N * 8, "dropout": 0.1}
    assert_resumes(lambda: SDLoRA(rank=R), tmp_path, every=2, lora=wide)


@pytest.mark.parametrize("wrong", [{"magnitude_rate": -0.1}, {"rank": 8}])
def test_options_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SDLoRAOptions(**wrong)
