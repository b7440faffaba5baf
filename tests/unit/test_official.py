"""The released code's search, against hand-worked numbers and a slow reference in loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora.errors import CheckpointError, ConfigError, DataError
from treelora.official import Accumulator, OfficialSearch
from treelora.official_tree import OfficialTree


def search_on(past, calls=4):
    past_NLD = torch.tensor(past, dtype=torch.float64)
    return OfficialSearch(past_NLD, OfficialTree.build(past_NLD), calls)


def numbers(*shape, key=0):
    """Reals in (-1, 1) that depend on the key alone."""
    raw = np.random.Philox(key=[key, 7]).random_raw(math.prod(shape))
    return (raw >> np.uint64(11)).astype(float).reshape(shape) / 2**52 - 1


class Reference:
    """One epoch of the formulas in `treelora.official`, number by number. `groups` are the root's two, with medians."""

    def __init__(self, past, groups, calls):
        self.past, self.groups, self.calls, self.call = past, groups, calls, 0
        self.arms, self.layers = range(len(past)), range(len(past[0]))
        self.seen = {(k, layer): [] for k in self.arms for layer in self.layers}
        self.c = [[0.0] * len(row) for row in past[0]]

    def step(self, a, draws):
        for _ in self.layers:
            for layer in self.layers:
                for d, value in enumerate(a[layer]):
                    self.c[layer][d] += value / self.calls
        logarithm = math.log(2 * self.calls * (self.call + 1) * (self.call + 2))
        score = {}
        for place, seen in self.seen.items():
            mean = sum(seen) / len(seen) if seen else 0.0
            score[place] = mean + math.sqrt(logarithm) / math.sqrt(2 * len(seen) + 1e-5)
        lowest = min(score.values())
        score = {place: value + lowest for place, value in score.items()}
        total = [sum(score[k, layer] for layer in self.layers) for k in self.arms]
        first = self.draw(total, draws[0])
        for tasks, median in self.groups:
            if first in tasks and median is not None:
                for k in tasks:
                    for layer in self.layers:
                        score[k, layer] *= min(median, 1.5)
        width = max(score.values()) - min(score.values()) + 1e-5
        arms = []
        for layer in self.layers:
            arm = self.draw([score[k, layer] / width for k in self.arms], draws[1 + layer])
            pairs = zip(self.c[layer], self.past[arm][layer], strict=True)
            self.seen[arm, layer].append(sum(abs(x - y) for x, y in pairs))
            arms.append(arm)
        self.call += 1
        return arms

    def draw(self, scores, number):
        weights = [math.exp(score - max(scores)) for score in scores]
        reached = 0.0
        for k, weight in enumerate(weights):
            reached += weight / sum(weights)
            if number < reached:
                return k
        return len(weights) - 1


def groups_of(tree):
    if tree.right[0] < 0:
        return []
    sides = [1, int(tree.right[0])]
    return [(tree.members[v], None if math.isnan(tree.median[v]) else tree.median[v]) for v in sides]


@pytest.mark.parametrize(("tasks", "layers", "scale"), [(1, 3, 1), (2, 2, 1), (3, 1, 9), (5, 3, 0.4), (8, 4, 3)])
def test_search_equals_the_slow_reference(tasks, layers, scale):
    past = numbers(tasks, layers, 3, key=tasks) * scale * layers
    search, calls = search_on(past, 9), 9
    accumulator = Accumulator(torch.float64)
    for epoch in range(2):
        search.begin_epoch(calls)
        accumulator.begin_epoch(calls)
        reference = Reference(past.tolist(), groups_of(search.tree), calls)
        for call in range(calls):
            values = numbers(layers, 3, key=100 * epoch + call) * scale
            draws = abs(numbers(layers + 1, key=999 + 100 * epoch + call))
            accumulated = accumulator.add(torch.from_numpy(values))
            arms = search.select(draws)
            assert arms.tolist() == reference.step(values.tolist(), draws.tolist())
            search.observe(arms, accumulated)
        np.testing.assert_allclose(accumulated.numpy(), reference.c, rtol=1e-12)
        for (k, layer), seen in reference.seen.items():
            assert search.counts_NL[k, layer] == len(seen)
            assert search.sums_NL[k, layer] == pytest.approx(sum(seen), rel=1e-12)


def test_two_calls_by_hand():
    search = search_on([[[0.0], [0.0]], [[10.0], [4.0]]], calls=4)
    # call 0: all scores equal, so all probabilities are 1/2
    np.testing.assert_allclose(search.first_probabilities(), [0.5, 0.5])
    np.testing.assert_allclose(search.probabilities(0), 0.5)
    assert search.select(np.array([0.0, 0.5, 0.0])).tolist() == [1, 0]  # a number of 1/2 is past the first half
    arms = search.select(np.array([0.1, 0.49, 0.51]))
    assert arms.tolist() == [0, 1]
    # c = (1, 1): |1 - 0| = 1 in layer 0, |1 - 4| = 3 in layer 1
    assert search.observe(arms, torch.ones(2, 1)).tolist() == [1.0, 3.0]
    # call 1: log(2 * 4 * 2 * 3) = log 48 = 3.871201; drawn once: sqrt(3.871201 / 2.00001) = 1.391255;
    # never drawn: sqrt(3.871201 / .00001) = 622.1898. Lowest: 1 + 1.391255 = 2.391255, added to all
    drawn, never = 1.391255, 622.1898
    expected = np.array([[1 + drawn, never], [never, 3 + drawn]]) + 2.391255
    np.testing.assert_allclose(search.scores(), expected, rtol=1e-6)
    # sums over layers differ by 2 (626.5810 against 624.5810): the first arm is 1 with 1 / (1 + exp(-2)) = .880797
    np.testing.assert_allclose(search.first_probabilities(), [0.119203, 0.880797], atol=1e-5)
    # width 619.7985: layer 0 differs by 1, so 1 / (1 + e) = .268941; layer 1 by 617.7985 / 619.7985 = .996773
    np.testing.assert_allclose(search.probabilities(0)[:, 0], [0.268941, 0.731059], atol=1e-5)
    np.testing.assert_allclose(search.probabilities(0)[:, 1], [0.730424, 0.269576], atol=1e-5)


def test_factor_of_the_roots_child_by_hand():
    # Layer 0's changes 1, 1, .5 put tasks 0 and 1 left. Layer 1's changes 2, 2 have median 4, capped to 3/2: of the
    # equal scores s, theirs become 3/2 s, the width s / 2, and at call 0 s = 2 b with b the bonus: 3 against 2.
    search = search_on([[[1.0], [2.0]], [[2.0], [4.0]], [[2.5], [0.0]]])
    e = math.e
    expected = np.array([e, e, 1]) / (2 * e + 1)
    np.testing.assert_allclose(search.probabilities(first=0), np.stack([expected, expected], 1), atol=1e-6)
    np.testing.assert_allclose(search.probabilities(first=2), 1 / 3)  # task 2 is a leaf: no factor
    # Changes 1, -3 in layer 1: mean -1, products -1 and 3, lower median -1: the group drawn first is now avoided.
    search = search_on([[[1.0], [1.0]], [[2.0], [-2.0]], [[2.5], [0.0]]])
    expected = np.array([1, 1, e]) / (2 + e)
    np.testing.assert_allclose(search.probabilities(first=1), np.stack([expected, expected], 1), atol=1e-6)


def test_six_arms_of_very_different_distance_are_drawn_almost_evenly():
    # Measured: L1 distances from 141 to 4520, drawn .14 .11 .16 .13 .17 .28. The distances between the ends weren't
    # kept; they follow from the formula, as does the width over all layers: 4379 / ln(.28 / .11) = 4687.
    measured = np.array([0.14, 0.11, 0.16, 0.13, 0.17, 0.28])
    distances = 141 + 4687 * np.log(measured / 0.11)
    assert distances[[1, 5]].round() == pytest.approx([141, 4520])
    no_factor = OfficialTree(
        np.array([2, -1, -1]), np.array([0.0, np.nan, np.nan]), ((*range(6),), (0, 1, 2), (3, 4, 5))
    )
    search = OfficialSearch(torch.zeros(6, 2, 1), no_factor, calls=50)
    search.counts_NL[:] = 3
    search.sums_NL[:, 0] = 3 * distances
    search.sums_NL[:, 1] = 3 * np.array([141, 200, 300, 400, 500, 141 + 4687])
    np.testing.assert_allclose(search.probabilities(first=0)[:, 0].round(2), measured)
    assert search.first_probabilities().argmax() == 5  # and the first arm is the farthest, all but surely
    assert search.first_probabilities().max() > 1 - 1e-9


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=60, deadline=None)
def test_probabilities_and_counts(tasks, layers, key, scale):
    search = search_on(scale * numbers(tasks, layers, 2, key=key), calls=5)
    for call in range(5):
        np.testing.assert_allclose(search.first_probabilities().sum(), 1)
        for first in range(tasks):
            p_NL = search.probabilities(first)
            np.testing.assert_allclose(p_NL.sum(axis=0), 1)
            assert (p_NL.max(axis=0) <= p_NL.min(axis=0) * math.e * (1 + 1e-9)).all()
        arms = search.select(abs(numbers(layers + 1, key=key + call)))
        search.observe(arms, torch.from_numpy(scale * numbers(layers, 2, key=call)))
    assert search.counts_NL.sum(axis=0).tolist() == [5] * layers
    search.begin_epoch(3)
    assert search.counts_NL.sum() == 0
    assert search.sums_NL.sum() == 0


def test_recorded_draws_give_recorded_arms():
    search = search_on(3 * numbers(4, 3, 2, key=5), calls=6)
    accumulator, arms = Accumulator(), []
    accumulator.begin_epoch(6)
    for call in range(6):
        arms.append(search.select(abs(numbers(4, key=50 + call))))
        search.observe(arms[-1], accumulator.add(torch.from_numpy(numbers(3, 2, key=call))))
    assert np.array(arms).tolist() == [[2, 3, 2], [1, 1, 0], [0, 2, 3], [3, 2, 1], [1, 3, 1], [0, 3, 0]]


def test_search_goes_on_where_it_was_saved():
    past = numbers(4, 3, 2, key=1)
    search, other = search_on(past, 6), search_on(past, 6)
    for call in range(6):
        arms = search.select(abs(numbers(4, key=call)))
        search.observe(arms, torch.from_numpy(numbers(3, 2, key=call)))
        if call == 2:
            other.load_state_dict(search.state_dict())
        if call > 2:
            assert other.select(abs(numbers(4, key=call))).tolist() == arms.tolist()
            other.observe(arms, torch.from_numpy(numbers(3, 2, key=call)))
            np.testing.assert_array_equal(other.scores(), search.scores())
    with pytest.raises(CheckpointError, match="counts"):
        search.load_state_dict(search_on(past[:3], 6).state_dict())
    with pytest.raises(CheckpointError, match="finite"):
        search.load_state_dict(search.state_dict() | {"sums": np.full((4, 3), np.nan)})


def test_mistakes_are_told():
    search = search_on(numbers(2, 2, 3))
    with pytest.raises(DataError, match="need 3 numbers"):
        search.select(np.array([0.5, 0.5]))
    with pytest.raises(DataError, match=r"in \[0, 1\)"):
        search.select(np.array([0.5, 0.5, 1.0]))
    with pytest.raises(DataError, match="aren't finite"):
        search.observe(np.array([0, 1]), torch.full((2, 3), torch.nan))
    assert search.counts_NL.sum() == 0
    with pytest.raises(ConfigError, match="0 calls"):
        search.begin_epoch(0)
    with pytest.raises(DataError, match="2 tasks, the past 1"):
        OfficialSearch(search.past_NLD[:1], search.tree, 4)
