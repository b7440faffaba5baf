"""The arms of the bandit: what is kept of past tasks to compare with, and the tree over it.

Shapes: N arms, L layers, K sketch numbers a layer, R >= N places for arms. An arm is a past task, or several that were
merged because `max_arms` was reached; it is named by its place, and merged arms go to the end. Its mass is the number
of rows that it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treelora import tree_build
from treelora.errors import CheckpointError, DataError
from treelora.memory_records import Groups, MemoryConfig
from treelora.sketch_numpy import layer_distances
from treelora.tree import SignatureTree

NORM_TOLERANCE = 1e-2


class Arms:
    """Sketches, masses and tree of the past tasks, grown one task at a time."""

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        self.groups: Groups = ()
        self.masses_N = np.zeros(0)
        # Read-only, so that states and answers can hold it as it is: with many tasks it is most of the memory.
        self.sketches_NLK = _frozen(np.zeros((0, config.layers, config.sketch_size), dtype=np.float32))
        # They begin it; behind them is room for more, so that a task's end makes no copy of them all.
        self._room_RLK = self.sketches_NLK
        self.tree: SignatureTree | None = None
        # A tree never changes: its text is made once a task, not at each snapshot.
        self._written_tree: tuple[SignatureTree | None, str | None] = (None, None)
        # Kept while N <= rebuild_limit; a derived value, not part of the state.
        self._distances_LNN = np.zeros((config.layers, 0, 0))

    def __len__(self) -> int:
        return len(self.groups)

    def labels(self, tasks: Sequence[str]) -> list[str]:
        """A name for each arm: its tasks' names, joined by +."""
        return ["+".join(tasks[task] for task in group) for group in self.groups]

    @property
    def newest(self) -> int:
        """The arm that stands for the task learnt last, maybe among others. Raises: ValueError where there is none."""
        return max(range(len(self)), key=lambda arm: max(self.groups[arm]))

    def add_task(self, task: int, sketch_LK: np.ndarray, mass: float) -> None:
        """One more arm, for a task; beyond `max_arms` the two closest arms become one."""
        self._add((task,), sketch_LK, mass)
        while self.config.max_arms is not None and len(self) > self.config.max_arms:
            self._merge(*closest_pair(self.sketches_NLK, self.masses_N))

    def state_dict(self) -> dict[str, np.ndarray]:
        """The arrays; groups and tree are JSON values in `record`. The sketches are read-only."""
        return {"sketches": self.sketches_NLK, "masses": self.masses_N.copy()}

    def record(self) -> dict[str, Any]:
        """What of the state is JSON."""
        if self.tree is not self._written_tree[0]:
            self._written_tree = self.tree, self.tree.to_json() if self.tree else None
        return {"groups": self.groups, "tree": self._written_tree[1]}

    @classmethod
    def restored(
        cls, config: MemoryConfig, tasks: Sequence[str], record: Mapping[str, Any], state: Mapping[str, np.ndarray]
    ) -> Arms:
        """From `record` and `state_dict`. Raises: CheckpointError or DataError where they contradict each other."""
        arms = cls(config)
        groups = tuple(tuple(int(task) for task in group) for group in record["groups"])
        if sorted(task for group in groups for task in group) != list(range(len(tasks))) or () in groups:
            raise CheckpointError(f"memory state: groups {groups} aren't those of {len(tasks)} tasks")
        shape = (len(groups), config.layers, config.sketch_size)
        sketches, masses = state["sketches"], state["masses"]
        if sketches.shape != shape:
            raise CheckpointError(f"memory state: sketches have shape {sketches.shape}, need {shape}")
        if masses.shape != shape[:1] or not (masses > 0).all():
            raise CheckpointError(f"memory state: masses {masses.tolist()}: need {shape[0]} positive numbers")
        arms.groups = groups
        for label, sketch in zip(arms.labels(tasks), sketches, strict=True):
            checked_sketch(config, label, sketch)
        arms.masses_N = masses.astype(np.float64)
        arms.sketches_NLK = _frozen(sketches.astype(np.float32, copy=sketches.flags.writeable))
        arms._room_RLK = arms.sketches_NLK
        if groups:
            arms.tree = SignatureTree.from_json(record["tree"])
            if (arms.tree.tasks, arms.tree.layers) != shape[:2]:
                raise CheckpointError(f"memory state: the tree has {arms.tree.tasks} leaves, the sketches {shape[0]}")
        return arms

    def _add(self, group: tuple[int, ...], sketch_LK: np.ndarray, mass: float) -> None:
        self.groups = (*self.groups, group)
        self.masses_N = np.append(self.masses_N, mass)
        self._append(sketch_LK)
        config = self.config
        if self.tree is not None and len(self) > config.rebuild_limit:
            self._distances_LNN = np.zeros((config.layers, 0, 0))
            self.tree = self.tree.insert(self.sketches_NLK)
            return
        if self._distances_LNN.shape[1] == len(self) - 1:
            row_LN = layer_distances(sketch_LK, self.sketches_NLK).T
            grown = np.zeros((config.layers, len(self), len(self)))
            grown[:, :-1, :-1] = self._distances_LNN
            grown[:, -1, :] = grown[:, :, -1] = row_LN
            self._distances_LNN = grown
        else:  # restored from a state, which doesn't carry them
            self._distances_LNN = tree_build.pairwise_distances(self.sketches_NLK)
        self.tree = SignatureTree.build(self.sketches_NLK, config.tree, config.blocks, self._distances_LNN)

    def _append(self, sketch_LK: np.ndarray) -> None:
        used = len(self.sketches_NLK)
        if used == len(self._room_RLK):
            self._room_RLK = np.empty((2 * used + 1, *sketch_LK.shape), dtype=np.float32)
            self._room_RLK[:used] = self.sketches_NLK
        self._room_RLK[used] = sketch_LK
        self.sketches_NLK = _frozen(self._room_RLK[: used + 1])

    def _merge(self, i: int, j: int) -> None:
        sketch_LK = merged_sketch(self.sketches_NLK[[i, j]], self.masses_N[[i, j]])
        mass, group = float(self.masses_N[[i, j]].sum()), tuple(sorted(self.groups[i] + self.groups[j]))
        kept = np.delete(np.arange(len(self)), [i, j])
        self.groups = tuple(self.groups[arm] for arm in kept)
        self.masses_N = self.masses_N[kept]
        self.sketches_NLK = self._room_RLK = _frozen(self.sketches_NLK[kept])
        if self._distances_LNN.size:
            self._distances_LNN = self._distances_LNN[:, kept][:, :, kept]
        self.tree = self.tree.remove(j).remove(i) if self.tree is not None and len(kept) else None
        self._add(group, sketch_LK, mass)


def closest_pair(sketches_NLK: np.ndarray, masses_N: np.ndarray) -> tuple[int, int]:
    """The pair i < j with the least m_i m_j / (m_i + m_j) ||z_i - z_j||^2; ties: the first.

    That is what merging adds to the within-group sum of squares (Ward, 1963), so light arms go before heavy ones.
    """
    flat_ND = sketches_NLK.reshape(len(sketches_NLK), -1).astype(np.float64)
    square_N = (flat_ND**2).sum(axis=1)
    scale_NN = square_N[:, None] + square_N[None]
    distance_NN = scale_NN - 2 * flat_ND @ flat_ND.T
    distance_NN[distance_NN < 1e-9 * scale_NN] = 0  # rounding must not decide between identical sketches
    cost_NN = masses_N[:, None] * masses_N[None] / (masses_N[:, None] + masses_N[None]) * distance_NN
    cost_NN[np.tril_indices(len(cost_NN))] = np.inf
    i, j = np.unravel_index(int(cost_NN.argmin()), cost_NN.shape)
    return int(i), int(j)


def merged_sketch(sketches_2LK: np.ndarray, masses_2: np.ndarray) -> np.ndarray:
    """[L, K] float32: the mass-weighted mean, each layer at unit length again (zero where the two cancel)."""
    mean_LK = np.einsum("a,alk->lk", masses_2 / masses_2.sum(), sketches_2LK.astype(np.float64))
    norm_L1 = np.linalg.norm(mean_LK, axis=1, keepdims=True)
    unit_LK: np.ndarray = np.where(norm_L1 > 1e-12, mean_LK / np.maximum(norm_L1, 1e-12), 0.0).astype(np.float32)
    return unit_LK


def checked_sketch(config: MemoryConfig, task: str, sketch: np.ndarray) -> np.ndarray:
    """A task's sketch, float32 [L, K]. Raises: DataError for a wrong shape, NaN, or a layer whose norm isn't 1 or 0."""
    sketch_LK = np.array(sketch, dtype=np.float32)
    shape = (config.layers, config.sketch_size)
    if sketch_LK.shape != shape:
        raise DataError(f"task {task!r}: sketch has shape {sketch_LK.shape}, need {shape}")
    bad = np.flatnonzero(~np.isfinite(sketch_LK).all(axis=1))
    if len(bad):
        raise DataError(f"task {task!r}, layer {bad[0]}: the sketch holds NaN or infinity; measure it again")
    norm_L = np.linalg.norm(sketch_LK.astype(np.float64), axis=1)
    bad = np.flatnonzero((norm_L > 0) & (np.abs(norm_L - 1) > NORM_TOLERANCE))
    if len(bad):
        raise DataError(
            f"task {task!r}, layer {bad[0]}: the sketch has norm {norm_L[bad[0]]:.4g}, not 1 (or 0); "
            "pass it through treelora.sketch.normalise"
        )
    return sketch_LK


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
