"""InfLoRA: covariances row by row, the design and the protected space against SVDs of inputs, what a stream keeps."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from tests.support.regularising import assert_resumes, context, scramble
from tests.support.streams import STEPS, recorded
from tests.unit.test_method_slices import N, R, assert_only_b_learns, wide_loop
from treelora.adapters import layer_names, layer_of
from treelora.engine import read_adapter
from treelora.methods.inflora import (
    InfLoRA,
    InfLoRAOptions,
    Space,
    complement,
    design,
    free_basis,
    input_covariances,
    protect,
)
from treelora.methods.olora import OLoRA, OLoRAOptions

D = 12


def inputs(seed: int, rows: int = 40, decay: float = 0.6) -> Tensor:
    """[rows, D] float64 in directions of their own, whose sizes fall geometrically."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    sizes = decay ** torch.arange(D, dtype=torch.float64)
    return torch.randn(rows, D, generator=generator, dtype=torch.float64) * sizes @ turn


def protected(space: Space) -> Tensor:
    """The projection onto what a space protects, [D, D] float64."""
    onto_basis = space.basis.double() @ space.basis.double().T
    return onto_basis if space.protects else torch.eye(D, dtype=torch.float64) - onto_basis


def grown(projection: np.ndarray, x: np.ndarray, share: float) -> np.ndarray:
    """GPM by hand: add left singular vectors of the unprotected part of the inputs until the share is held."""
    rest = x @ (np.eye(D) - projection)
    directions = np.linalg.svd(rest, full_matrices=False)[2]
    for direction in directions:
        if np.linalg.norm(x @ projection) ** 2 >= share * np.linalg.norm(x) ** 2:
            break
        projection = projection + np.outer(direction, direction)
    return projection


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.lists(st.floats(0.3, 0.999), min_size=1, max_size=4))
def test_protected_space_is_gpm_s(seed: int, shares: list[float]) -> None:
    space, by_hand = None, np.zeros((D, D))
    for number, share in enumerate(shares):
        x = inputs(seed + number)
        space = protect(x.T @ x, space, share)
        by_hand = grown(by_hand, x.numpy(), share)
        torch.testing.assert_close(protected(space), torch.from_numpy(by_hand), rtol=0, atol=1e-5)
        assert space.basis.shape[1] <= D // 2  # the smaller of the two bases is kept
        held = float((x @ protected(space)).square().sum() / x.square().sum())
        assert held >= share - 1e-6


def test_protected_space_by_hand() -> None:
    # energies 9, 4, 2, 1 of 16 along the axes: 9 + 4 = 13 is the first to hold 0.75 of 16
    c = torch.diag(torch.tensor([4.0, 1.0, 9.0, 2.0], dtype=torch.float64))
    space = protect(c, None, 0.75)
    assert protected_axes(space) == {0, 2}
    # a second task lives on axes 2 and 3, of which 2 is held already
    c = torch.diag(torch.tensor([0.0, 0.0, 5.0, 5.0], dtype=torch.float64))
    assert protected_axes(protect(c, space, 0.5)) == {0, 2}
    space = protect(c, space, 0.51)
    assert protected_axes(space) == {0, 2, 3}
    assert (space.basis.shape, space.protects) == ((4, 1), False)
    assert protected_axes(protect(torch.eye(4, dtype=torch.float64), space, 1.0)) == {0, 1, 2, 3}


def protected_axes(space: Space) -> set[int]:
    onto_basis = space.basis.double() @ space.basis.double().T
    shares = onto_basis.diagonal() if space.protects else 1 - onto_basis.diagonal()
    torch.testing.assert_close(shares, shares.round(), rtol=0, atol=1e-6)
    return set(shares.round().nonzero().flatten().tolist())


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_design_spans_the_main_inputs_outside_the_protected_space(share: float) -> None:
    old, new = inputs(0), inputs(1)
    space = protect(old.T @ old, None, share)
    a = design(new.T @ new, space, 2).double()
    torch.testing.assert_close(a @ protected(space), torch.zeros_like(a), rtol=0, atol=1e-6)
    torch.testing.assert_close(a @ a.T, torch.eye(2, dtype=torch.float64) / 3, rtol=0, atol=1e-6)
    leading = np.linalg.svd(new.numpy() @ (np.eye(D) - protected(space).numpy()))[2][:2]
    for row, direction in zip(a.numpy(), leading, strict=True):
        assert abs(row @ direction) == pytest.approx(1 / math.sqrt(3), rel=1e-5)
        assert row[np.abs(row).argmax()] > 0
    leak = (old @ a.T).square().sum() / (new @ a.T).square().sum()
    assert leak < 0.5 * (1 - share) * old.square().sum() / (new @ a.T).square().sum() + 1e-9


def test_design_where_little_is_free() -> None:
    x = inputs(0)
    one_left = Space(torch.eye(D)[:, 3:4], protects=False)
    a = design(x.T @ x, one_left, 3)
    expected = torch.zeros(3, D)
    expected[0, 3] = 1 / math.sqrt(3)
    torch.testing.assert_close(a, expected)
    assert not design(x.T @ x, Space(torch.zeros(D, 0), protects=False), 2).any()
    torch.testing.assert_close(
        free_basis(Space(torch.zeros(D, 0), protects=True), D).abs().sum(), torch.tensor(D).double()
    )


def test_complement() -> None:
    basis = torch.linalg.qr(inputs(3).T[:, :5]).Q
    rest = complement(basis)
    assert rest.shape == (D, D - 5)
    whole = torch.cat([basis, rest], dim=1)
    torch.testing.assert_close(whole.T @ whole, torch.eye(D, dtype=torch.float64))


@pytest.mark.parametrize("batches", [1, 3, 100])
def test_covariances_are_those_of_single_rows(batches: int, tmp_path: Path) -> None:
    loop = wide_loop(InfLoRA(rank=R), tmp_path, lora={"rank": N * R, "alpha": N * 8, "dropout": 0.5})
    scramble(loop, 0)
    module, unit, count = loop.engine.module, loop.units[0], min(batches, STEPS)
    module.train()
    found = input_covariances(loop.engine, context(loop, 0), batches)
    assert module.training
    assert not any(m._forward_pre_hooks for n, m in module.named_modules() if n in found)

    module.eval()
    seen: dict[str, Tensor] = {layer: torch.zeros(32, 32) for layer in layer_names(list(read_adapter(loop.engine)))}

    def add(layer: str, module: Any, args: tuple[Tensor, ...]) -> None:
        seen[layer] += args[0][0].T @ args[0][0]

    handles = [module.get_submodule(layer).register_forward_pre_hook(partial(add, layer)) for layer in seen]
    with torch.no_grad():
        for i in range(count):
            for row in unit.plan.rows(i * STEPS // count):
                prompt, answer = (np.asarray(ids).tolist() for ids in unit.item(int(row)))
                module(input_ids=torch.tensor([prompt + answer]))
    for handle in handles:
        handle.remove()
    assert list(found) == list(seen)
    for layer, c_dd in found.items():
        torch.testing.assert_close(c_dd, seen[layer], rtol=1e-4, atol=1e-3)
    by_block = {layer.rsplit(".", 1)[0] for layer in found}
    assert len({id(c_dd) for c_dd in found.values()}) == len(by_block) == len(found) // 2  # q and v read the same


def run(folder: Path, **changes: Any) -> tuple[Any, dict[str, list[Any]]]:
    """A stream to its end; adapters at the tasks' starts, and the spaces kept after each."""
    loop = wide_loop(InfLoRA(InfLoRAOptions(energy=0.9), rank=R), folder, **changes)
    method: Any = loop.method
    seen: dict[str, list[Any]] = {"starts": [], "spaces": [], "inputs": []}
    begin_task, end_task = method.begin_task, method.end_task

    def begun(task: Any, engine: Any, bank: Any) -> None:
        begin_task(task, engine, bank)
        seen["starts"].append(read_adapter(engine))

    def ended(engine: Any) -> None:
        seen["inputs"].append(input_covariances(engine, context(loop, len(seen["inputs"])), 8))
        end_task(engine)
        seen["spaces"].append(dict(method.spaces))

    method.begin_task, method.end_task = begun, ended
    loop.run()
    return loop, seen


def test_only_b_trains_and_past_slices_stay(tmp_path: Path) -> None:
    loop, seen = run(tmp_path)
    assert_only_b_learns(loop.bank, seen["starts"])
    for index, state in enumerate(loop.bank):
        own = slice(index * R, (index + 1) * R)
        assert all(tensor[:, own].abs().min() > 0 for name, tensor in state.items() if ".lora_B." in name)


def test_rows_of_a_are_orthogonal_to_what_is_kept(tmp_path: Path) -> None:
    _, seen = run(tmp_path)
    for index in (1, 2):
        for name, start in seen["starts"][index].items():
            if ".lora_A." in name:
                space, own = seen["spaces"][index - 1][layer_of(name)], start[index * R : (index + 1) * R]
                onto_basis = space.basis @ space.basis.T
                outside = own - own @ onto_basis if not space.protects else own @ onto_basis
                assert outside.abs().max() < 1e-6
                torch.testing.assert_close(own @ own.T, torch.eye(R) / 3, rtol=0, atol=1e-5)
    protected_dims = [
        [s.basis.shape[1] if s.protects else 32 - s.basis.shape[1] for s in spaces.values()]
        for spaces in seen["spaces"]
    ]
    for earlier, later in pairwise(protected_dims):
        assert all(a <= b for a, b in zip(earlier, later, strict=True))
    shares = [0.9, 0.9 + 0.1 / 3, 0.9 + 0.2 / 3]
    for c_by_layer, spaces, share in zip(seen["inputs"], seen["spaces"], shares, strict=True):
        for layer, c_dd in c_by_layer.items():
            onto_basis = spaces[layer].basis @ spaces[layer].basis.T
            free = torch.eye(32) - onto_basis if spaces[layer].protects else onto_basis
            assert float((free @ c_dd @ free).trace() / c_dd.trace()) <= 1 - share + 1e-5


def passed(change: Tensor, c_dd: Tensor) -> float:
    """How much of a change of weights inputs with covariance C feel: E |W x|^2 / (|W|^2 E |x|^2)."""
    return float((change @ c_dd @ change.T).trace() / (change.square().sum() * c_dd.trace()))


def test_old_inputs_hardly_feel_the_next_task(tmp_path: Path) -> None:
    """Against slices with a random A, as O-LoRA's at strength 0, at equal training."""
    loop, seen = run(tmp_path)
    plain = wide_loop(OLoRA(OLoRAOptions(strength=0.0), rank=R), tmp_path)
    old: dict[str, Tensor] = {}
    end_task = plain.method.end_task

    def ended(engine: Any) -> None:
        old.update(old or input_covariances(engine, context(plain, 0), 8))
        end_task(engine)

    plain.method.end_task = ended  # type: ignore[method-assign]
    plain.run()
    own = slice(R, 2 * R)
    ratios = []
    for layer in old:
        felt = []
        for bank, c_dd in ((loop.bank, seen["inputs"][0][layer]), (plain.bank, old[layer])):
            state = bank[1]
            felt.append(passed(state[f"{layer}.lora_B.weight"][:, own] @ state[f"{layer}.lora_A.weight"][own], c_dd))
        assert felt[0] < 0.1  # the unprotected share
        ratios.append(felt[0] / felt[1])
    assert max(ratios) < 0.5, ratios


def test_records(tmp_path: Path) -> None:
    loop, seen = run(tmp_path)
    tasks = recorded(loop).tasks
    measured = 2 * STEPS  # `batches` is more than there are steps; once before, once after; one is the test's own
    assert [task.passes for task in tasks] == [STEPS + measured + STEPS] * N
    for task, spaces in zip(tasks, seen["spaces"], strict=True):
        distinct = {id(space): space.basis.numel() for space in spaces.values()}
        assert len(distinct) == len(spaces) // 2
        assert task.state_bytes == 4 * sum(distinct.values())


def test_state_goes_there_and_back(tmp_path: Path) -> None:
    _, seen = run(tmp_path)
    method = InfLoRA(rank=R)
    method.spaces = seen["spaces"][-1]
    state = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    other = InfLoRA(rank=R)
    other.load_state_dict(state)
    assert other.spaces.keys() == method.spaces.keys()
    for layer, space in method.spaces.items():
        assert torch.equal(other.spaces[layer].basis, space.basis)
        assert other.spaces[layer].protects == space.protects
    assert other.state_dict().keys() == state.keys()


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    wide = {"rank": N * R, "alpha": N * 8, "dropout": 0.1}
    assert_resumes(lambda: InfLoRA(InfLoRAOptions(energy=0.8), rank=R), tmp_path, lora=wide)


@pytest.mark.parametrize("wrong", [{"energy": 0.0}, {"final_energy": 1.1}, {"batches": 0}])
def test_options_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        InfLoRAOptions(**wrong)
