"""How well a tree agrees with labels that it wasn't told (task families, answer vocabularies).

Pure functions of a tree over N tasks and N labels, or of two labelings.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from treelora.errors import DataError
from treelora.tree import SignatureTree

Score = Callable[[SignatureTree, Sequence[Hashable]], float]


def dendrogram_purity(tree: SignatureTree, labels: Sequence[Hashable]) -> float:
    """Mean, over all pairs of tasks with equal labels, of the share of that label below their lowest common
    node.

    Heller and Ghahramani, "Bayesian Hierarchical Clustering", ICML 2005. 1.0: each label has a branch of its
    own. NaN where no two tasks share a label. Raises: DataError for a wrong number of labels.
    """
    label_N, classes = _codes(labels, tree.tasks)
    count_MF = np.zeros((tree.nodes, classes))
    purity, pairs = 0.0, 0.0
    for node in range(tree.nodes - 1, -1, -1):
        if tree.left[node] < 0:
            count_MF[node, label_N[tree.task[node]]] = 1
            continue
        a_F, b_F = count_MF[tree.left[node]], count_MF[tree.right[node]]
        count_MF[node] = a_F + b_F
        # The pairs whose lowest common node this is have one task on each side.
        purity += float((a_F * b_F * count_MF[node]).sum() / count_MF[node].sum())
        pairs += float((a_F * b_F).sum())
    return purity / pairs if pairs else float("nan")


def cut(tree: SignatureTree, clusters: int) -> np.ndarray:
    """[N] int64: the cluster of each task after opening the node of largest mean delta until there are
    `clusters`.

    Equal deltas open in preorder; clusters are numbered by their first task. Raises: DataError for clusters
    outside 1..N.
    """
    if not 1 <= clusters <= tree.tasks:
        raise DataError(f"clusters = {clusters}: must lie in 1..{tree.tasks}")
    height = tree.delta.mean(axis=1)
    groups = [0]
    while len(groups) < clusters:
        node = max((node for node in groups if tree.left[node] >= 0), key=lambda node: (height[node], -node))
        groups.remove(node)
        groups += [int(tree.left[node]), int(tree.right[node])]
    result = np.full(tree.tasks, -1)
    for cluster, tasks in enumerate(sorted((tree.tasks_below(node) for node in groups), key=min)):
        result[tasks] = cluster
    return result


def adjusted_rand_index(a: Sequence[Hashable] | np.ndarray, b: Sequence[Hashable] | np.ndarray) -> float:
    """Agreement of two labelings of the same items, corrected for chance (Hubert and Arabie 1985).

    1.0 for equal partitions, 0 in expectation for independent ones, negative below chance.
    """
    a_N, rows = _codes(a, len(a))
    b_N, columns = _codes(b, len(a))
    table = np.zeros((rows, columns))
    np.add.at(table, (a_N, b_N), 1)
    together, in_a, in_b = (_pairs(part) for part in (table, table.sum(axis=1), table.sum(axis=0)))
    total = len(a_N) * (len(a_N) - 1) / 2
    expected = in_a * in_b / total if total else 0.0
    highest = (in_a + in_b) / 2
    return 1.0 if highest == expected else (together - expected) / (highest - expected)


def cut_rand_index(tree: SignatureTree, labels: Sequence[Hashable]) -> float:
    """Adjusted Rand index of the labels and the tree's `cut` into as many clusters as there are labels."""
    return adjusted_rand_index(cut(tree, len(set(labels))), labels)


def permutation_p_value(
    tree: SignatureTree,
    labels: Sequence[Hashable],
    score: Score = dendrogram_purity,
    permutations: int = 999,
    seed: int = 0,
) -> float:
    """How often shuffled labels score at least as well, the observed labeling counted: (1 + hits) / (1 + n).

    NaN where the score itself is.
    """
    observed = score(tree, labels)
    if np.isnan(observed):
        return float("nan")
    generator = np.random.default_rng(seed)
    hits = 0
    for _ in range(permutations):
        order = generator.permutation(len(labels))
        # 1e-12: a permutation that only swaps equal labels must count as a hit in spite of rounding.
        hits += score(tree, [labels[i] for i in order]) >= observed - 1e-12
    return (1 + hits) / (1 + permutations)


def _codes(labels: Sequence[Hashable] | np.ndarray, items: int) -> tuple[np.ndarray, int]:
    if len(labels) != items:
        raise DataError(f"{len(labels)} labels for {items} tasks: pass one label a task")
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)
    return codes, len(numbers)


def _pairs(counts: np.ndarray) -> float:
    return float((counts * (counts - 1) / 2).sum())
