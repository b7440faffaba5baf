import math

import numpy as np
import pytest

from tests.unit.test_bandit import SEARCHES, line_tree
from tests.unit.test_tree import random_signatures
from treelora.bandit import TreeBandit
from treelora.errors import CheckpointError, ConfigError, DataError
from treelora.sketch import layer_distances
from treelora.tree import SignatureTree


@pytest.mark.parametrize("bound", ["smooth", "literal"])
@pytest.mark.parametrize("search", SEARCHES)
def test_continues_bit_for_bit(search, bound):
    tree = SignatureTree.build(random_signatures(11, 4))

    def make():
        return TreeBandit(tree, 4, 0.25, 200, search=search, bound=bound, seed=3, task="t")

    def play(bandit, start, stop):
        rng = np.random.default_rng(start)
        arms = []
        for step in range(start, stop):
            arms.append(bandit.select(step))
            losses = rng.random((11, 4))
            if search == "full":
                bandit.observe_all(losses)
            else:
                bandit.observe(arms[-1], losses[arms[-1], np.arange(4)])
        return np.stack(arms)

    first = make()
    play(first, 0, 57)
    second = make()
    second.load_state_dict(first.state_dict())
    assert np.array_equal(second.bounds[:, :-1], first.bounds[:, :-1])
    assert np.array_equal(play(first, 57, 150), play(second, 57, 150))
    assert np.array_equal(first.sums[:, :-1], second.sums[:, :-1])
    assert np.array_equal(first.bounds[:, :-1], second.bounds[:, :-1])


def smooth_problem(tasks, seed, size=16):
    """Signatures on two levels of families, and a gradient near one of them."""
    rng = np.random.default_rng(seed)
    wide, narrow = rng.normal(size=(4, size)), 0.5 * rng.normal(size=(16, size))
    task = np.arange(tasks)
    points = wide[task % 4] + narrow[task % 16] + 0.15 * rng.normal(size=(tasks, size))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    gradient = points[seed % tasks] + 0.05 * rng.normal(size=size)
    return points[:, None, :].astype(np.float32), gradient[None] / np.linalg.norm(gradient)


def regret(search, tasks, horizon, seed, c=0.25, noise=0.3):
    signatures, gradient = smooth_problem(tasks, seed)
    bandit = TreeBandit(SignatureTree.build(signatures), 1, c, horizon, search=search, seed=seed)
    means = layer_distances(gradient, signatures)[:, 0]
    rng = np.random.default_rng(seed + 1000)
    total = 0.0
    for step in range(horizon):
        arms = bandit.select(step)
        total += means[arms[0]] - means.min()
        bandit.observe(arms, np.maximum(means[arms] + noise * rng.normal(size=1), 0))
    return total


def test_the_tree_saves_regret():
    searches = {
        search: np.mean([regret(search, 64, 1024, seed) for seed in range(6)])
        for search in ("tree_lcb", "flat_lcb", "random")
    }
    assert searches["tree_lcb"] < 0.4 * searches["random"]
    assert searches["tree_lcb"] < 0.8 * searches["flat_lcb"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "greedy"}, "search = 'greedy'"),
        ({"bound": "tight"}, "bound = 'tight'"),
        ({"c": -1.0}, "exploration = -1.0"),
        ({"c": float("nan")}, "exploration = nan"),
        ({"horizon": 0}, "horizon = 0"),
        ({"layers": 2}, "layers = 2, but the tree knows 1"),
        ({"scale": np.zeros(1)}, "positive numbers"),
    ],
)
def test_settings_refused(settings, message):
    arguments = {"layers": 1, "c": 0.25, "horizon": 10, **settings}
    with pytest.raises(ConfigError, match=message):
        TreeBandit(line_tree(), **arguments)


def test_observations_refused():
    bandit = TreeBandit(line_tree(), 1, 0.25, 10)
    for bad in (math.nan, math.inf, -0.5):
        with pytest.raises(DataError, match="layer 0: loss"):
            bandit.observe(np.array([0]), np.array([bad]))
    with pytest.raises(DataError, match="layer 0: loss nan"):
        bandit.observe_all(np.array([[0.1], [math.nan], [0.1]]))
    with pytest.raises(DataError, match=r"must lie in 0\.\.2"):
        bandit.observe(np.array([3]), np.array([0.1]))
    with pytest.raises(DataError, match=r"must lie in 0\.\.2"):
        bandit.observe(np.array([-1]), np.array([0.1]))
    with pytest.raises(DataError, match="need one of each for 1 layers"):
        bandit.observe(np.array([0, 1]), np.array([0.1, 0.2]))
    with pytest.raises(DataError, match=r"needs \[3, 1\]"):
        bandit.observe_all(np.array([0.1]))
    assert not bandit.counts.any()


@pytest.mark.parametrize(
    "change",
    [
        {"counts": np.zeros((1, 4), dtype=np.int64)},
        {"counts": np.zeros((1, 5))},
        {"counts": np.full((1, 5), -1)},
        {"sums": np.full((1, 5), np.nan)},
        {"sums": None},
    ],
)
def test_states_refused(change):
    bandit = TreeBandit(line_tree(), 1, 0.25, 10)
    with pytest.raises(CheckpointError, match="bandit state"):
        bandit.load_state_dict({**bandit.state_dict(), **change})
