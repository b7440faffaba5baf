import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from treelora.errors import ConfigError
from treelora.penalty import prox, sign_gradient, soft_gradient

numbers = arrays("float64", 6, elements=st.floats(-5, 5).map(lambda x: round(x, 3)))


def test_prox_by_hand():
    u = torch.tensor([1.0, 1.3, 0.8, 2.0, -4.0])
    anchor = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    w, kept = prox(u, anchor, 0.5)
    torch.testing.assert_close(w, torch.tensor([1.0, 1.0, 1.0, 1.5, -3.5]))
    assert int(kept) == 3
    assert torch.equal(w[:3], anchor[:3])


def test_prox_with_a_threshold_a_coordinate():
    w, kept = prox(torch.tensor([3.0, 3.0]), torch.zeros(2), torch.tensor([1.0, 5.0]))
    assert w.tolist() == [2.0, 0.0]
    assert int(kept) == 1


@given(u=numbers, anchor=numbers, threshold=st.floats(0, 4))
@settings(max_examples=100, deadline=None)
def test_prox_minimises_its_objective(u, anchor, threshold):
    u, anchor = torch.from_numpy(u), torch.from_numpy(anchor)
    w, kept = prox(u, anchor, threshold)

    def objective(x):
        return 0.5 * (x - u).square() + threshold * (x - anchor).abs()

    # Coordinate-wise grid search around the whole range, and the two kinks.
    grid = torch.linspace(-12, 12, 4801, dtype=torch.float64)[:, None].expand(-1, 6)
    grid = torch.cat([grid, anchor[None], u[None]])
    assert (objective(w) <= objective(grid).min(dim=0).values + 1e-9).all()
    # Exactly equal, not nearly: u - anchor and threshold compare as floats do.
    inside = (u - anchor).abs() <= threshold
    assert torch.equal(w[inside], anchor[inside])
    assert int(kept) >= int(inside.sum())


def test_prox_keeps_float32_anchor_bits_and_arguments():
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(1000, generator=generator)
    u = anchor + 1e-3 * torch.randn(1000, generator=generator)
    before = u.clone(), anchor.clone()
    w, kept = prox(u, anchor, 1e-3)
    assert 600 < int(kept) < 760  # P(|N(0, 1)| <= 1) = .683
    assert int(kept) == int((w == anchor).sum())
    assert torch.equal(u, before[0])
    assert torch.equal(anchor, before[1])
    assert torch.equal(prox(u, anchor, 0.0)[0], anchor + (u - anchor))


def test_soft_gradient_by_hand():
    g, g_k = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 1.0])
    # differences 0, 1, 4: mean 5/3; lam .6 makes the threshold 1
    torch.testing.assert_close(soft_gradient(g, g_k, 0.6), torch.tensor([1.0, 1.0, 4.0]))


@given(g=numbers, g_k=numbers)
@settings(max_examples=50, deadline=None)
def test_soft_gradient_runs_from_g_to_g_k_and_is_scale_free(g, g_k):
    g, g_k = torch.from_numpy(g), torch.from_numpy(g_k)
    torch.testing.assert_close(soft_gradient(g, g_k, 0.0), g)
    torch.testing.assert_close(soft_gradient(g, g_k, 7.0), g_k)  # max <= 6 * mean over 6 coordinates
    between = soft_gradient(g, g_k, 0.5)
    assert ((between - g_k).abs() <= (g - g_k).abs() + 1e-12).all()
    torch.testing.assert_close(soft_gradient(1e-4 * g, 1e-4 * g_k, 0.5), 1e-4 * between)


def test_sign_gradient_by_hand():
    g, g_k = torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor([3.0, 1.0, 2.0, 0.0])
    # sign = [0, 1, -1, 0], norm sqrt(2); ||g|| = 5
    pull = 0.5 * 5 / math.sqrt(2)
    torch.testing.assert_close(sign_gradient(g, g_k, 0.5), torch.tensor([3.0, 4.0 + pull, -pull, 0.0]))


def test_sign_gradient_has_length_lam_times_the_gradient():
    generator = torch.Generator().manual_seed(1)
    g, g_k = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    term = sign_gradient(g, g_k, 0.3) - g
    torch.testing.assert_close(term.norm(), 0.3 * g.norm())
    assert torch.equal(sign_gradient(g, g, 0.3), g)


@pytest.mark.parametrize("function", [prox, soft_gradient, sign_gradient])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_negative_strength_refused(function, value):
    with pytest.raises(ConfigError, match="must not be negative"):
        function(torch.ones(2), torch.zeros(2), value)
