import numpy as np
import pytest

from treelora.errors import ConfigError
from treelora.simulation.regret import (
    VARIANTS,
    RegretCell,
    growth_columns,
    regret_cells,
    regret_columns,
    simulate_regret,
)
from treelora.simulation.smooth_bandit import SmoothProblem


def cell(arms, variant, c=0.25, slack=1.0):
    return RegretCell(arms, variant, None if variant in ("full", "random") else c, slack)


@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9])
def test_the_tree_bounds_every_difference_below_a_node(gamma):
    problem = SmoothProblem(gamma=gamma, seed=3)
    means, tree = problem.means(32, 5), problem.tree(32, 5)
    for node in range(tree.nodes):
        spread = np.ptp(means[:, tree.tasks_below(node)], axis=1)
        assert (spread <= tree.delta[node] + 1e-12).all()
    # ... and not by far: some pair of siblings uses most of the bound.
    leaves_of_one = [node for node in range(tree.nodes) if tree.size[node] == 2]
    used = [np.ptp(means[:, tree.tasks_below(n)], axis=1) / tree.delta[n] for n in leaves_of_one]
    assert np.max(used) > 0.8


def test_delta_is_about_three_times_the_spread():
    # docs/simulation.md compares a diameter's looseness with this.
    problem = SmoothProblem()
    means, tree = problem.means(256, 40), problem.tree(256, 40)
    inner = np.flatnonzero(tree.left >= 0)
    ratio = np.median([tree.delta[node] / np.ptp(means[:, tree.tasks_below(node)], axis=1) for node in inner])
    assert ratio == pytest.approx(3.1, abs=0.3)


def test_delta_by_hand():
    tree = SmoothProblem(gamma=0.5).tree(4, 2)
    assert tree.level.tolist() == [0, 1, 2, 2, 1, 2, 2]
    assert tree.task.tolist() == [-1, -1, 0, 1, -1, 2, 3]
    assert tree.delta[:, 0].tolist() == [0.75, 0.25, 0, 0, 0.25, 0, 0]
    assert SmoothProblem(gamma=0.5).tree(4, 2, slack=2.0).delta[1].tolist() == [0.5, 0.5]


def test_larger_problems_refine_smaller_ones_and_runs_stand_alone():
    problem = SmoothProblem(gamma=0.5, seed=1)
    small, large = problem.means(8, 3), problem.means(16, 3)
    # A child is its parent plus at most A gamma^4 = 0.5 / 16.
    assert np.abs(large - np.repeat(small, 2, axis=1)).max() <= 0.5 / 16
    np.testing.assert_array_equal(problem.means(16, 5)[:3], large)
    alone = simulate_regret(cell(8, "tree"), problem, 50, 1).regret
    np.testing.assert_array_equal(simulate_regret(cell(8, "tree"), problem, 50, 4).regret[:, :1], alone)


def test_shuffled_means_are_the_same_means_elsewhere():
    problem = SmoothProblem()
    means = problem.means(64, 3)
    shuffled = problem.shuffled(means)
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(means, axis=1))
    assert (shuffled != means).mean() > 0.9


def test_losses_are_never_negative_and_not_biased():
    problem = SmoothProblem(sigma=0.3)
    noise = np.array(list(problem.noise(16, 4, 4000)))
    assert (problem.offset + problem.means(16, 4).min() + noise).min() >= 0
    assert noise.mean() == pytest.approx(0, abs=4 * 0.3 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("variant", ["tree", "tree, wrong", "literal", "flat"])
def test_two_arms_by_hand(variant):
    # Without noise and exploration: arm 0, then arm 1 because it is untried, then the better one for ever.
    problem = SmoothProblem(sigma=0.0, seed=2)
    means = problem.means(2, 6)
    found = simulate_regret(cell(2, variant, c=0.0), problem, 12, 6)
    np.testing.assert_allclose(found.regret[-1], np.abs(means[:, 0] - means[:, 1]))
    assert found.tried.tolist() == [2] * 6


def test_two_arms_with_exploration_by_hand():
    # c sqrt(log T) = 1, so LCB = mean - 1 / sqrt(n): the worse arm, whose gap is g, is pulled again as soon as
    # 1 - 1 / sqrt(n) > g, n the pulls of the better one. That is the whole schedule for 2 pulls of the worse arm.
    problem = SmoothProblem(sigma=0.0, seed=2)
    steps = 12
    gap = float(np.abs(np.diff(problem.means(2, 1)))[0, 0])
    assert 0 < gap < 1
    better, worse, pulls_of_worse = 1, 1, 1
    for _ in range(steps - 2):
        if gap - 1 / np.sqrt(worse) < -1 / np.sqrt(better):
            worse, pulls_of_worse = worse + 1, pulls_of_worse + 1
        else:
            better += 1
    found = simulate_regret(cell(2, "flat", c=1 / np.sqrt(np.log(steps))), problem, steps, 1)
    assert pulls_of_worse > 1
    assert found.regret[-1, 0] == pytest.approx(pulls_of_worse * gap)


def test_full_information_without_noise_pays_for_its_first_pull_only():
    problem = SmoothProblem(sigma=0.0)
    means = problem.means(16, 4)
    found = simulate_regret(cell(16, "full", slack=None), problem, 20, 4)
    np.testing.assert_allclose(found.regret, np.tile(means[:, 0] - means.min(axis=1), (20, 1)))


def test_flat_search_with_as_many_steps_as_arms_pulls_each_once():
    problem = SmoothProblem()
    means = problem.means(32, 3)
    found = simulate_regret(cell(32, "flat", slack=None), problem, 32, 3)
    assert found.tried.tolist() == [32] * 3
    np.testing.assert_allclose(found.regret[-1], (means - means.min(axis=1, keepdims=True)).sum(axis=1))


def test_the_right_tree_beats_the_wrong_one_and_both_beat_chance():
    problem = SmoothProblem()
    last = {name: simulate_regret(cell(64, name), problem, 512, 20).regret[-1].mean() for name in VARIANTS}
    assert last["full"] < last["tree"] < last["tree, wrong"] < last["flat"] < last["random"]
    assert last["literal"] < last["literal, wrong"] < last["random"]


def test_the_trees_regret_hardly_grows_where_the_flat_ones_does():
    problem = SmoothProblem()
    results = [simulate_regret(cell(n, v), problem, 512, 20) for n in (16, 64, 256) for v in ("tree", "flat")]
    columns = growth_columns(results)
    assert columns["variant"] == ["tree", "flat"]
    tree, flat = columns["exponent"]
    assert tree < 0.2 < flat
    assert columns["exponent_high"][0] < columns["exponent_low"][1]
    assert columns["sizes"] == [3, 3]


def test_the_seed_decides_everything():
    first, again, other = (simulate_regret(cell(16, "tree"), SmoothProblem(seed=s), 60, 3).regret for s in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first[-1] != other[-1]).all()


def test_cells_and_columns():
    cells = regret_cells([2, 4], [0.25, 1.0], [1.0, 2.0])
    assert len(cells) == len(set(cells)) == 2 * (6 * 2 + 2 + 1)
    assert sum(c.slack == 2.0 for c in cells) == 2
    found = simulate_regret(cells[0], SmoothProblem(), 5, 2)
    columns = regret_columns([found])
    assert list(columns) == ["arms", "variant", "exploration", "slack", "run", "step", "regret", "tried"]
    assert columns["step"] == [1, 2, 3, 4, 5] * 2
    assert columns["run"] == [0] * 5 + [1] * 5
    assert columns["regret"][4] == found.regret[-1, 0]
    assert growth_columns([found])["variant"] == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmoothProblem(gamma=1.0), "gamma = 1.0"),
        (lambda: SmoothProblem(sigma=-1.0), "sigma = -1.0"),
        (lambda: SmoothProblem().means(12, 1), "arms = 12: must be a power of two"),
        (lambda: regret_cells([16, 17], [0.25]), "arms = 17: must be a power of two"),
        (lambda: regret_cells([16], [0.25], [-1.0]), "from 0 on"),
        (lambda: simulate_regret(cell(4, "tree"), SmoothProblem(), 0, 1), "steps = 0"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
