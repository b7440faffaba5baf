"""Slices of one adapter for all tasks: who may move what, and that the whole is the sum of its slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.regularising import context, loop_with, row_loss, scramble
from tests.support.streams import same_adapter
from treelora.adapters import AdapterState, adapter_parameters, fresh_tensor, layer_names
from treelora.engine import read_adapter
from treelora.errors import ConfigError
from treelora.loop import StreamLoop
from treelora.methods.olora import OLoRA, OLoRAOptions
from treelora.methods.sequential import Sequential
from treelora.methods.slices import Accumulating, Slices, cut, fresh_rows

R, N = 2, 3
WIDE = {"rank": N * R, "alpha": N * 8, "dropout": 0.0}
A, B = "x.lora_A.weight", "x.lora_B.weight"


def wide_loop(method: Accumulating, folder: Path, **changes: Any) -> StreamLoop:
    return loop_with(method, folder, **({"lora": WIDE} | changes))


def assert_only_b_learns(bank: list[AdapterState], starts: list[AdapterState]) -> None:
    """Adapters after each task and at its start: A stays, B moves from zero in the own slice, and past slices stay."""
    for index in range(N):
        own = slice(index * R, (index + 1) * R)
        for name, tensor in bank[index].items():
            start = starts[index][name]
            if ".lora_A." in name:
                assert torch.equal(tensor, start)
                assert all(torch.equal(after[name][own], tensor[own]) for after in bank[index:])
            else:
                assert not start[:, own].any()
                assert tensor[:, own].any()
                assert all(torch.equal(after[name][:, own], tensor[:, own]) for after in bank[index:])


def plain() -> OLoRA:
    """Slices and nothing else."""
    return OLoRA(OLoRAOptions(strength=0.0), rank=R)


def test_places() -> None:
    place = Slices(rank=2, index=1)
    a, b = torch.arange(18.0).reshape(6, 3), torch.arange(24.0).reshape(4, 6)
    assert cut(A, a, place.own).tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]
    assert cut(B, b, place.own)[0].tolist() == [2.0, 3.0]
    assert cut(A, a, place.past).tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert cut(B, b, place.past)[3].tolist() == [18.0, 19.0]
    cut(B, b, place.own).zero_()
    assert b[:, 2:4].abs().sum() == 0
    assert cut(A, a, Slices(2, 0).past).shape == (0, 3)


def test_fresh_rows_are_uniform_and_their_own() -> None:
    shape = torch.Size((8, 576))
    rows = fresh_rows(A, shape, 0, 0)
    bound = 576**-0.5
    assert rows.dtype == torch.float32
    assert rows.shape == shape
    assert rows.min() >= -bound
    assert rows.max() < bound
    # of 4608 uniform numbers: mean 0 +- bound / sqrt(3 * 4608), variance bound^2 / 3
    assert abs(float(rows.mean())) < 4 * bound / (3 * rows.numel()) ** 0.5
    assert float(rows.var()) == pytest.approx(bound**2 / 3, rel=0.05)
    assert torch.equal(rows, fresh_rows(A, shape, 0, 0))
    others = [fresh_rows(A, shape, 1, 0), fresh_rows(A, shape, 0, 1), fresh_rows("y.lora_A.weight", shape, 0, 0)]
    for other in others:
        correlation = np.corrcoef(rows.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 5 / rows.numel() ** 0.5


def test_the_update_is_the_sum_of_the_slices_at_an_ordinary_adapter_s_scale(tmp_path: Path) -> None:
    """Three slices at work give the loss of base weights to which the three products, times alpha / r, were added."""
    loop = wide_loop(plain(), tmp_path)
    state = scramble(loop, 0)
    with_slices = float(row_loss(loop, 0, 0)[0].detach())
    assert with_slices != pytest.approx(loss_without(loop), rel=1e-3)

    scale, module = 8 / R, loop.engine.module
    for layer in layer_names(list(state)):
        a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
        change = torch.zeros(b.shape[0], a.shape[1])
        for index in range(N):
            own = Slices(R, index).own
            change += scale * b[:, own] @ a[own]
        module.get_submodule(layer).base_layer.weight.data += change  # type: ignore[operator,union-attr]
    assert loss_without(loop) == pytest.approx(with_slices, rel=1e-5)


def loss_without(loop: StreamLoop) -> float:
    with loop.engine.module.disable_adapter(), torch.no_grad():  # type: ignore[operator]
        return float(row_loss(loop, 0, 0)[0])


@pytest.mark.parametrize("index", range(N))
def test_the_own_slice_s_gradient_is_that_part_of_the_whole_s(index: int, tmp_path: Path) -> None:
    loop = wide_loop(plain(), tmp_path)
    engine = loop.engine
    state = scramble(loop, 0)
    for name, tensor in state.items():
        if ".lora_B." in name:  # slices of tasks to come
            tensor[:, (index + 1) * R :] = 0
    engine.write_adapter(state)
    weights = adapter_parameters(engine.module)
    assert not any(weight.requires_grad for weight in weights.values())
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = row_loss(loop, index, 0)[0]
    everything = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for weight in weights.values():
        weight.requires_grad_(False)

    loop.method.resume_task(context(loop, index), engine, [])
    again = row_loss(loop, index, 0)[0]
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    again.backward()
    own = slice(index * R, (index + 1) * R)
    assert engine.adapter_gradients().keys() == weights.keys()
    for name, gradient in engine.adapter_gradients().items():
        torch.testing.assert_close(gradient, cut(name, everything[name], own), rtol=1e-3, atol=1e-5)
        assert gradient.any()
    assert all(weight.grad is None for weight in weights.values())


def test_what_is_trained_doesn_t_grow_with_the_stream(tmp_path: Path) -> None:
    loop = wide_loop(plain(), tmp_path)
    narrow = loop_with(Sequential(), tmp_path, lora={"rank": R, "alpha": 8, "dropout": 0.0})
    loop.units = loop.units[:1]
    loop.run()
    kept = loop.engine.optimizer_state()
    for name, tensor in narrow.engine.adapter_tensors().items():
        assert kept[f"exp_avg/{name}"].shape == tensor.shape
        assert loop.engine.adapter_leaves()[name].shape == tensor.shape


def test_the_adapter_is_whole_whoever_reads_or_writes_it(tmp_path: Path) -> None:
    """While a slice is open, too: what is written shows in the loss, and a lent adapter is given back."""
    loop = wide_loop(plain(), tmp_path)
    one, other = scramble(loop, 0), scramble(loop, 1)
    for state in (one, other):  # what isn't computed while the second slice is open
        for name, tensor in state.items():
            if ".lora_B." in name:
                tensor[:, 2 * R :] = 0
    loop.engine.write_adapter(other)
    expected = row_loss(loop, 1, 0)[0].item()
    loop.engine.write_adapter(one)
    loop.method.resume_task(context(loop, 1), loop.engine, [])
    assert same_adapter(read_adapter(loop.engine), one)
    with loop.engine.using_adapter(other):
        assert same_adapter(read_adapter(loop.engine), other)
        assert row_loss(loop, 1, 0)[0].item() == pytest.approx(expected, rel=1e-5)
    assert same_adapter(read_adapter(loop.engine), one)
    loop.engine.write_adapter(other)
    loop.method.end_task(loop.engine)
    assert same_adapter(read_adapter(loop.engine), other)
    assert row_loss(loop, 1, 0)[0].item() == pytest.approx(expected, rel=1e-5)


def test_a_task_starts_in_its_own_slice_and_leaves_the_others(tmp_path: Path) -> None:
    loop = wide_loop(plain(), tmp_path)
    before = scramble(loop, 0)
    loop.method.begin_task(context(loop, 1), loop.engine, [])
    own = slice(R, 2 * R)
    for name, tensor in read_adapter(loop.engine).items():
        expected = before[name].clone()
        part = cut(name, expected, own)
        part.copy_(fresh_rows(name, part.shape, 1, 0) if ".lora_A." in name else torch.zeros_like(part))
        assert torch.equal(tensor, expected)


def test_the_first_task_is_plain_training_of_an_ordinary_adapter(tmp_path: Path) -> None:
    wide = wide_loop(plain(), tmp_path)
    wide.units = wide.units[:1]
    narrow = loop_with(Sequential(), tmp_path, lora={"rank": R, "alpha": 8, "dropout": 0.0})
    narrow.units = narrow.units[:1]
    starts = {name: fresh_tensor(name, t.shape, 0) for name, t in narrow.engine.adapter_tensors().items()}
    starts |= {name: fresh_rows(name, t.shape, 0, 0) for name, t in starts.items() if ".lora_A." in name}
    narrow.engine.write_adapter(starts)
    wide.run()
    narrow.run()
    for name, tensor in narrow.bank[0].items():
        torch.testing.assert_close(cut(name, wide.bank[0][name], slice(0, R)), tensor, rtol=1e-4, atol=1e-6)
        assert (tensor - starts[name]).abs().max() > 1e-3


def test_past_slices_stay_and_coming_ones_wait(tmp_path: Path) -> None:
    loop = wide_loop(plain(), tmp_path)
    loop.run()
    for index in range(N):
        own, later = slice(index * R, (index + 1) * R), slice((index + 1) * R, N * R)
        for name, tensor in loop.bank[index].items():
            learnt = cut(name, tensor, own)
            assert learnt.any()
            assert all(torch.equal(cut(name, after[name], own), learnt) for after in loop.bank[index:])
            if ".lora_B." in name:
                assert not cut(name, tensor, later).any()


def test_a_longer_stream_begins_as_a_shorter_one(tmp_path: Path) -> None:
    longer = wide_loop(plain(), tmp_path)
    shorter = wide_loop(plain(), tmp_path, lora={"rank": 2 * R, "alpha": 16, "dropout": 0.0})
    for loop in (longer, shorter):
        loop.units = loop.units[:2]
        loop.run()
    for name, tensor in shorter.bank[1].items():
        torch.testing.assert_close(cut(name, longer.bank[1][name], slice(0, 2 * R)), tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rank", "index"), [(2, 3), (6, 1)])
def test_a_task_without_a_slice_is_refused(rank: int, index: int, tmp_path: Path) -> None:
    loop = wide_loop(OLoRA(rank=rank), tmp_path)
    task = context(loop, 0)
    message = f"olora: task {index + 1} .* no slice of rank {rank} in an adapter of {6 // rank} slices of rank {rank}"
    with pytest.raises(ConfigError, match=message):
        loop.method.begin_task(type(task)(**{**vars(task), "index": index}), loop.engine, [])


def test_an_adapter_that_isn_t_held_in_slices_is_refused(tmp_path: Path) -> None:
    loop = loop_with(Sequential(), tmp_path, lora=WIDE)
    with pytest.raises(ConfigError, match=r"olora: task 1 .* no slice of rank 2 in an adapter of 0 slices"):
        plain().begin_task(context(loop, 0), loop.engine, [])


def test_a_rank_that_doesn_t_divide_the_adapter_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank 6 has no slices of rank 4"):
        wide_loop(OLoRA(rank=4), tmp_path)
