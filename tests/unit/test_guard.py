"""What it costs to change what past tasks' losses depend on: against the matrices in full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.test_input_space import along_axes, spectrum_of, tokens
from treelora.guard import DIRECTIONS, HeldOutputs, Pair, factors, take_in
from treelora.input_space import Spectrum

seeds = st.integers(0, 2**31)


def m_of(seed: int, width: int, count: int = 40) -> Tensor:
    x_Td, weights_T = tokens(seed, count, width)
    return ((x_Td * weights_T[:, None]).T @ x_Td).double()


@settings(deadline=None, max_examples=20)
@given(seed=seeds, tasks=st.integers(1, 4))
def test_what_is_kept_is_the_sum_over_tasks(seed: int, tasks: int) -> None:
    """Where there is room for all directions."""
    half, whole = None, torch.zeros(12, 12).double()
    for task in range(tasks):
        m_dd, unit = m_of(seed + task, 12), 0.5 + task
        whole += m_dd / unit
        half = take_in(half, spectrum_of(m_dd), unit)
    assert half is not None
    torch.testing.assert_close((half @ half.T).double(), whole, rtol=1e-3, atol=1e-4 * float(whole.max()))
    norms = half.norm(dim=0)
    assert (norms[:-1] >= norms[1:]).all()


def test_more_directions_than_there_is_room_for_leave_the_smallest_out() -> None:
    """Two tasks of 80 directions together: the sum's 64 largest, and no more however many come."""
    width = 100
    sizes = torch.zeros(2, width)
    sizes[0, :40], sizes[1, 30:80] = torch.linspace(9, 1, 40), torch.linspace(8, 2, 50)
    half = None
    for energies in sizes:
        half = take_in(half, along_axes(*energies.tolist()), 1.0)
    assert half is not None
    assert half.shape == (width, DIRECTIONS)
    expected = sizes.sum(0)
    expected[expected.argsort()[: width - DIRECTIONS]] = 0
    # what the first task's sketch and the second's both hold adds up before anything is left out
    torch.testing.assert_close(torch.diagonal(half @ half.T), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, unit=st.floats(1e-3, 1e3))
def test_the_unit_scales(seed: int, unit: float) -> None:
    one, other = (take_in(None, spectrum_of(m_of(seed, 8)), value) for value in (1.0, unit))
    torch.testing.assert_close(other @ other.T, one @ one.T / unit, rtol=1e-3, atol=1e-4 * float(one.square().sum()))


def test_a_layer_that_was_not_read_costs_nothing() -> None:
    nothing: Spectrum = (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 0.0)
    half = take_in(None, nothing, 0.0)
    assert half.shape == (4, 0)
    held = HeldOutputs({"x": half}, {"x": (torch.ones(2, 4), torch.ones(3, 2))}, 4.0)
    a, b = torch.randn(1, 2, 4), torch.randn(1, 3, 2)
    near = held.near(a, b, 1e6)
    assert torch.equal(near[0], a)
    assert torch.equal(near[1], b)
    assert float(near[2]) == 0.0
    later = take_in(half, along_axes(3, 1, 0, 0), 2.0)
    torch.testing.assert_close(torch.diagonal(later @ later.T), torch.tensor([1.5, 0.5, 0, 0]))


def layers_of(seed: int, rank: int) -> tuple[dict[str, Tensor], dict[str, Pair], dict[str, Pair]]:
    """Of three layers H, not of one width, the adapter that is held, and where a step has led."""
    generator = torch.Generator().manual_seed(seed)
    halves, found, stepped = {}, {}, {}
    for number, count in enumerate((40, 3, 12)):
        halves[str(number)] = take_in(None, spectrum_of(m_of(seed + number, 9, count)), 3.0)
        a, b, a_moved, b_moved = (torch.randn(shape, generator=generator) for shape in ((rank, 9), (7, rank)) * 2)
        found[str(number)], stepped[str(number)] = (a, b), (a + 0.1 * a_moved, b + 0.1 * b_moved)
    return halves, found, stepped


def cost_of(half: Tensor, was: Pair, pair: Pair, scale: float) -> Tensor:
    """tr(D C D^T) / O with every matrix written out."""
    d_Od = scale * (pair[1] @ pair[0] - was[1] @ was[0]).double()
    return (d_Od @ half.double() @ half.double().T @ d_Od.T).trace() / len(d_Od)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, rank=st.integers(1, 5), scale=st.floats(0.5, 8), weight=st.floats(1e-3, 1e2))
def test_the_way_back_ends_where_nothing_pulls(seed: int, rank: int, scale: float, weight: float) -> None:
    """At the minimum of price and distance their gradients cancel out: by B at the A that is given, then by A."""
    halves, found, stepped = layers_of(seed, rank)
    for layer, half in halves.items():  # the columns orthogonal to the last digit
        u, sizes, _ = torch.linalg.svd(half.double(), full_matrices=False)
        halves[layer] = u * sizes
    found, stepped = ({layer: (a.double(), b.double()) for layer, (a, b) in p.items()} for p in (found, stepped))
    held = HeldOutputs(halves, found, scale)
    a_Lrd, b_LOr, cost = held.near(*held.stacked(stepped), weight)
    total = 0.0
    for layer, a, b in zip(held.layers, a_Lrd, b_LOr, strict=True):
        a_was, b_was = stepped[layer]
        for side, at in enumerate(((a, b), (a_was, b))):
            leaves = [part.clone().requires_grad_(True) for part in at]
            price = weight / 2 * cost_of(halves[layer], found[layer], (leaves[0], leaves[1]), scale)
            (by_price,) = torch.autograd.grad(price, leaves[side])
            by_distance = leaves[side].detach() - (a_was, b_was)[side]
            torch.testing.assert_close(by_price, -by_distance, rtol=0.0, atol=1e-8 * float(by_distance.abs().max()))
        total += float(cost_of(halves[layer], found[layer], (a, b), scale))
    assert float(cost) == pytest.approx(total, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, rank=st.integers(1, 5))
def test_a_guard_leaves_a_lower_cost(seed: int, rank: int) -> None:
    """From the step's own down to none; never above it."""
    halves, found, stepped = layers_of(seed, rank)
    held = HeldOutputs(halves, found, 2.0)
    before = sum(float(cost_of(halves[layer], found[layer], stepped[layer], 2.0)) for layer in halves)
    costs = [float(held.near(*held.stacked(stepped), weight)[2]) for weight in (0.0, 1e-2, 1.0, 1e2, 1e4)]
    assert costs[0] == pytest.approx(before, rel=1e-4)
    assert all(cost <= before * (1 + 1e-4) for cost in costs)
    assert costs[-1] < 1e-2 * before


@settings(deadline=None, max_examples=20)
@given(seed=seeds, rank=st.integers(1, 5))
def test_what_does_not_change_the_product_is_left_alone(seed: int, rank: int) -> None:
    """A and B may turn together, however strong the guard is."""
    halves, found, _ = layers_of(seed, rank)
    held = HeldOutputs(halves, found, 2.0)
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed))).Q
    a_Lrd, b_LOr = held.stacked({layer: (turn @ a, b @ turn.T) for layer, (a, b) in found.items()})
    near = held.near(a_Lrd, b_LOr, 10.0)
    for one, other in zip(near, (a_Lrd, b_LOr), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_factors_by_layer() -> None:
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    found = factors({"x.q.lora_A.weight": a, "x.q.lora_B.weight": b, "head.weight": b})
    assert found.keys() == {"x.q"}
    assert found["x.q"][0] is a
    assert found["x.q"][1] is b
