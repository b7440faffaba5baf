"""The released code's tree, against hand-worked splits and an oracle in plain Python."""

import json
import math
import statistics

import numpy as np
import pytest
import torch

from treelora.errors import CheckpointError, DataError
from treelora.official_tree import OfficialTree


def tree_of(past, dtype=torch.float64):
    return OfficialTree.build(torch.tensor(past, dtype=dtype))


def outline(tree):
    """Members and median of each node, in preorder."""
    medians = [None if math.isnan(m) else m for m in tree.median.tolist()]
    return list(zip(tree.members, medians, strict=True))


def test_four_tasks_by_hand():
    # Layer 0: changes 1, 2, 1, .5; mean 1.125; products 1.125, 2.25, 1.125, .5625; lower median 1.125: 3 tasks left.
    # Layer 1 of these three: changes 2, -1, 2; mean 1; products 2, -1, 2; median 2: tasks 0 and 2 left.
    # There is no third layer: tasks 0 and 2 share a leaf.
    tree = tree_of([[[1.0], [2.0]], [[3.0], [1.0]], [[4.0], [3.0]], [[4.5], [0.0]]])
    assert outline(tree) == [((0, 1, 2, 3), 1.125), ((0, 1, 2), 2.0), ((0, 2), None), ((1,), None), ((3,), None)]
    assert tree.right.tolist() == [4, 3, -1, -1, -1]
    assert tree.boost(0) == ([0, 1, 2], 1.5)
    assert tree.boost(3) == ([3], 1.0)


def test_two_tasks_are_halved_whatever_they_hold():
    # Changes 5, -4; mean .5; products 2.5, -2; lower median -2, which both reach: the earlier task goes left.
    assert outline(tree_of([[[5.0]], [[1.0]]])) == [((0, 1), -2.0), ((0,), None), ((1,), None)]
    assert outline(tree_of([[[1.0]], [[5.0]]])) == [((0, 1), 2.5), ((0,), None), ((1,), None)]
    assert outline(tree_of([[[1.0]]])) == [((0,), None)]
    assert tree_of([[[1.0]]]).boost(0) == ([], 1.0)


def test_changes_not_values_are_compared():
    # Values 1, 2, 3, 4: changes 1, 1, 1, 1, all equal: halves.
    assert outline(tree_of([[[1.0]], [[2.0]], [[3.0]], [[4.0]]]))[1:] == [((0, 1), None), ((2, 3), None)]
    assert outline(tree_of([[[1.0]], [[2.0]], [[3.0]]]))[1:] == [((0,), None), ((1, 2), None)]


def oracle(past, group, level):
    layers, width = len(past[0]), len(past[0][0])
    if level >= layers or len(group) <= 1:
        return [(group, None)]

    def change(k):
        earlier = past[k - 1][level] if k else [0.0] * width
        return [x - y for x, y in zip(past[k][level], earlier, strict=True)]

    mean = [sum(change(k)[d] for k in group) / len(group) for d in range(width)]
    product = {k: sum(x * m for x, m in zip(change(k), mean, strict=True)) for k in group}
    middle = statistics.median_low(product.values())
    upper = tuple(k for k in group if product[k] >= middle)
    lower = tuple(k for k in group if product[k] < middle)
    if not lower:
        upper, lower = group[: len(group) // 2], group[len(group) // 2 :]
    return [(group, middle), *oracle(past, upper, level + 1), *oracle(past, lower, level + 1)]


@pytest.mark.parametrize(("tasks", "layers"), [(1, 1), (2, 3), (3, 2), (6, 2), (9, 5), (16, 3), (16, 8)])
def test_tree_equals_the_oracle(tasks, layers):
    past = np.random.default_rng(tasks * 10 + layers).normal(size=(tasks, layers, 4))
    expected, found = oracle(past.tolist(), tuple(range(tasks)), 0), outline(tree_of(past))
    assert [members for members, _ in found] == [members for members, _ in expected]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize("tasks", [2, 4, 8, 16])
def test_ties_split_as_the_oracle_says(tasks):
    for key in range(20):  # whole numbers, and means over powers of two: exact in any order of summation
        past = np.random.default_rng(key).integers(-1, 2, size=(tasks, 1, 2)).astype(float)
        assert outline(tree_of(past)) == oracle(past.tolist(), tuple(range(tasks)), 0)


def test_without_ties_the_larger_half_is_the_left_one():
    for tasks in range(3, 12):
        past = np.random.default_rng(tasks).normal(size=(tasks, 1, 5))
        members = tree_of(past).members
        assert (len(members[1]), len(members[2])) == (tasks - (tasks - 1) // 2, (tasks - 1) // 2)


def test_build_leaves_its_argument_alone():
    past = torch.ones(3, 2, 2)
    OfficialTree.build(past)
    assert torch.equal(past, torch.ones(3, 2, 2))


def test_json_round_trip():
    tree = tree_of(np.random.default_rng(0).normal(size=(9, 3, 4)))
    again = OfficialTree.from_dict(json.loads(json.dumps(tree.to_dict(), allow_nan=False)))
    assert outline(again) == outline(tree)
    assert again.right.tolist() == tree.right.tolist()
    assert [again.boost(k) for k in range(9)] == [tree.boost(k) for k in range(9)]


@pytest.mark.parametrize(
    "change",
    [
        {"members": []},
        {"members": [[0, 1, 2], [0, 1], [0], [1], []]},
        {"members": [[0, 1, 2], [0, 2], [0], [1], [2]]},
        {"members": [[1, 2, 3], [1, 2], [1], [2], [3]]},
        {"right": [4, 3, -1, -1]},
        {"right": [3, 4, -1, -1, -1]},
        {"right": [9, 3, -1, -1, -1]},
        {"right": [-1, 3, -1, -1, -1]},
        {"right": "left?"},
        {"median": [1.0, None, None, None, None]},
        {"median": [1.0, 2.0, 3.0, None, None]},
    ],
)
def test_what_is_no_tree_is_refused(change):
    # 0, 1 | 2, then 0 | 1
    whole = {
        "right": [4, 3, -1, -1, -1],
        "median": [1.0, 2.0, None, None, None],
        "members": [[0, 1, 2], [0, 1], [0], [1], [2]],
    }
    assert OfficialTree.from_dict(whole).to_dict() == whole
    with pytest.raises(CheckpointError, match="official tree"):
        OfficialTree.from_dict(whole | change)
    with pytest.raises(CheckpointError, match="official tree"):
        OfficialTree.from_dict({key: value for key, value in whole.items() if key not in change})


def test_bad_values_are_refused():
    with pytest.raises(DataError, match=r"\[2, 3\]"):
        OfficialTree.build(torch.zeros(2, 3))
    with pytest.raises(DataError, match="NaN"):
        tree_of([[[1.0]], [[math.nan]]])
