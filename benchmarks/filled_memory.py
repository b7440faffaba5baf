"""Memories that know many tasks, made in seconds: growing a tree of 10,000 tasks by insertion takes long.

Trees are split at random shares of 1/4 to 3/4, so that they are deeper or as deep as what insertion grows: 14 levels
against 11 to 16 at 1,000 tasks, 20 at 10,000.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np

from treelora.memory import MemoryConfig
from treelora.sketch_numpy import layer_distances
from treelora.tree import SignatureTree

State = dict[str, np.ndarray | str]


def filled(config: MemoryConfig, tasks: int) -> tuple[State, int]:
    """State of a memory that knows so many tasks, and the depth of its tree; O(N L K log N)."""
    rng = np.random.default_rng(0)
    sketches = rng.normal(size=(tasks, config.layers, config.sketch_size)).astype(np.float32)
    left, right, task = (np.full(2 * tasks - 1, -1) for _ in range(3))
    spans: list[tuple[int, int]] = []
    pending: list[tuple[int, int, int, int]] = [(0, tasks, -1, 0)]  # tasks of a node, parent, level
    while pending:
        low, high, parent, level = pending.pop()
        node = len(spans)
        spans.append((low, high))
        if parent >= 0:
            (left if node == parent + 1 else right)[parent] = node
        if high - low == 1:
            task[node] = low
            continue
        # what the tasks below have in common, less on each level
        sketches[low:high] += 4 * 0.8**level * rng.normal(size=sketches.shape[1:]).astype(np.float32)
        cut = low + max(1, min(high - low - 1, round((high - low) * rng.uniform(0.25, 0.75))))
        pending += [(cut, high, node, level + 1), (low, cut, node, level + 1)]
    sketches /= np.linalg.norm(sketches, axis=2, keepdims=True)
    delta = np.zeros((len(spans), config.layers))
    for node in np.flatnonzero(left >= 0)[::-1]:
        low, high = spans[node]
        # twice the radius bounds the diameter, by the triangle inequality
        around = 2 * layer_distances(sketches[low:high].mean(axis=0), sketches[low:high]).max(axis=0)
        delta[node] = np.maximum(around, np.maximum(delta[left[node]], delta[right[node]]))
    tree = SignatureTree(left, right, task, delta)
    record = {
        "format": 2,
        "config": asdict(config),
        "tasks": [f"task {number}" for number in range(tasks)],
        "groups": [[number] for number in range(tasks)],
        "tree": tree.to_json(),
        **{"run": None, "task": None, "horizon": 0, "step": 0},
    }
    arrays = {"recorded": sketches[-1], "sketches": sketches, "masses": np.ones(tasks)}
    return {"memory": json.dumps(record), **arrays}, int(tree.level.max())
