import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_tree import chain_json, random_signatures
from treelora.bandit import TreeBandit
from treelora.tree import SignatureTree

SEARCHES = ("tree_lcb", "flat_lcb", "full", "random", "newest")


class SlowBandit:
    """One layer, everything recomputed from the history of pulls, as the formulas read."""

    def __init__(self, tree, layer, c, horizon, bound, scale):
        self.tree, self.layer, self.c, self.log = tree, layer, c, math.log(max(horizon, 2))
        self.bound, self.scale, self.history = bound, scale, []

    def own(self, node):
        below = set(self.tree.tasks_below(node).tolist())
        losses = [loss for task, loss in self.history if task in below]
        if not losses:
            return -math.inf
        total = 0.0
        for loss in losses:
            total += loss
        return total / len(losses) - self.c * math.sqrt(self.log / len(losses))

    def lcb(self, node):
        if self.own(node) == -math.inf or self.tree.left[node] < 0:
            return self.own(node)
        children = (self.tree.left[node], self.tree.right[node])
        delta = self.tree.delta[node, self.layer] / self.scale
        if self.bound == "literal":
            return min(self.own(child) for child in children) - delta
        return max(min(self.lcb(child) for child in children), self.own(node) - delta)

    def select(self):
        node = 0
        while self.tree.left[node] >= 0:
            a, b = self.tree.left[node], self.tree.right[node]
            node = a if self.lcb(a) <= self.lcb(b) else b
        return self.tree.task[node]


def line_tree():
    """Tasks at 0, 1, 4: branches {0, 1} with delta 1 and the root with delta 4; one layer."""
    return SignatureTree.build(np.array([0.0, 1.0, 4.0])[:, None, None])


@pytest.mark.parametrize("bound", ["smooth", "literal"])
@pytest.mark.parametrize(("tasks", "layers", "rounds"), [(1, 2, 30), (2, 2, 60), (7, 3, 200), (13, 2, 250)])
def test_equals_recomputing_everything(bound, tasks, layers, rounds):
    tree = SignatureTree.build(random_signatures(tasks, layers, seed=tasks))
    bandit = TreeBandit(tree, layers, 0.3, rounds, bound=bound)
    slow = [SlowBandit(tree, layer, 0.3, rounds, bound, bandit.scale[layer]) for layer in range(layers)]
    rng = np.random.default_rng(tasks)
    means = rng.random((tasks, layers)) * 2
    for _ in range(rounds):
        arms = bandit.select()
        assert arms.tolist() == [oracle.select() for oracle in slow]
        losses = np.abs(means[arms, np.arange(layers)] + 0.2 * rng.normal(size=layers))
        bandit.observe(arms, losses)
        for layer, oracle in enumerate(slow):
            oracle.history.append((arms[layer], losses[layer] / bandit.scale[layer]))
    for layer, oracle in enumerate(slow):
        assert bandit.bounds[layer, :-1].tolist() == [oracle.lcb(node) for node in range(tree.nodes)]


@given(tasks=st.integers(1, 9), seed=st.integers(0, 10**6), bound=st.sampled_from(["smooth", "literal"]))
@settings(max_examples=40, deadline=None)
def test_any_arms_give_the_formulas_bounds(tasks, seed, bound):
    # Arms that the walk would not choose, among identical tasks, with ties in the losses.
    signatures = random_signatures(tasks, 1, seed=seed)
    signatures[-1] = signatures[0]
    tree = SignatureTree.build(signatures)
    bandit = TreeBandit(tree, 1, 0.5, 40, bound=bound)
    slow = SlowBandit(tree, 0, 0.5, 40, bound, bandit.scale[0])
    rng = np.random.default_rng(seed)
    for _ in range(25):
        arm, loss = int(rng.integers(tasks)), float(rng.integers(3))
        bandit.observe(np.array([arm]), np.array([loss]))
        slow.history.append((arm, loss / bandit.scale[0]))
        assert bandit.select().tolist() == [slow.select()]
    assert bandit.bounds[0, :-1].tolist() == [slow.lcb(node) for node in range(tree.nodes)]


def test_rounds_by_hand():
    tree = line_tree()
    # c * sqrt(log T) = 1 with T = 16, so e(n) = 1 / sqrt(n). Losses are scaled by the root's delta, 4.
    bandit = TreeBandit(tree, 1, 1 / math.sqrt(math.log(16)), 16)
    assert bandit.scale.tolist() == [4.0]
    node = {"all": 0, "01": 1, "0": 2, "1": 3, "4": 4}
    assert tree.tasks_below(node["01"]).tolist() == [0, 1]

    def bound(name):
        return bandit.bounds[0, node[name]]

    def pull(expected_arm, loss):
        arms = bandit.select()
        assert arms.tolist() == [expected_arm]
        bandit.observe(arms, np.array([loss]))

    pull(0, 2.0)  # all untried: leftmost
    assert bound("0") == pytest.approx(0.5 - 1)
    # The branch's other leaf is untried (-inf), but smoothness bounds it: mu - e(1) - delta = .5 - 1 - 1/4.
    assert bound("01") == pytest.approx(-0.75)
    pull(2, 0.4)  # the untried leaf 4 before the bounded branch
    assert bound("4") == pytest.approx(0.1 - 1)
    pull(2, 0.4)  # -.9 < -.75
    assert bound("4") == pytest.approx(0.1 - 1 / math.sqrt(2))
    pull(1, 1.2)  # the branch at -.75 < -.607, in it the untried task 1
    assert bound("1") == pytest.approx(0.3 - 1)
    # min child = -.7; the branch's own bound: (.5 + .3) / 2 - 1/sqrt(2) - .25 = -.557, which is tighter.
    assert bound("01") == pytest.approx(0.4 - 1 / math.sqrt(2) - 0.25)
    # root: mean (.5 + .1 + .1 + .3) / 4 - 1/2 - 1 = -1.25 < min child -.607
    assert bound("all") == pytest.approx(0.1 - 1 / math.sqrt(2))
    pull(2, 4.0)
    assert bound("4") == pytest.approx(0.4 - 1 / math.sqrt(3))
    # -.177 > -.557: back to the branch, its lower leaf task 1
    pull(1, 1.2)
    assert bandit.counts[0, :-1].tolist() == [6, 3, 1, 2, 3]
    assert bandit.pulls().tolist() == [[1], [2], [3]]
    assert bandit.lcb(np.array([1])).tolist() == pytest.approx([4 * (0.3 - 1 / math.sqrt(2))])


def test_literal_bound_by_hand():
    bandit = TreeBandit(line_tree(), 1, 1 / math.sqrt(math.log(16)), 16, bound="literal")
    for arm, loss in ((0, 2.0), (1, 1.2), (2, 0.4)):
        bandit.observe(np.array([arm]), np.array([loss]))
    # branch: min(.5 - 1, .3 - 1) - 1/4; root: min(.4 - 1/sqrt(2), .1 - 1) - 1
    assert bandit.bounds[0, 1] == pytest.approx(-0.7 - 0.25)
    assert bandit.bounds[0, 0] == pytest.approx(-0.9 - 1)


def test_flat_pulls_every_arm_once_then_the_lowest_bound():
    tree = SignatureTree.build(random_signatures(6, 2))
    bandit = TreeBandit(tree, 2, 0.25, 100, search="flat_lcb")
    means = np.array([[0.9, 0.3], [0.8, 0.4], [0.2, 0.5], [0.7, 0.6], [0.6, 0.7], [0.5, 0.8]])
    seen = []
    for _ in range(6):
        arms = bandit.select()
        seen.append(arms.tolist())
        bandit.observe(arms, means[arms, [0, 1]])
    assert seen == [[task, task] for task in range(6)]
    assert bandit.select().tolist() == [2, 0]


def test_flat_equals_a_brute_force_lcb():
    tree = SignatureTree.build(random_signatures(5, 1))
    bandit = TreeBandit(tree, 1, 0.4, 150, search="flat_lcb")
    rng, losses = np.random.default_rng(0), [[] for _ in range(5)]
    for _ in range(150):
        bounds = [
            sum(seen) / bandit.scale[0] / len(seen) - 0.4 * math.sqrt(math.log(150) / len(seen)) if seen else -math.inf
            for seen in losses
        ]
        arms = bandit.select()
        assert bounds[arms[0]] == pytest.approx(min(bounds))
        loss = 1 + 0.2 * arms[0] + 0.3 * rng.random()
        losses[arms[0]].append(loss)
        bandit.observe(arms, np.array([loss]))


def test_full_takes_the_lowest_mean():
    tree = SignatureTree.build(random_signatures(9, 3))
    bandit = TreeBandit(tree, 3, 0.25, 50, search="full")
    assert bandit.select().tolist() == [0, 0, 0]
    rng, total = np.random.default_rng(0), np.zeros((9, 3))
    for _ in range(20):
        losses = rng.random((9, 3))
        total += losses
        bandit.observe_all(losses)
        assert bandit.select().tolist() == total.argmin(axis=0).tolist()
    assert (bandit.pulls() == 20).all()
    assert bandit.counts[:, 0].tolist() == [180, 180, 180]


def test_random_is_uniform_and_keyed_by_seed_task_and_step():
    tree = SignatureTree.build(random_signatures(5, 4))

    def draw(seed=0, task="qa"):
        bandit = TreeBandit(tree, 4, 0.25, 10, search="random", seed=seed, task=task)
        return np.stack([bandit.select(step) for step in range(1, 501)])

    first = draw()
    assert np.array_equal(first, draw())
    assert not np.array_equal(first, draw(seed=1))
    assert not np.array_equal(first, draw(task="nli"))
    counts = np.bincount(first.ravel(), minlength=5)
    # chi-squared with 4 degrees of freedom, p = .001 at 18.5
    assert (np.square(counts - 400) / 400).sum() < 18.5
    assert len({tuple(row) for row in first[:50]}) > 40


def test_newest_takes_one_arm_whatever_the_losses():
    tree = SignatureTree.build(random_signatures(5, 3))
    for newest, arm in ((None, 4), (2, 2)):
        bandit = TreeBandit(tree, 3, 0.25, 10, search="newest", newest=newest)
        for step in range(1, 4):
            assert bandit.select(step).tolist() == [arm] * 3
            bandit.observe(np.full(3, arm), np.array([0.1, 5.0, 9.0]))
        assert bandit.pulls()[arm].tolist() == [3, 3, 3]


@pytest.mark.parametrize("search", SEARCHES)
def test_one_task(search):
    tree = SignatureTree.build(random_signatures(1, 2))
    bandit = TreeBandit(tree, 2, 0.25, 10, search=search)
    for step in range(3):
        assert bandit.select(step).tolist() == [0, 0]
        if search == "full":
            bandit.observe_all(np.array([[0.5, 1.0]]))
        else:
            bandit.observe(np.array([0, 0]), np.array([0.5, 1.0]))
    assert bandit.counts[:, 0].tolist() == [3, 3]
    assert bandit.scale.tolist() == [1.0, 1.0]


def test_two_identical_tasks_and_zero_signatures_take_turns():
    tree = SignatureTree.build(np.zeros((2, 1, 4)))
    bandit = TreeBandit(tree, 1, 0.25, 100)
    arms = []
    for _ in range(6):
        arm = bandit.select()
        arms.append(int(arm[0]))
        bandit.observe(arm, np.array([0.7]))
    assert arms == [0, 1, 0, 1, 0, 1]


def test_layers_do_not_touch_each_other():
    tree = SignatureTree.build(random_signatures(8, 3))
    together = TreeBandit(tree, 3, 0.25, 60)
    alone = TreeBandit(tree, 3, 0.25, 60)
    rng = np.random.default_rng(0)
    for _ in range(60):
        losses = rng.random(8)
        arms, other = together.select(), alone.select()
        assert arms[1] == other[1]
        together.observe(arms, losses[arms])
        # The other two layers see something else altogether.
        alone.observe(other, np.array([0.0, losses[other[1]], 1.0]))


def test_only_the_pulled_path_changes():
    tree = SignatureTree.build(random_signatures(16, 1))
    bandit = TreeBandit(tree, 1, 0.25, 100)
    rng = np.random.default_rng(0)
    for _ in range(50):
        before = bandit.bounds[0].copy()
        arms = bandit.select()
        bandit.observe(arms, rng.random(1))
        path = set(tree.paths()[arms[0]].tolist())
        changed = set(np.flatnonzero(before != bandit.bounds[0]).tolist())
        assert changed <= path | {tree.nodes}


def test_deep_tree():
    tree = SignatureTree.from_json(chain_json(300))
    bandit = TreeBandit(tree, 1, 0.25, 1000)
    for _ in range(300):
        arms = bandit.select()
        bandit.observe(arms, np.array([1.0]))
    # delta = 0 everywhere says that all tasks are alike: most leaves need not be tried at all.
    assert bandit.counts[0, 0] == 300
    assert np.count_nonzero(bandit.pulls()) < 150


def test_ratio_by_hand():
    bandit = TreeBandit(line_tree(), 1, 0.5, 16)
    assert np.isnan(bandit.ratio()).tolist() == [True]
    bandit.observe(np.array([0]), np.array([2.0]))
    bandit.observe(np.array([1]), np.array([2.0]))
    assert bandit.ratio().tolist() == [math.inf]
    bandit.observe(np.array([1]), np.array([4.0]))
    # e(1) and e(2) on average, over |.5 - .75|
    explore = 0.5 * math.sqrt(math.log(16)) * (1 + 1 / math.sqrt(2)) / 2
    assert bandit.ratio().tolist() == pytest.approx([explore / 0.25])


def test_scale_of_losses_does_not_matter():
    # Ten times larger signatures and residuals: the same choices, to the last one.
    signatures = random_signatures(9, 2)
    small = TreeBandit(SignatureTree.build(signatures), 2, 0.25, 80)
    large = TreeBandit(SignatureTree.build(8 * signatures), 2, 0.25, 80)  # 8: exact in binary
    rng = np.random.default_rng(0)
    for _ in range(80):
        arms = small.select()
        assert np.array_equal(arms, large.select())
        losses = rng.random(2)
        small.observe(arms, losses)
        large.observe(arms, 8 * losses)
