"""Protected directions within a number of bytes: against matrices in full, and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.test_input_space import D, along_axes, axes, spectrum_of, tokens
from treelora.input_space import Spectrum
from treelora.protected_spaces import ProtectedSpaces, Weighed, direction_bytes, weigh, within

seeds = st.integers(0, 2**31)


def matrix(spectrum: Spectrum) -> Tensor:
    """M as a share of its trace."""
    vectors_dK, values_K, trace = spectrum
    return (vectors_dK * values_K) @ vectors_dK.T / trace


def random_spectrum(seed: int) -> Spectrum:
    x_Td, weights_T = tokens(seed)
    return spectrum_of((x_Td * weights_T[:, None]).T @ x_Td)


def learnt(spectra: list[Spectrum], room: int | None, share: float = 0.95) -> ProtectedSpaces:
    """One layer's spaces after these tasks."""
    spaces = ProtectedSpaces(share, room)
    for spectrum in spectra:
        spaces.keep({"x": spaces.grown("x", spectrum)})
    return spaces


@settings(deadline=None, max_examples=30)
@given(seed=seeds, tasks=st.integers(1, 4))
def test_what_is_read_along_directions_is_the_sum_over_tasks(seed: int, tasks: int) -> None:
    spectra = [random_spectrum(seed + task) for task in range(tasks)]
    space_dp = torch.zeros(D, 0)
    read = torch.zeros(0)
    seen = []
    for spectrum in spectra:
        new = torch.linalg.qr(torch.cat([space_dp, torch.randn(D, 2)], dim=1)).Q[:, space_dp.shape[1] :]
        grown = torch.cat([space_dp, new], dim=1)
        projector = (grown @ grown.T).double()
        weighed = weigh(spectrum, grown, read)
        space_dp, read = weighed
        turned = space_dp.double()
        torch.testing.assert_close(turned @ turned.T, projector, rtol=0, atol=1e-5)  # no direction is lost
        torch.testing.assert_close(space_dp.T @ space_dp, torch.eye(space_dp.shape[1]), rtol=0, atol=1e-5)
        assert (read[:-1] >= read[1:]).all()
        # a task counts along the directions that were there when it was learnt, or came with it
        seen.append(projector @ matrix(spectrum) @ projector)
        c_dd = torch.stack(seen).sum(0)
        along = turned.T @ c_dd @ turned
        torch.testing.assert_close(along, torch.diag(read.double()), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, kept=st.integers(1, 5))
def test_no_other_directions_of_the_space_hold_more(seed: int, kept: int) -> None:
    """Of one task, what is kept against random directions of the same space."""
    spectrum = random_spectrum(seed)
    space = ProtectedSpaces(0.999).grown("x", spectrum).space
    held = learnt([spectrum], kept * direction_bytes(D), share=0.999).space("x")
    assert held is not None
    assert held.shape == (D, kept)
    m_dd = matrix(spectrum).float()
    for _ in range(5):
        other = space @ torch.linalg.qr(torch.randn(space.shape[1], kept)).Q
        assert float((other.T @ m_dd @ other).trace()) <= float((held.T @ m_dd @ held).trace()) + 1e-5


def test_a_direction_that_many_tasks_read_outlives_one_that_a_single_task_reads() -> None:
    """By hand: axis 0 is read by 0.6 + 0.5, axis 1 by 0.4, axis 2 by 0.5; two have room."""
    spectra = [along_axes(6, 4, 0, 0), along_axes(5, 0, 5, 0)]
    for room, expected in ((1, {0}), (2, {0, 2}), (3, {0, 1, 2}), (None, {0, 1, 2})):
        spaces = learnt(spectra, None if room is None else room * direction_bytes(4), share=0.99)
        space = spaces.space("x")
        assert space is not None
        assert axes(space) == expected
    assert learnt(spectra, 2 * direction_bytes(4), share=0.99).layers["x"].read.tolist() == pytest.approx([1.1, 0.5])


def test_what_was_given_up_can_come_back() -> None:
    """A later task that reads it protects it, at no more than its own part."""
    spaces = learnt([along_axes(6, 4, 0), along_axes(0, 1, 0)], direction_bytes(3), share=0.99)
    space = spaces.space("x")
    assert space is not None
    assert axes(space) == {1}
    assert spaces.layers["x"].read.tolist() == pytest.approx([1.0])


def test_room_for_all_changes_no_direction() -> None:
    spectra = [random_spectrum(seed) for seed in range(3)]
    free, roomy = learnt(spectra, None).space("x"), learnt(spectra, 10**6).space("x")
    assert free is not None
    assert roomy is not None
    torch.testing.assert_close(roomy @ roomy.T, free @ free.T, rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=100)
@given(
    reads=st.lists(st.lists(st.floats(0, 1, width=32), max_size=6), min_size=1, max_size=4),
    widths=st.lists(st.sampled_from([6, 8, 20]), min_size=4, max_size=4),
    room=st.integers(0, 800),
)
def test_within_takes_the_most_read_for_its_bytes(reads: list[list[float]], widths: list[int], room: int) -> None:
    layers = {
        str(number): Weighed(torch.eye(width)[:, : len(read)], torch.tensor(sorted(read, reverse=True)))
        for number, (read, width) in enumerate(zip(reads, widths, strict=False))
    }
    kept = within(layers, room)
    assert kept.keys() == layers.keys()
    taken = sum(direction_bytes(len(w.space)) * w.space.shape[1] for w in kept.values())
    assert taken <= room
    worth = {name: w.read / direction_bytes(len(w.space)) for name, w in layers.items()}
    left = [worth[name][len(kept[name].read) :] for name in layers]
    for name, weighed in kept.items():
        count = len(weighed.read)
        assert torch.equal(weighed.space, layers[name].space[:, :count])
        assert torch.equal(weighed.read, layers[name].read[:count])
        for other in left:
            if count and len(other):
                assert worth[name][count - 1] >= other[0]
    dearest = max(direction_bytes(len(w.space)) for w in layers.values())
    assert taken + dearest > room or not any(len(other) for other in left)  # no more room than one direction's


def test_a_layer_that_is_not_read_stays_as_it_is() -> None:
    nothing: Spectrum = (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 0.0)
    spaces = learnt([nothing], 10**4)
    space = spaces.space("x")
    assert space is not None
    assert space.shape == (4, 0)
    after = learnt([nothing, along_axes(3, 1, 0, 0), nothing], 10**4)
    assert after.layers["x"].read.tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("room", [None, 3 * direction_bytes(D), 10**6])
def test_the_state_goes_on_where_it_was_taken(room: int | None) -> None:
    spectra = [random_spectrum(seed) for seed in range(4)]
    straight, interrupted = learnt(spectra, room), learnt(spectra[:2], room)
    resumed = ProtectedSpaces(0.95, room)
    resumed.load_state_dict(interrupted.state_dict() | {"per_batch": torch.zeros(1)})
    for spectrum in spectra[2:]:
        resumed.keep({"x": resumed.grown("x", spectrum)})
    one, other = straight.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys() == {"protected/x"} | ({"read_along/x"} if room else set())
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
