import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora.errors import ConfigError, DataError
from treelora.sketch import CountSketch, keyed_bits, layer_distances, normalise, residual


def whole_numbers(dims, seed):
    """Whole numbers, so that float32 sums are exact and linearity can be asserted without a tolerance."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-50, 50, (dim,), generator=generator).float() for dim in dims]


def test_known_bits_never_change():
    # Recorded once: if this fails, old sketches can't be compared with new ones any more.
    assert keyed_bits(5, 2**64 - 1, 3, purpose=3).tolist() == [
        9211795397352576139,
        9118779513526076597,
        1254739976074000536,
    ]


def test_streams_differ_by_seed_layer_purpose_and_block():
    streams = [
        keyed_bits(1, 0, 8, purpose=1),
        keyed_bits(2, 0, 8, purpose=1),
        keyed_bits(1, 1, 8, purpose=1),
        keyed_bits(1, 0, 8, purpose=2),
        keyed_bits(1, 0, 8, purpose=1, block=1),
    ]
    assert len({stream.tobytes() for stream in streams}) == 5
    assert len(np.unique(np.concatenate(streams))) == 40


@given(
    dims=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    size=st.integers(1, 24),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=60, deadline=None)
def test_linear(dims, size, seed):
    sketch = CountSketch(dims, size, seed)
    x, y = whole_numbers(dims, 1), whole_numbers(dims, 2)
    both = sketch.sketch([3 * a - b for a, b in zip(x, y, strict=True)])
    assert torch.equal(both, 3 * sketch.sketch(x) - sketch.sketch(y))


@given(dim=st.integers(1, 80), cuts=st.lists(st.integers(0, 80), max_size=4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_shards_add_up(dim, cuts, seed):
    sketch = CountSketch([dim, 7], 8, seed)
    first, second = whole_numbers([dim, 7], seed)
    edges = [0, *sorted(min(cut, dim) for cut in cuts), dim]
    total = torch.zeros(2, 8)
    for start, stop in pairwise(edges):
        total += sketch.sketch([first[start:stop], second[:0]], offset=[start, 0])
    total += sketch.sketch([first[:0], second], offset=0)
    assert torch.equal(total, sketch.sketch([first, second]))


def test_every_coordinate_goes_to_one_bucket_with_a_sign():
    dim, size = 50, 8
    sketch = CountSketch([dim], size, 3)
    basis = torch.stack([sketch.sketch([row])[0] for row in torch.eye(dim)])
    assert torch.equal(basis.abs().sum(1), torch.ones(dim))
    per_bucket = basis.abs().sum(0)
    assert per_bucket.min() >= 6
    assert per_bucket.max() <= 7  # balanced: 50 = 6 * 8 + 2
    assert 10 < (basis.sum(1) > 0).sum() < 40
    # Scattered, not taken in turn: about 1 in 8 coordinates is in bucket (its number mod 8).
    assert (basis.abs().argmax(1) == torch.arange(dim) % size).sum() < 15


def test_isometry_where_the_sketch_is_as_large_as_the_layer():
    x = whole_numbers([30], 4)
    assert torch.equal(CountSketch([30], 32, 0).sketch(x).square().sum(), x[0].square().sum())


def test_keeps_inner_products():
    # Over 200 independent sketches the inner product is unbiased: the mean lies within 4 standard errors.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=generator)
    y = 0.5 * x + torch.randn(400, generator=generator)
    estimates = []
    for seed in range(200):
        sketch = CountSketch([400], 64, seed)
        estimates.append(float((sketch.sketch([x]) * sketch.sketch([y])).sum()))
    error = np.std(estimates) / np.sqrt(200)
    assert abs(np.mean(estimates) - float(x @ y)) < 4 * error
    assert np.std(estimates) < 2.0 * float(x.norm() * y.norm()) / np.sqrt(64)


def test_same_in_every_process():
    sketch = CountSketch([100, 33], 16, 123)
    digest = hashlib.sha256(sketch.sketch(whole_numbers([100, 33], 0)).numpy().tobytes()).hexdigest()
    again = CountSketch([100, 33], 16, 123).sketch(whole_numbers([100, 33], 0))
    assert digest == hashlib.sha256(again.numpy().tobytes()).hexdigest()
    other = CountSketch([100, 33], 16, 124).sketch(whole_numbers([100, 33], 0))
    assert not torch.equal(again, other)


def test_layers_of_equal_size_get_different_buckets():
    x = whole_numbers([40], 0)[0]
    first, second = CountSketch([40, 40], 16, 0).sketch([x, x])
    assert not torch.equal(first, second)


def test_takes_matrices_and_bf16_and_gives_float32():
    sketch = CountSketch([12], 5, 0)
    matrix = torch.arange(12).reshape(4, 3).to(torch.bfloat16)
    result = sketch.sketch([matrix])
    assert result.dtype == torch.float32
    assert torch.equal(result, sketch.sketch([torch.arange(12).float()]))


def test_refuses_what_does_not_fit():
    sketch = CountSketch([4, 6], 3, 0)
    with pytest.raises(DataError, match="1 vectors for 2 layers"):
        sketch.sketch([torch.zeros(4)])
    with pytest.raises(DataError, match=r"layer 1: slice \[3, 9\) leaves the layer's 6 numbers"):
        sketch.sketch([torch.zeros(4), torch.zeros(6)], offset=[0, 3])
    with pytest.raises(DataError, match="3 offsets for 2 layers"):
        sketch.sketch([torch.zeros(4), torch.zeros(6)], offset=[0, 0, 0])
    with pytest.raises(ConfigError, match="sketch size = 0"):
        CountSketch([4], 0, 0)
    with pytest.raises(ConfigError, match="layer_dims"):
        CountSketch([4, 0], 3, 0)
    with pytest.raises(ConfigError, match="seed = -1"):
        CountSketch([4], 3, -1)


def test_normalise():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, -4e-30], [3e30, 4e30]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, -0.8], [0.6, 0.8]])
    torch.testing.assert_close(normalise(rows), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_normalise_names_the_layer_that_overflowed(bad):
    with pytest.raises(DataError, match="layer 1"):
        normalise(torch.tensor([[1.0, 0.0], [0.0, bad]]))


def test_residual_by_hand():
    g = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    past = torch.tensor(
        [
            [[1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]],
            [[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]],
        ]
    )
    # L1 norms [[0, 2], [2, 2]] over sqrt(4)
    assert residual(g, past).tolist() == [[0.0, 1.0], [1.0, 1.0]]
    assert residual(g, past, torch.tensor([1, 0])).tolist() == [1.0, 1.0]
    assert layer_distances(g.numpy(), past.numpy()).tolist() == [[0.0, 1.0], [1.0, 1.0]]


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_residual_is_a_metric_in_0_to_2(seed):
    generator = torch.Generator().manual_seed(seed)
    points = normalise(torch.randn(3, 9, generator=generator))[:, None, :]  # 3 tasks, 1 layer
    distance = torch.stack([residual(point, points)[:, 0] for point in points])
    assert torch.equal(distance, distance.T)
    assert distance.max() <= 2.0
    assert distance[0, 2] <= distance[0, 1] + distance[1, 2] + 1e-6
    torch.testing.assert_close(
        torch.from_numpy(layer_distances(points[0].numpy(), points.numpy())[:, 0]).float(), distance[0]
    )
