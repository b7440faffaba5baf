import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist

from treelora.errors import ConfigError, DataError
from treelora.tree import SignatureTree
from treelora.tree_build import medoid_pair, medoid_rule, pairwise_distances, paper_rule, scatter

KINDS = ("medoid", "agglomerative", "paper")


def random_signatures(tasks, layers=3, size=5, seed=0):
    signatures = np.random.default_rng(seed).normal(size=(tasks, layers, size)).astype(np.float32)
    return signatures / np.linalg.norm(signatures, axis=2, keepdims=True)


def family_signatures(sizes, seed=0, layers=2, size=12, spread=0.05):
    """Families of tasks around far-apart centres; (signatures, family of each task), tasks in mixed order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = np.eye(size)[: len(sizes), None, :].repeat(layers, axis=1)
    signatures = centres[labels] + spread * rng.normal(size=(len(labels), layers, size)) / np.sqrt(size)
    return (signatures / np.linalg.norm(signatures, axis=2, keepdims=True)).astype(np.float32), labels


def branches(tree):
    """All branches as sets of tasks."""
    return {frozenset(tree.tasks_below(node).tolist()) for node in range(tree.nodes)}


def brute_delta(tree, signatures):
    delta = np.zeros((tree.nodes, signatures.shape[1]))
    for node in range(tree.nodes):
        for i, j in combinations(tree.tasks_below(node), 2):
            distance = np.abs(signatures[i].astype(float) - signatures[j]).sum(axis=1)
            delta[node] = np.maximum(delta[node], distance / np.sqrt(signatures.shape[2]))
    return delta


def assert_is_a_strict_binary_tree(tree):
    assert tree.nodes == 2 * tree.tasks - 1
    assert sorted(tree.task[tree.task >= 0]) == list(range(tree.tasks))
    assert tree.parent[0] == -1
    assert tree.size[0] == tree.tasks
    for node in range(tree.nodes):
        if tree.task[node] >= 0:
            assert tree.left[node] == tree.right[node] == -1
            assert tree.leaf[tree.task[node]] == node
            continue
        a, b = tree.left[node], tree.right[node]
        assert a == node + 1
        assert tree.parent[a] == tree.parent[b] == node
        assert tree.level[a] == tree.level[b] == tree.level[node] + 1
        below_a, below_b = set(tree.tasks_below(a)), set(tree.tasks_below(b))
        assert below_a | below_b == set(tree.tasks_below(node))
        assert not below_a & below_b
        assert min(below_a) < min(below_b)


@given(tasks=st.integers(1, 14), seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), data=st.data())
@settings(max_examples=80, deadline=None)
def test_structure_and_diameters(tasks, seed, kind, data):
    signatures = random_signatures(tasks, seed=seed)
    # Identical tasks and zero signatures among them.
    signatures[data.draw(st.integers(0, tasks - 1))] = signatures[0]
    signatures[data.draw(st.integers(0, tasks - 1))] = 0
    tree = SignatureTree.build(signatures, kind, blocks=2 if kind == "medoid" else 1)
    assert_is_a_strict_binary_tree(tree)
    np.testing.assert_allclose(tree.delta, brute_delta(tree, signatures), atol=1e-6)


@given(tasks=st.integers(2, 12), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_delta_bounds_how_far_residuals_differ(tasks, seed):
    # The smooth-tree assumption, for any gradient whatever.
    signatures = random_signatures(tasks, seed=seed)
    gradient = 3 * np.random.default_rng(seed + 1).normal(size=signatures.shape[1:])
    tree = SignatureTree.build(signatures)
    residual = np.abs(signatures - gradient).sum(axis=2) / np.sqrt(signatures.shape[2])
    for node in range(tree.nodes):
        below = residual[tree.tasks_below(node)]
        assert (np.ptp(below, axis=0) <= tree.delta[node] + 1e-6).all()


@given(tasks=st.integers(2, 11), seed=st.integers(0, 10**6), blocks=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_medoid_split_equals_brute_force(tasks, seed, blocks):
    signatures = random_signatures(tasks, seed=seed)
    distances = pairwise_distances(signatures)
    level = seed % 5
    layers = np.array_split(np.arange(3), blocks)[level % blocks]
    distance = np.array([[np.abs(a[layers].astype(float) - b[layers]).sum() for b in signatures] for a in signatures])

    def cost(i, j):
        return sum(min(distance[i, k], distance[j, k]) for k in range(tasks))

    # Two members are equally good medoids of each other: compare what the pairs cost.
    i, j = medoid_pair(distances[layers].mean(axis=0))
    lowest = min(cost(*pair) for pair in combinations(range(tasks), 2))
    assert cost(i, j) == pytest.approx(lowest, rel=1e-5)

    def brute_scatter(second):
        sides = [[k for k in range(tasks) if second[k] == side] for side in (False, True)]
        return sum(sum(distance[a, b] for a, b in combinations(side, 2)) / len(side) for side in sides)

    # Refined: no worse than the nearest medoid, and no single move to the other side is better.
    first, second = medoid_rule(distances, blocks)(np.arange(tasks), level)
    assert sorted([*first, *second]) == list(range(tasks))
    found = np.isin(np.arange(tasks), second)
    assert brute_scatter(found) <= brute_scatter(distance[i] > distance[j]) + 1e-4
    assert scatter(distance, found) == pytest.approx(brute_scatter(found))
    for k in range(tasks):
        moved = found ^ (np.arange(tasks) == k)
        if 0 < moved.sum() < tasks:
            assert brute_scatter(moved) >= brute_scatter(found) - 1e-4


def test_medoid_by_hand():
    # Points on a line: 0, 1, 10, 12, 13. Best medoids 1 (or 0) and 12: {0, 1} and {10, 12, 13}.
    signatures = np.array([10.0, 0.0, 12.0, 1.0, 13.0])[:, None, None]
    tree = SignatureTree.build(signatures)
    assert branches(tree) == {
        frozenset(branch) for branch in ((0, 1, 2, 3, 4), (1, 3), (0, 2, 4), (2, 4), (0,), (1,), (2,), (3,), (4,))
    }
    assert tree.left.tolist() == [1, 2, -1, 4, -1, -1, 7, -1, -1]
    assert tree.right.tolist() == [6, 3, -1, 5, -1, -1, 8, -1, -1]
    assert tree.task.tolist() == [-1, -1, 0, -1, 2, 4, -1, 1, 3]
    assert tree.delta[:, 0].tolist() == [13.0, 3.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert tree.level.tolist() == [0, 1, 2, 2, 3, 3, 1, 2, 2]
    assert tree.paths().tolist() == [[2, 1, 0, 9], [7, 6, 0, 9], [4, 3, 1, 0], [8, 6, 0, 9], [5, 3, 1, 0]]


def test_a_third_family_is_not_torn_apart():
    # Medoids 0 and 100; of the family around 50 two tasks are nearer to 0 and two nearer to 100.
    values = np.array([0.0, 0.0, 0.0, 100.0, 100.0, 100.0, 49.0, 49.5, 50.5, 51.0])[:, None, None]
    assert frozenset([6, 7, 8, 9]) in branches(SignatureTree.build(values))


def test_blocks_look_at_one_block_a_level():
    # Layer 0 parts {0, 1} from {2, 3}, layer 1 parts {0, 2} from {1, 3} by more.
    signatures = np.array([[0.0, 0.0], [0.0, 9.0], [5.0, 0.0], [5.0, 9.0]])[:, :, None]
    assert frozenset([0, 1]) in branches(SignatureTree.build(signatures, blocks=2))
    assert frozenset([0, 2]) in branches(SignatureTree.build(signatures, blocks=1))


@given(tasks=st.integers(2, 12), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_agglomerative_equals_scipy(tasks, seed):
    signatures = random_signatures(tasks, seed=seed)
    tree = SignatureTree.build(signatures, "agglomerative")
    merges = hierarchy.average(pdist(signatures.reshape(tasks, -1).astype(float), "cityblock"))
    clusters = [frozenset([task]) for task in range(tasks)]
    for a, b, *_ in merges:
        clusters.append(clusters[int(a)] | clusters[int(b)])
    assert branches(tree) == set(clusters)


@given(tasks=st.integers(2, 13), seed=st.integers(0, 10**6), level=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_paper_rule_splits_at_the_median_distance_to_the_mean(tasks, seed, level):
    signatures = random_signatures(tasks, seed=seed)
    near, far = sorted(paper_rule(signatures)(np.arange(tasks), level), key=lambda side: -len(side))
    layer = signatures[:, level % 3].astype(float)
    distance = np.abs(layer - layer.mean(axis=0)).sum(axis=1)
    assert len(near) - len(far) in (0, 1)
    if len(near) == len(far) and distance[near].max() > distance[far].min():
        near, far = far, near
    assert distance[near].max() <= np.median(distance) + 1e-9
    assert distance[far].min() >= np.median(distance) - 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [1, 2, 5, 8])
def test_identical_and_zero_tasks(kind, tasks):
    for signatures in (np.zeros((tasks, 2, 4)), np.tile(random_signatures(1, 2, 4), (tasks, 1, 1))):
        tree = SignatureTree.build(signatures, kind)
        assert_is_a_strict_binary_tree(tree)
        assert not tree.delta.any()
        assert json.loads(tree.to_json()) == json.loads(SignatureTree.build(signatures, kind).to_json())
        if kind != "agglomerative":
            assert tree.level.max() == int(np.ceil(np.log2(tasks)))


@pytest.mark.parametrize("kind", ["medoid", "agglomerative"])
def test_families_are_branches(kind):
    signatures, labels = family_signatures([4, 3, 5, 2])
    tree = SignatureTree.build(signatures, kind)
    families = {frozenset(np.flatnonzero(labels == family).tolist()) for family in range(4)}
    assert families <= branches(tree)


def test_order_of_tasks_does_not_matter():
    signatures = random_signatures(17)
    order = np.random.default_rng(1).permutation(17)
    for kind in KINDS:
        tree, shuffled = SignatureTree.build(signatures, kind), SignatureTree.build(signatures[order], kind)
        renamed = {frozenset(int(order[task]) for task in branch) for branch in branches(shuffled)}
        assert renamed == branches(tree)


def place_by_brute_force(tree, signatures):
    """The branches after insertion, by the rule's words, from nothing but the old branches and all distances."""
    new, old = len(signatures) - 1, branches(tree)
    far = np.abs(signatures[:, None] - signatures[None]).sum(axis=3) / np.sqrt(signatures.shape[2])  # [N, N, L]

    def width(branch):
        members = sorted(branch)
        return far[np.ix_(members, members)].max(axis=(0, 1)).mean()

    def away(branch):
        return far[new, sorted(branch)].mean()

    branch, entered = frozenset(range(new)), []
    while len(branch) > 1 and away(branch) < width(branch):
        entered.append(branch)
        sides = [inner for inner in old if inner < branch and branch - inner in old]
        branch = min(sides, key=lambda side: (away(side), min(side)))
    grown = {inner | {new} if inner in entered else inner for inner in old}
    return grown | {branch | {new}, frozenset([new])}


@given(start=st.integers(1, 6), more=st.integers(1, 6), seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None)
def test_insert_keeps_the_old_branches_and_exact_diameters(start, more, seed, kind):
    signatures = random_signatures(start + more, seed=seed)
    tree = SignatureTree.build(signatures[:start], kind)
    for tasks in range(start + 1, start + more + 1):
        before, expected = branches(tree), place_by_brute_force(tree, signatures[:tasks])
        tree = tree.insert(signatures[:tasks])
        assert_is_a_strict_binary_tree(tree)
        assert branches(tree) == expected
        assert {branch - {tasks - 1} for branch in branches(tree)} - {frozenset()} == before
        np.testing.assert_allclose(tree.delta, brute_delta(tree, signatures[:tasks]), atol=1e-6)


def test_insert_follows_the_nearer_branch_by_hand():
    # {0, 1} around .5, {10, 12, 13}; 9 is 2.7 from the second branch on average, which is 3 wide, and joins it;
    # 10 is nearer than 12 and 13.
    values = np.array([10.0, 0.0, 12.0, 1.0, 13.0, 9.0])[:, None, None]
    tree = SignatureTree.build(values[:5]).insert(values)
    assert branches(tree) >= {frozenset([0, 5]), frozenset([0, 2, 4, 5]), frozenset([1, 3])}
    assert tree.delta[tree.parent[tree.leaf[5]], 0] == 1.0
    assert tree.delta[1, 0] == 4.0


def test_a_task_that_belongs_nowhere_gets_a_branch_of_its_own():
    # 10 is 9.5 from {0, 1} on average, which is 1 wide; beside the nearest leaf it would tear the pair apart.
    values = np.array([0.0, 1.0, 10.0, 11.0, 0.5])[:, None, None]
    tree = SignatureTree.build(values[:2])
    for tasks in (3, 4, 5):
        tree = tree.insert(values[:tasks])
    assert branches(tree) >= {frozenset([0, 1, 4]), frozenset([2, 3])}


@pytest.mark.parametrize("kind", ["medoid", "agglomerative"])
@pytest.mark.parametrize("seed", range(8))
def test_insertion_and_rebuild_agree_on_separated_families(kind, seed):
    signatures, labels = family_signatures([3, 4, 3], seed=seed)
    order = np.argsort(labels, kind="stable") if seed == 0 else np.random.default_rng(seed).permutation(10)
    signatures, labels = signatures[order], labels[order]
    tree = SignatureTree.build(signatures[:1], kind)
    for tasks in range(2, 11):
        tree = tree.insert(signatures[:tasks])
    families = {frozenset(np.flatnonzero(labels == family).tolist()) for family in range(3)}
    assert families <= branches(tree)
    assert families <= branches(SignatureTree.build(signatures, kind))


def test_insertion_and_rebuild_differ_in_general():
    # {0, 4} and {10, 6.2}; 5 goes beside 4 and the rest stays. A rebuild joins 6.2 to 4 and 5 (1.7), not to 10 (3.8).
    values = np.array([0.0, 4.0, 10.0, 6.2, 5.0])[:, None, None]
    tree = SignatureTree.build(values[:3], "agglomerative").insert(values[:4]).insert(values)
    assert branches(tree) >= {frozenset([1, 4]), frozenset([2, 3])}
    assert frozenset([1, 3, 4]) in branches(SignatureTree.build(values, "agglomerative"))


def test_five_hundred_tasks_and_a_chain():
    tree = SignatureTree.build(random_signatures(500, 2, 4))
    assert_is_a_strict_binary_tree(tree)
    # Deeper than a recursion would stand.
    deep = SignatureTree.from_json(chain_json(1100))
    assert deep.level.max() == 1099
    assert SignatureTree.from_json(deep.to_json()).to_json() == deep.to_json()
    assert deep.insert(np.zeros((1101, 1, 1))).tasks == 1101


def chain_json(tasks):
    nodes = 2 * tasks - 1
    left, right, task = np.full(nodes, -1), np.full(nodes, -1), np.full(nodes, -1)
    inner = np.arange(0, nodes - 1, 2)
    left[inner], right[inner] = inner + 1, inner + 2
    task[inner + 1], task[nodes - 1] = np.arange(tasks - 1), tasks - 1
    delta = np.zeros((nodes, 1)).tolist()
    record = {"left": left.tolist(), "right": right.tolist(), "task": task.tolist(), "delta": delta}
    return json.dumps({"format": 1, "kind": "medoid", "blocks": 1, **record})


def test_bad_signatures_and_settings_are_refused():
    signatures = random_signatures(3)
    signatures[2, 1, 0] = np.nan
    with pytest.raises(DataError, match="task 2, layer 1"):
        SignatureTree.build(signatures)
    with pytest.raises(DataError, match="task 2, layer 1"):
        SignatureTree.build(signatures[:2]).insert(signatures)
    with pytest.raises(DataError, match=r"\[0, 3, 5\]"):
        SignatureTree.build(signatures[:0])
    with pytest.raises(DataError, match=r"need \[3, 3, K\]"):
        SignatureTree.build(signatures[:2]).insert(signatures[:2])
    with pytest.raises(ConfigError, match="choose one of"):
        SignatureTree.build(signatures[:2], "binary")
    with pytest.raises(ConfigError, match=r"blocks = 4: must lie in 1\.\.3"):
        SignatureTree.build(signatures[:2], blocks=4)
    with pytest.raises(ConfigError, match="only the medoid tree has blocks"):
        SignatureTree.build(signatures[:2], "paper", blocks=2)
