"""Merging under a budget: which arms, into what, and what becomes of the tree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_tree import random_signatures
from treelora.arms import Arms, closest_pair, merged_sketch
from treelora.errors import ConfigError, DataError
from treelora.memory import MemoryConfig, StepCall, TaskMemory
from treelora.sketch import layer_distances
from treelora.tree import SignatureTree


def brute_force_pair(sketches, masses):
    costs = {
        (i, j): masses[i] * masses[j] / (masses[i] + masses[j]) * ((sketches[i] - sketches[j]) ** 2).sum()
        for i in range(len(sketches))
        for j in range(i + 1, len(sketches))
    }
    return min(costs, key=costs.get)


def test_pair_by_hand():
    # Costs m_i m_j / (m_i + m_j) d^2: (0, 1) 5 * 1 = 5 of ten rows each, (2, 3) 0.5 * 4 = 2 of one row each.
    sketches = np.array([0.0, 1.0, 10.0, 12.0])[:, None, None]
    assert closest_pair(sketches, np.array([10.0, 10.0, 1.0, 1.0])) == (2, 3)
    assert closest_pair(sketches, np.ones(4)) == (0, 1)


@given(n=st.integers(2, 12), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_pair_equals_brute_force(n, seed):
    rng = np.random.default_rng(seed)
    sketches, masses = random_signatures(n, 2, 8, seed=seed).astype(np.float64), rng.integers(1, 50, n).astype(float)
    assert closest_pair(sketches, masses) == brute_force_pair(sketches, masses)


def test_identical_sketches_go_first_whatever_their_masses():
    sketches = np.stack([*random_signatures(4, 3, 16), random_signatures(4, 3, 16)[1]])
    assert closest_pair(sketches, np.array([1.0, 1e6, 1.0, 1.0, 1e6])) == (1, 4)


def test_merged_sketch_by_hand():
    a, b = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [-1.0, 0.0]])
    merged = merged_sketch(np.stack([a, b]), np.array([3.0, 4.0]))
    np.testing.assert_allclose(merged[0], [0.6, 0.8], atol=1e-7)
    np.testing.assert_allclose(merged[1], [-1.0, 0.0], atol=1e-7)  # 3/7 - 4/7 < 0, at unit length
    assert not merged_sketch(np.stack([a, -a]), np.ones(2)).any()  # opposites cancel


@pytest.mark.parametrize("rebuild_limit", [256, 2])
def test_groups_masses_and_tree_stay_true(rebuild_limit):
    config = MemoryConfig(layers=2, sketch_size=16, max_arms=4, rebuild_limit=rebuild_limit)
    arms, signatures = Arms(config), random_signatures(12, 2, 16, seed=3)
    for task, sketch in enumerate(signatures):
        arms.add_task(task, sketch, mass=task + 1.0)
        assert len(arms) == min(task + 1, 4)
        assert sorted(t for group in arms.groups for t in group) == list(range(task + 1))
        np.testing.assert_allclose(arms.masses_N, [sum(t + 1.0 for t in group) for group in arms.groups])
        assert arms.tree.tasks == len(arms)
        for a in range(len(arms)):  # the smooth-tree assumption survives merging
            distance_NL = layer_distances(arms.sketches_NLK[a], arms.sketches_NLK)
            for b in range(len(arms)):
                common = next(
                    node for node in range(arms.tree.nodes - 1, -1, -1) if {a, b} <= set(arms.tree.tasks_below(node))
                )
                assert (distance_NL[b] <= arms.tree.delta[common] + 1e-6).all()
        if rebuild_limit > 12:
            assert arms.tree.to_json() == SignatureTree.build(arms.sketches_NLK).to_json()


@pytest.mark.parametrize("max_arms", [None, 5])
def test_what_was_handed_out_stays_and_is_seldom_copied(max_arms):
    config = MemoryConfig(layers=2, sketch_size=16, max_arms=max_arms)
    arms, signatures = Arms(config), random_signatures(40, 2, 16, seed=3)
    handed_out, copied, other = [], 0, None
    for task, sketch in enumerate(signatures):
        before = arms.sketches_NLK
        handed_out.append((before, before.copy()))
        arms.add_task(task, sketch, mass=1.0)
        copied += not np.may_share_memory(before, arms.sketches_NLK)
        assert not arms.sketches_NLK.flags.writeable
        if task == 20:  # one that goes on from here otherwise, with the same arrays
            names = [f"t{t}" for t in range(21)]
            other = Arms.restored(config, names, arms.record(), arms.state_dict())
            other.add_task(21, signatures[0], mass=1.0)
    for array, copy in handed_out:
        np.testing.assert_array_equal(array, copy)
    if max_arms is None:
        np.testing.assert_array_equal(other.sketches_NLK[-1], signatures[0])
        np.testing.assert_array_equal(arms.sketches_NLK, signatures)
        assert copied == 6  # at 0, 1, 3, 7, 15 and 31


@given(n=st.integers(2, 12), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_remove_keeps_the_other_branches(n, seed, data):
    tree = SignatureTree.build(random_signatures(n, 2, 8, seed=seed))
    gone = data.draw(st.integers(0, n - 1))
    left = tree.remove(gone)
    assert SignatureTree.from_json(left.to_json()).to_json() == left.to_json()  # well formed, in preorder
    kept = [task for task in range(n) if task != gone]
    before = {frozenset(tree.tasks_below(node)) - {gone} for node in range(tree.nodes)} - {frozenset()}
    after = {frozenset(kept[task] for task in left.tasks_below(node)) for node in range(left.nodes)}
    assert after == before


def test_remove_refuses_the_only_task():
    tree = SignatureTree.build(random_signatures(1, 1))
    with pytest.raises(DataError, match="one task must stay"):
        tree.remove(0)
    with pytest.raises(DataError, match="task 5"):
        SignatureTree.build(random_signatures(3, 1)).remove(5)


def test_home_by_hand():
    # ((0, 1), 2): leaves 0 and 1 are .2 apart, 2 is about 1 from both.
    one = np.array([[1.0, 0.0]])
    near = np.array([[np.cos(0.2), np.sin(0.2)]])
    far = np.array([[0.0, -1.0]])
    tree = SignatureTree.build(np.stack([one, near, far]))
    pair = int(tree.parent[tree.leaf[0]])
    assert set(tree.tasks_below(pair)) == {0, 1}
    within = float(tree.delta[pair].mean())
    assert tree.home(np.array([within * 0.9, 0.5, 0.9])) == pair
    assert tree.home(np.array([within * 1.1, 0.5, 0.9])) == 0
    assert tree.home(np.array([0.0, 0.5, 0.9])) == tree.leaf[0]
    assert tree.home(np.array([5.0, 6.0, 7.0])) == 0


def test_memory_under_a_budget_repeats_and_resumes():
    config = MemoryConfig(layers=2, sketch_size=16, max_arms=2)
    signatures = random_signatures(5, 2, 16, seed=1)
    memory = TaskMemory(config)
    for task in range(4):
        memory.begin_task(f"t{task}", 9)
        groups = memory.end_task(f"t{task}", signatures[task], 2.0)
        assert memory.end_task(f"t{task}", signatures[task], 2.0) == groups == memory.arms.groups
    again = TaskMemory.from_state_dict(memory.state_dict())
    for each in (memory, again):
        past = each.begin_task("t4", 9)
        assert past.sketches.shape == (2, 2, 16)
        assert past.groups == groups
        assert each.describe()["tasks"] == ["+".join(f"t{task}" for task in group) for group in groups]
        arms = each.step(StepCall("run", "t4", 1)).arms
        assert set(arms) <= {0, 1}
        each.end_task("t4", signatures[4], 2.0)
    assert memory.arms.groups == again.arms.groups
    assert np.array_equal(memory.arms.sketches_NLK, again.arms.sketches_NLK)
    assert memory.tree.to_json() == again.tree.to_json()


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="max_arms = 0"):
        MemoryConfig(layers=2, sketch_size=16, max_arms=0)
    memory = TaskMemory(MemoryConfig(layers=2, sketch_size=16))
    memory.begin_task("a", 3)
    with pytest.raises(DataError, match="mass = 0"):
        memory.end_task("a", random_signatures(1, 2, 16)[0], 0)
