"""How a group of tasks is split in two: the rules behind `SignatureTree.build`.

Shapes: N tasks, L layers, K sketch numbers a layer, m members of a group. A rule maps (members [m] ascending,
level of the node) to two non-empty ascending arrays, the one with the smallest task first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from treelora.sketch_numpy import layer_distances

SplitRule = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def pairwise_distances(signatures_NLK: np.ndarray) -> np.ndarray:
    """[L, N, N] float64: the bandit's residual between every two tasks, row by row to bound the memory."""
    rows_NNL = np.stack([layer_distances(signature_LK, signatures_NLK) for signature_LK in signatures_NLK])
    return np.ascontiguousarray(rows_NNL.transpose(2, 0, 1))


def block_layers(layers: int, blocks: int, level: int) -> np.ndarray:
    """The layers that a node at `level` looks at: block (level mod blocks) of nearly equal runs."""
    block: np.ndarray = np.array_split(np.arange(layers), blocks)[level % blocks]
    return block


def medoid_rule(distances_LNN: np.ndarray, blocks: int) -> SplitRule:
    """Bisecting 2-medoids on the L1 distance, averaged over the node's block of layers, then refined.

    The nearest medoid alone tears a third family apart: its members are about equally far from both medoids,
    so noise deals them out (synthetic families, 3 to 6 of 2 to 6 tasks: purity .88 to .97, and 1.00 refined).
    Hence single members move to the other side while that lowers `scatter`, the best move first.
    Identical members are cut in half in task order. O(m^3), as exact as 2-medoids can be.
    """
    layers = distances_LNN.shape[0]
    block_distances = [distances_LNN[block_layers(layers, blocks, b)].mean(axis=0) for b in range(blocks)]

    def split(members: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
        distance_mm = block_distances[level % blocks][np.ix_(members, members)]
        if not distance_mm.any():
            return _halves(members)
        i, j = medoid_pair(distance_mm)
        second = _refine(distance_mm, distance_mm[i] > distance_mm[j])
        return _ordered(members[~second], members[second])

    return split


def medoid_pair(distance_mm: np.ndarray) -> tuple[int, int]:
    """The two members with the least sum of distances to the nearer one; ties: the first. Exact, O(m^3)."""
    best, pair = np.inf, (0, 1)
    for i in range(len(distance_mm) - 1):
        cost = np.minimum(distance_mm[i], distance_mm[i + 1 :]).sum(axis=1)
        j = int(cost.argmin())
        if cost[j] < best:
            best, pair = float(cost[j]), (i, i + 1 + j)
    return pair


def scatter(distance_mm: np.ndarray, second: np.ndarray) -> float:
    """Sum over the two sides of (sum of distances within the side, each pair once) / (its members)."""
    return sum(float(distance_mm[np.ix_(side, side)].sum()) / 2 / side.sum() for side in (~second, second))


def _refine(distance_mm: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Lower `scatter` one best move at a time; it falls with each, so this ends. Ties: the first member."""
    side = second.astype(np.int64)
    everyone = np.arange(len(side))
    while True:
        size = np.bincount(side, minlength=2)
        to_m2 = np.stack([distance_mm[:, side == s].sum(axis=1) for s in (0, 1)], axis=1)
        within = np.array([to_m2[side == s, s].sum() / 2 for s in (0, 1)])
        own, other = to_m2[everyone, side], to_m2[everyone, 1 - side]
        left_behind = (within[side] - own) / np.maximum(size[side] - 1, 1)
        joined = (within[1 - side] + other) / (size[1 - side] + 1)
        gain = (within / size).sum() - left_behind - joined
        gain[size[side] == 1] = -np.inf
        best = int(gain.argmax())
        # Rounding must not pass for a gain, or two members could change places for ever.
        if gain[best] <= 1e-9 * within.sum():
            return side == 1
        side[best] = 1 - side[best]


def paper_rule(signatures_NLK: np.ndarray) -> SplitRule:
    """The K-D rule of arXiv 2506.10355: level d splits on layer d at the median distance to the group's mean.

    The nearer half (rounded up) against the farther one, ranked by distance and then by task, so ties and
    degenerate groups split evenly too; levels beyond the last layer start again at the first. It separates
    tasks
    by how typical they are, not by family: kept for comparison.
    """
    layers = signatures_NLK.shape[1]

    def split(members: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
        signature_mK = signatures_NLK[members, level % layers].astype(np.float64)
        distance_m = np.abs(signature_mK - signature_mK.mean(axis=0)).sum(axis=1)
        order = np.argsort(distance_m, kind="stable")
        half = (len(members) + 1) // 2
        return _ordered(np.sort(members[order[:half]]), np.sort(members[order[half:]]))

    return split


def agglomerative_rule(distances_LNN: np.ndarray) -> SplitRule:
    """Average linkage (UPGMA) on the L1 distance over all layers; ties join the earliest tasks. O(N^3)."""
    distance_NN = distances_LNN.mean(axis=0)
    np.fill_diagonal(distance_NN, np.inf)
    clusters = {task: np.array([task]) for task in range(len(distance_NN))}
    # In a hierarchy a cluster is known by its smallest member and its size.
    children: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    while len(clusters) > 1:
        i, j = sorted(int(k) for k in np.unravel_index(distance_NN.argmin(), distance_NN.shape))
        a, b = clusters[i], clusters.pop(j)
        merged = (len(a) * distance_NN[i] + len(b) * distance_NN[j]) / (len(a) + len(b))
        distance_NN[i], distance_NN[:, i] = merged, merged
        distance_NN[i, i] = distance_NN[j] = distance_NN[:, j] = np.inf
        clusters[i] = np.sort(np.concatenate([a, b]))
        children[i, len(clusters[i])] = (a, b)

    def split(members: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray]:
        return children[int(members[0]), len(members)]

    return split


def _halves(members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = (len(members) + 1) // 2
    return members[:half], members[half:]


def _ordered(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (a, b) if a[0] < b[0] else (b, a)
