"""The tree of the released code (GitHub ZinYY/TreeLoRA): `tree: official`. The search on it is in `treelora.official`.

Shapes: N past tasks, L layers, D numbers of a layer's LoRA A, M nodes, G members of a node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from treelora.errors import CheckpointError, DataError

LARGEST_FACTOR = 1.5


@dataclass(frozen=True)
class OfficialTree:
    """A binary tree on differences of consecutive tasks; nodes in preorder, M of them, the root first.

    With d_0 = c_0 and d_k = c_k - c_(k-1), a group G at level l < L of two tasks or more is split on layer l: with
    m = mean of d_kl over G and p_k = <d_kl, m>, tasks with p_k >= the lower median of p go left, the others right. If
    none goes right, as with any two tasks, the first half (rounded down) of G goes left.
    """

    right: np.ndarray
    """Right child int64 [M], -1 at a leaf; the left child of node v is v + 1."""
    median: np.ndarray
    """The lower median of p, float64 [M]; NaN at a leaf."""
    members: tuple[tuple[int, ...], ...]
    """Tasks under each node, ascending; a leaf at level L may hold several."""

    @classmethod
    def build(cls, past_NLD: Tensor) -> OfficialTree:
        """The tree of the past tasks' c, in their dtype. Raises: DataError for a wrong shape, NaN or infinity."""
        if past_NLD.ndim != 3 or 0 in past_NLD.shape:
            raise DataError(f"accumulated values have shape {list(past_NLD.shape)}: need [N, L, D], all at least 1")
        if not past_NLD.isfinite().all():
            raise DataError("accumulated values of a past task hold NaN or infinity: train it again")
        return cls.built(past_NLD)

    @classmethod
    def built(cls, past_NLD: Tensor) -> OfficialTree:
        """`build` of values that are known to be sound: the released code's work and nothing else."""
        change_NLD = past_NLD.clone()
        change_NLD[1:] -= past_NLD[:-1]
        right: list[int] = []
        median: list[float] = []
        members: list[tuple[int, ...]] = []

        def grow(group: tuple[int, ...], level: int) -> int:
            node = len(members)
            members.append(group)
            right.append(-1)
            median.append(math.nan)
            if level < past_NLD.shape[1] and len(group) > 1:
                change_GD = change_NLD[list(group), level]
                along_G = change_GD @ change_GD.mean(dim=0)
                middle = along_G.median()  # torch's is the lower one
                upper = (along_G >= middle).tolist()
                if all(upper):
                    upper = [place < len(group) // 2 for place in range(len(group))]
                median[node] = float(middle)
                grow(tuple(k for k, up in zip(group, upper, strict=True) if up), level + 1)
                right[node] = grow(tuple(k for k, up in zip(group, upper, strict=True) if not up), level + 1)
            return node

        grow(tuple(range(len(past_NLD))), 0)
        return cls(np.array(right), np.array(median), tuple(members))

    def boost(self, first: int) -> tuple[list[int], float]:
        """The tasks whose scores are multiplied when the first arm is `first`, and the factor; only the root is seen.

        The factor is min(median, 3/2) of the root's child, 1 where that is a leaf; it may be negative.
        """
        if self.right[0] < 0:
            return [], 1.0
        side = 1 if first in self.members[1] else int(self.right[0])
        factor = 1.0 if math.isnan(self.median[side]) else min(float(self.median[side]), LARGEST_FACTOR)
        return list(self.members[side]), factor

    def to_dict(self) -> dict[str, list[Any]]:
        """As JSON values; the median of a leaf is None."""
        median = [None if math.isnan(value) else value for value in self.median.tolist()]
        return {"right": self.right.tolist(), "median": median, "members": [list(group) for group in self.members]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[Any]]) -> OfficialTree:
        """Read `to_dict`. Raises: CheckpointError where it isn't a tree."""
        try:
            right = [int(child) for child in data["right"]]
            median = [math.nan if value is None else float(value) for value in data["median"]]
            members = [tuple(int(task) for task in group) for group in data["members"]]
            if not len(right) == len(median) == len(members) or members[0] != tuple(range(len(members[0]))):
                raise ValueError("nodes or tasks are missing")
            pending, seen = [0], 0
            while pending:
                node = pending.pop()
                below = members[node]
                if right[node] >= 0:
                    below = tuple(sorted(members[node + 1] + members[right[node]]))
                    pending += [right[node], node + 1]
                if node != seen or below != members[node] or not below or math.isnan(median[node]) != (right[node] < 0):
                    raise ValueError(f"node {node} doesn't fit its children")
                seen += 1
            if seen != len(members):
                raise ValueError("nodes hang below no other")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"official tree: {error!r}; build it again") from None
        return cls(np.array(right), np.array(median), tuple(members))
