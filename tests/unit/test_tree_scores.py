from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from tests.unit.test_tree import family_signatures, random_signatures
from treelora.errors import DataError
from treelora.tree import SignatureTree
from treelora.tree_scores import (
    adjusted_rand_index,
    cut,
    cut_rand_index,
    dendrogram_purity,
    permutation_p_value,
)

labelings = st.integers(2, 20).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2))


@given(labelings)
@settings(max_examples=150, deadline=None)
def test_adjusted_rand_index_equals_scikit_learns(pair):
    a, b = pair
    assert adjusted_rand_index(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)


def test_adjusted_rand_index_by_hand():
    # Of 6 pairs 2 are together in a, 1 in b, 1 in both: expected 2 * 1 / 6, highest (2 + 1) / 2.
    assert adjusted_rand_index([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx((1 - 1 / 3) / (1.5 - 1 / 3))
    assert adjusted_rand_index(["x", "y"], ["u", "v"]) == 1.0
    assert adjusted_rand_index([0], [0]) == 1.0


@given(tasks=st.integers(2, 12), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_dendrogram_purity_equals_brute_force(tasks, seed):
    tree = SignatureTree.build(random_signatures(tasks, seed=seed))
    labels = np.random.default_rng(seed).integers(0, 3, size=tasks).tolist()
    shares = []
    for i, j in combinations(range(tasks), 2):
        if labels[i] == labels[j]:
            common = min((b for n in range(tree.nodes) if {i, j} <= (b := set(tree.tasks_below(n)))), key=len)
            shares.append(np.mean([labels[task] == labels[i] for task in common]))
    expected = np.mean(shares) if shares else float("nan")
    assert dendrogram_purity(tree, labels) == pytest.approx(expected, nan_ok=True)


def test_purity_by_hand():
    tree = SignatureTree.build(np.array([0.0, 1.0, 10.0, 12.0])[:, None, None])
    assert dendrogram_purity(tree, ["a", "a", "b", "b"]) == 1.0
    # (0, 2) and (1, 3) meet at the root only, where each has half.
    assert dendrogram_purity(tree, ["a", "b", "a", "b"]) == 0.5
    assert np.isnan(dendrogram_purity(tree, ["a", "b", "c", "d"]))


def test_cut_by_hand():
    tree = SignatureTree.build(np.array([10.0, 0.0, 12.0, 1.0, 13.0])[:, None, None])
    assert cut(tree, 1).tolist() == [0, 0, 0, 0, 0]
    assert cut(tree, 2).tolist() == [0, 1, 0, 1, 0]
    assert cut(tree, 3).tolist() == [0, 1, 2, 1, 2]
    assert cut(tree, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"clusters = 6: must lie in 1\.\.5"):
        cut(tree, 6)


def test_scores_of_a_recovered_and_of_a_shuffled_labeling():
    signatures, labels = family_signatures([4, 4, 4])
    tree = SignatureTree.build(signatures)
    assert dendrogram_purity(tree, labels.tolist()) == 1.0
    assert cut_rand_index(tree, labels.tolist()) == 1.0
    wrong = (np.arange(12) % 4).tolist()
    assert cut_rand_index(tree, wrong) < 0.3
    # 12! / (4!^3 3!) = 5775 partitions: only the right one scores 1, so p is near its floor.
    assert permutation_p_value(tree, labels.tolist(), permutations=999, seed=0) <= 0.003
    assert permutation_p_value(tree, labels.tolist(), cut_rand_index, permutations=199, seed=0) <= 0.015
    assert permutation_p_value(tree, wrong, permutations=199, seed=0) > 0.05


def test_p_value_is_deterministic_and_counts_itself():
    tree = SignatureTree.build(random_signatures(6))
    labels = [0, 0, 1, 1, 2, 2]
    assert permutation_p_value(tree, labels, permutations=50, seed=3) == permutation_p_value(
        tree, labels, permutations=50, seed=3
    )
    assert permutation_p_value(tree, [0] * 6, permutations=9) == 1.0
    assert permutation_p_value(tree, [0, 0, 1, 1, 2, 2], lambda *_: 0.0, permutations=9) == 1.0
    assert np.isnan(permutation_p_value(tree, list(range(6)), permutations=9))


def test_wrong_number_of_labels_is_refused():
    tree = SignatureTree.build(random_signatures(3))
    with pytest.raises(DataError, match="2 labels for 3 tasks"):
        dendrogram_purity(tree, [0, 1])
    with pytest.raises(DataError, match="2 labels for 3 tasks"):
        adjusted_rand_index([0, 1, 2], [0, 1])
