"""What a tree may be made of: checks of its settings, its signatures and its arrays as read from a file.

Shapes: N tasks, L layers, K sketch numbers a layer, M = 2N - 1 nodes.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from treelora.errors import ConfigError, DataError
from treelora.options.tree import MemoryTree as TreeKind


def checked_signatures(signatures: np.ndarray) -> np.ndarray:
    """Signatures [N, L, K] as float32. Raises: DataError for a wrong shape, NaN or infinity."""
    signatures = np.asarray(signatures, dtype=np.float32)
    if signatures.ndim != 3 or 0 in signatures.shape:
        raise DataError(f"signatures have shape {list(signatures.shape)}: need [N, L, K], all at least 1")
    bad = np.argwhere(~np.isfinite(signatures).all(axis=2))
    if len(bad):
        raise DataError(f"signature of task {bad[0, 0]}, layer {bad[0, 1]} holds NaN or infinity: measure it again")
    return signatures


def check_kind(kind: str, blocks: int, layers: int, error: type[Exception] = ConfigError) -> None:
    """Raises: `error` for an unknown kind, or blocks that the kind or the number of layers forbids."""
    if kind not in get_args(TreeKind):
        raise error(f"tree = {kind!r}: choose one of {', '.join(get_args(TreeKind))}")
    if not isinstance(blocks, int) or not 1 <= blocks <= layers:
        raise error(f"blocks = {blocks!r}: must lie in 1..{layers}, the number of layers")
    if kind != "medoid" and blocks != 1:
        raise error(f"blocks = {blocks} with tree = {kind!r}: only the medoid tree has blocks; set blocks to 1")


def problem(left: np.ndarray, right: np.ndarray, task: np.ndarray, delta: np.ndarray) -> str | None:
    """What is wrong with a tree's arrays, or None."""
    nodes = len(task) if task.ndim == 1 else 0
    if nodes % 2 == 0 or left.shape != (nodes,) or right.shape != (nodes,):
        return f"left {left.shape}, right {right.shape}, task {task.shape} aren't those of 2N - 1 nodes"
    if delta.ndim != 2 or delta.shape[0] != nodes or delta.shape[1] < 1:
        return f"delta has shape {delta.shape}, not ({nodes}, layers)"
    if not np.isfinite(delta).all() or (delta < 0).any():
        return "delta holds a value that is negative or not finite"
    if sorted(task[task >= 0].tolist()) != list(range((nodes + 1) // 2)):
        return "the leaves aren't the tasks 0..N-1, once each"
    pending, seen = [0], 0
    while pending:
        node = pending.pop()
        if node != seen:
            return f"node {node} stands where preorder has node {seen}"
        seen += 1
        if (left[node] < 0) != (task[node] >= 0) or (left[node] < 0) != (right[node] < 0):
            return f"node {node} is neither a leaf with a task nor a branch with two children"
        if left[node] >= 0:
            children = [int(right[node]), int(left[node])]
            if max(children) >= nodes:
                return f"node {node} names a child beyond the last node, {nodes - 1}"
            if (delta[children] > delta[node]).any():
                return f"a child of node {node} has a larger delta than the node"
            pending += children
    return None if seen == nodes else f"only {seen} of {nodes} nodes hang below the root"
