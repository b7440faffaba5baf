"""What it costs to change what past tasks' losses depend on: against the matrices in full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.test_input_space import along_axes, spectrum_of, tokens
from treelora.guard import DIRECTIONS, HeldOutputs, factors, take_in
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
    held = HeldOutputs(half, torch.ones(2, 4), torch.ones(3, 2), 4.0)
    assert not any(part.any() for part in held.cost(torch.zeros(2, 4), torch.zeros(3, 2)))
    later = take_in(half, along_axes(3, 1, 0, 0), 2.0)
    torch.testing.assert_close(torch.diagonal(later @ later.T), torch.tensor([1.5, 0.5, 0, 0]))


@settings(deadline=None, max_examples=20)
@given(seed=seeds, rank=st.integers(1, 5), scale=st.floats(0.5, 8))
def test_the_cost_is_the_trace_over_the_outputs(seed: int, rank: int, scale: float) -> None:
    """tr(D C D^T) / O with every matrix written out, and its gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, 9), (7, rank)) * 2
    a, b, a_found, b_found = (torch.randn(shape, generator=generator) for shape in shapes)
    half = take_in(None, spectrum_of(m_of(seed, 9)), 3.0)
    c_dd = half @ half.T
    held = HeldOutputs(half, a_found, b_found, scale)
    leaves = [a.clone().requires_grad_(True), b.clone().requires_grad_(True)]
    d_Od = scale * (leaves[1] @ leaves[0] - b_found @ a_found)
    expected = (d_Od @ c_dd @ d_Od.T).trace() / len(d_Od)
    expected.backward()
    for one, other in zip(held.cost(a, b), (expected.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    assert float(held.cost(a_found, b_found)[0]) == pytest.approx(0.0, abs=1e-6)
    turned = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    # A and B may change where their product doesn't
    assert float(held.cost(turned @ a_found, b_found @ turned.T)[0]) < 1e-6 * float(expected.detach())


def test_factors_by_layer() -> None:
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    found = factors({"x.q.lora_A.weight": a, "x.q.lora_B.weight": b, "head.weight": b})
    assert found.keys() == {"x.q"}
    assert found["x.q"][0] is a
    assert found["x.q"][1] is b
