"""What tasks read of their inputs: sketches against covariances and eigenvectors in full, spaces by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treelora.errors import DataError
from treelora.input_space import InputMoments, Spectrum, design, eigen, protect

D = 12


def engine(rank: int = 0, world_size: int = 1) -> Any:
    """One rank among others that have seen nothing."""
    return SimpleNamespace(rank=rank, world_size=world_size, all_reduce=lambda tensor: tensor)


def tokens(seed: int, count: int = 40, width: int = D) -> tuple[Tensor, Tensor]:
    """Inputs [count, width] in directions of their own, whose sizes fall geometrically, and weights [count]."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    sizes = 0.6 ** torch.arange(width)
    return torch.randn(count, width, generator=generator) * sizes @ turn, torch.rand(count, generator=generator)


def spectrum_of(m_dd: Tensor) -> Spectrum:
    values, vectors = torch.linalg.eigh(m_dd.double())
    return vectors.flip(1), values.flip(0).clamp_min(0), float(m_dd.trace())


def along_axes(*energies: float) -> Spectrum:
    return spectrum_of(torch.diag(torch.tensor(energies)))


def axes(space_dp: Tensor) -> set[int]:
    """Which axes a space is made of."""
    shares = space_dp.square().sum(1)
    torch.testing.assert_close(shares, shares.round(), rtol=0, atol=1e-6)
    return set(shares.round().nonzero().flatten().tolist())


def test_moments_are_sums_over_tokens() -> None:
    moments = InputMoments({"a": D, "b": 5}, size=100, seed=0, device=torch.device("cpu"))
    expected = {"a": torch.zeros(D, D), "b": torch.zeros(5, 5)}
    for seed in range(3):
        for layer, (name, width) in enumerate({"a": D, "b": 5}.items()):
            x, weights = tokens(10 * seed + layer, width=width)
            moments.add(layer, x, weights)
            if seed != 1:
                expected[name] += torch.einsum("t,ti,tj->ij", weights, x, x)
        if seed == 1:
            moments.drop()
        else:
            moments.keep(engine())
    for name, (vectors, values, trace) in moments.spectra(engine()).items():
        whole = expected[name].double()
        torch.testing.assert_close(vectors * values @ vectors.T, whole, rtol=1e-4, atol=1e-5)
        assert trace == pytest.approx(float(whole.trace()), rel=1e-5)
        torch.testing.assert_close(values, spectrum_of(whole)[1], rtol=1e-4, atol=1e-5)
    shares = [moments.spectra(engine(rank, 3)).keys() for rank in range(3)]
    assert shares == [{"a"}, {"b"}, set()]


def test_what_is_not_kept_does_not_count() -> None:
    moments = InputMoments({"a": D}, size=4, seed=0, device=torch.device("cpu"))
    moments.add(0, *tokens(0))
    assert not moments.sums.any()


def test_workers_and_steps_add_up() -> None:
    x, weights = tokens(3)
    cpu = torch.device("cpu")
    whole, one, other = (InputMoments({"a": D}, size=4, seed=7, device=cpu) for _ in range(3))
    whole.add(0, x, weights)
    for part, rows in ((one, slice(0, 15)), (other, slice(15, 40))):
        part.add(0, x[rows], weights[rows])
    for moments in (whole, one, other):
        moments.keep(engine())
    torch.testing.assert_close(one.sums + other.sums, whole.sums)
    assert not torch.equal(InputMoments({"a": D}, 4, 8, cpu)._omegas[0], whole._omegas[0])
    assert torch.equal(InputMoments({"a": D}, 4, 7, cpu)._omegas[0], whole._omegas[0])


def test_workers_are_added_up_at_each_step() -> None:
    """To the last bit, so that a run that is resumed between two of them ends the same."""
    cpu, steps = torch.device("cpu"), range(3)
    mine, others = (InputMoments({"a": D}, size=4, seed=7, device=cpu) for _ in range(2))
    expected = torch.zeros_like(mine.sums)
    for step in steps:
        mine.add(0, *tokens(step))
        others.add(0, *tokens(100 + step))
        expected += mine._new + others._new
        mine.keep(SimpleNamespace(all_reduce=lambda new: new + others._new))  # type: ignore[arg-type]
        others.drop()
    assert torch.equal(mine.sums, expected)
    assert mine.mean_trace() == float(expected[-1]) > 0


def test_layers_of_one_input_share_a_product() -> None:
    """Whatever comes between them, and with weights of their own."""
    x, weights = tokens(4)
    other, _ = tokens(5)
    moments = InputMoments({"q": D, "v": D, "o": D}, size=4, seed=0, device=torch.device("cpu"))
    for layer, (inputs, weight) in enumerate([(x, weights), (x, 1 - weights), (other, weights)]):
        moments.add(layer, inputs, weight)
    x.mul_(2)  # as a buffer that the next step writes to
    moments.keep(engine())
    moments.add(0, x, weights)
    moments.keep(engine())
    alone = InputMoments({"q": D, "v": D, "o": D}, size=4, seed=0, device=torch.device("cpu"))
    for layer, (inputs, weight) in enumerate([(x / 2, weights), (x / 2, 1 - weights), (other, weights), (x, weights)]):
        alone.add(layer % 3, inputs.clone(), weight)
        alone.keep(engine())
    torch.testing.assert_close(moments.sums, alone.sums)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_few_columns_are_exact_where_few_directions_are_read(seed: int, directions: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, columns = 60, 12
    x = torch.randn(50, directions, generator=generator) @ torch.randn(directions, width, generator=generator)
    moments = InputMoments({"a": width}, columns, seed, torch.device("cpu"))
    moments.add(0, x, torch.ones(50))
    moments.keep(engine())
    vectors, values, trace = moments.spectra(engine())["a"]
    whole = spectrum_of(x.double().T @ x.double())
    torch.testing.assert_close(values[:directions], whole[1][:directions], rtol=1e-3, atol=1e-3 * trace)
    assert values[directions:].max() < 1e-4 * trace
    inside = vectors[:, :directions].T @ whole[0][:, :directions]
    assert torch.linalg.svdvals(inside).min() > 0.99


def test_few_columns_of_many_directions() -> None:
    """SmolLM2's width, eigenvalues that fall as a power: the sketch's space holds nearly what the best one holds."""
    width, columns = 576, 64
    values = torch.arange(1, width + 1).double() ** -1.5
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double()).Q
    m_dd = (turn * values) @ turn.T
    omega_dK = InputMoments({"a": width}, columns, 0, torch.device("cpu"))._omegas[0].double()
    vectors, found = eigen(m_dd @ omega_dK, omega_dK)
    held = float((vectors[:, :32].T @ m_dd @ vectors[:, :32]).trace())
    assert held > 0.98 * float(values[:32].sum())
    assert bool((found <= values[:columns] * (1 + 1e-6)).all())  # never more than there is


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 1e-1])
def test_coarse_sums_have_a_root_all_the_same(noise: float) -> None:
    """As products in TF32 leave them: the large directions are found, and none is larger than M and its noise."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 3, generator=generator).double() @ torch.randn(3, 60, generator=generator).double()
    m_dd = x.T @ x
    omega_dK = InputMoments({"a": 60}, 12, 0, torch.device("cpu"))._omegas[0].double()
    sketch = m_dd @ omega_dK
    rough = noise * sketch.abs().mean() * torch.randn(sketch.shape, generator=generator).double()
    vectors, values = eigen(sketch + rough, omega_dK)
    whole = spectrum_of(m_dd)
    assert bool(values.isfinite().all())
    assert torch.linalg.svdvals(vectors[:, :3].T @ whole[0][:, :3]).min() > 1 - 2 * noise
    assert float(values[0]) == pytest.approx(float(whole[1][0]), rel=3 * noise)


def test_nan_is_refused() -> None:
    with pytest.raises(DataError, match="NaN or infinity"):
        eigen(torch.full((4, 2), math.nan).double(), torch.ones(4, 2).double())


def test_nothing_was_read() -> None:
    moments = InputMoments({"a": D}, size=4, seed=0, device=torch.device("cpu"))
    spectrum = moments.spectra(engine())["a"]
    assert protect(spectrum, None, 0.9).shape == (D, 0)
    assert not design(spectrum, None, 3).any()
    assert torch.equal(protect(spectrum, torch.eye(D)[:, :2], 0.9), torch.eye(D)[:, :2])


def test_protected_space_by_hand() -> None:
    # 9, 4, 2, 1 of 16: 9 + 4 = 13 is the first to hold 0.75 of 16, that is 12
    first = along_axes(4.0, 1.0, 9.0, 2.0)
    assert axes(protect(first, None, 0.5)) == {2}
    space = protect(first, None, 0.75)
    assert axes(space) == {0, 2}
    # a second task reads axes 2 and 3, of which 2 is held already
    second = along_axes(0.0, 0.0, 5.0, 5.0)
    assert axes(protect(second, space, 0.49)) == {0, 2}
    space = protect(second, space, 0.51)
    assert axes(space) == {0, 2, 3}
    assert axes(protect(along_axes(1.0, 1.0, 1.0, 1.0), space, 1.0)) == {0, 1, 2, 3}


def test_no_more_is_protected_than_a_sketch_knows() -> None:
    """Two of four directions are known, of 16 the trace has 4 beside: all that is known, and no more."""
    vectors, values, _ = along_axes(4.0, 1.0, 9.0, 2.0)
    known = (vectors[:, :2], values[:2], 17.0)
    assert axes(protect(known, None, 0.95)) == {0, 2}
    assert axes(protect(known, None, 0.5)) == {2}  # 9 of 17
    assert axes(protect(known, None, 0.53)) == {0, 2}
    assert axes(protect(known, torch.eye(4)[:, 2:3], 0.53)) == {0, 2}  # 9 of 17 are held, one more is needed


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.lists(st.floats(0.3, 0.999), min_size=1, max_size=4))
def test_a_space_holds_the_share_and_is_orthonormal(seed: int, shares: list[float]) -> None:
    space: Tensor | None = None
    for number, share in enumerate(shares):
        x, weights = tokens(seed + number)
        m_dd = (x * weights[:, None]).T.double() @ x.double()
        before, space = space, protect(spectrum_of(m_dd), space, share)
        p = space.shape[1]
        torch.testing.assert_close(space.T @ space, torch.eye(p), rtol=0, atol=1e-4)
        projection = space.double() @ space.double().T
        free = torch.eye(D, dtype=torch.float64) - projection
        assert float((free @ m_dd @ free).trace()) <= (1 - share) * float(m_dd.trace()) * (1 + 1e-4)
        if before is not None:
            assert torch.equal(space[:, : before.shape[1]], before)
        if p and (before is None or p > before.shape[1]):  # with one direction less it wouldn't
            fewer = torch.eye(D, dtype=torch.float64) - space[:, :-1].double() @ space[:, :-1].double().T
            assert float((fewer @ m_dd @ fewer).trace()) > (1 - share) * float(m_dd.trace()) * (1 - 1e-4)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_design_spans_the_main_inputs_outside_the_protected_space(share: float) -> None:
    old, new = tokens(0)[0], tokens(1)[0]
    space = protect(spectrum_of(old.T @ old), None, share)
    a = design(spectrum_of(new.T @ new), space, 2)
    assert (a @ space).abs().max() < 1e-5
    torch.testing.assert_close(a @ a.T, torch.eye(2) / 3, rtol=0, atol=1e-5)
    leading = np.linalg.svd((new - new @ space @ space.T).numpy())[2][:2]
    for row, direction in zip(a.numpy(), leading, strict=True):
        assert abs(row @ direction) == pytest.approx(1 / math.sqrt(3), rel=1e-3)
        assert row[np.abs(row).argmax()] > 0


def test_design_where_little_is_free() -> None:
    a = design(along_axes(3.0, 2.0, 1.0, 4.0), torch.eye(4)[:, [0, 1, 3]], 3)
    expected = torch.zeros(3, 4)
    expected[0, 2] = 1 / math.sqrt(3)
    torch.testing.assert_close(a, expected)
    assert not design(along_axes(3.0, 2.0, 1.0, 4.0), torch.eye(4), 2).any()
