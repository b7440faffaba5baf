"""Lower-confidence-bound search for the most similar past task, for all layers at once.

Shapes: L layers, N past tasks (arms), M = 2N - 1 tree nodes, P = depth + 1 nodes on a path from leaf to root.
Arrays over nodes have one column more, M, where the padding of short paths goes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import get_args

import numpy as np

from treelora.errors import CheckpointError, ConfigError, DataError
from treelora.options.tree import Bound, Noise
from treelora.options.tree import MemorySearch as Search
from treelora.sketch_numpy import PURPOSE_ARMS, keyed_bits
from treelora.tree import SignatureTree


class TreeBandit:
    """One bandit a layer on one shared tree; every array operation runs over all layers.

    Each step pulls one task k per layer, whose loss is the residual xi_k. With mu and n the mean loss and the
    count of pulls of a node (or below it), T the horizon and e(n) = c * sigma * sqrt(log T / n):

    - leaf: LCB = mu - e(n)
    - inner node, bound="smooth" (Coquelin and Munos 2007, in losses):
      LCB_v = max(min over children of LCB, mu_v - e(n_v) - delta_v)
    - inner node, bound="literal" (Eq. 2 of arXiv 2506.10355 as printed):
      LCB_v = min over children j of (mu_j - e(n_j)) - delta_v
    - never pulled: -inf

    log T in place of log t, so that a pull changes the bounds on its own path only: O(L log N) a step on a
    balanced tree. Ties go to the left child, which holds the earlier task.

    Losses and delta are divided by a layer's scale before use. The scale defaults to the root's delta: by the
    triangle inequality no two tasks' residuals differ by more, so the spread that the exploration term e(n)
    competes with is at most 1 in every layer. It is known before the first step, hence the same in every
    replay; a running scale would change all bounds at each step. (An offset common to all arms changes no
    choice.)

    noise: "diameter" leaves sigma = 1, one scale; "pooled" makes it the losses' standard deviation around their
    own task's mean, pooled over tasks: sigma^2 = (1 + S) / (1 + F) with S the sum of squares and F the degrees of
    freedom, hence 1 at the start. It is taken anew when the number of observations has doubled (from 8 on), so that
    refreshing all bounds costs O(N L log T) a task and nothing at most steps.

    search: "tree_lcb" walks from the root to the child with the lowest LCB; "flat_lcb" takes the leaf with
    the lowest LCB; "full" is told all N losses and takes the lowest mean; "random" draws uniformly from a
    generator keyed by (seed, task, step); "newest" takes the arm `newest` in every layer, by default the last. The
    latter two are controls: what a search brings is seen against them.
    """

    def __init__(
        self,
        tree: SignatureTree,
        layers: int,
        c: float,
        horizon: int,
        *,
        search: Search = "tree_lcb",
        bound: Bound = "smooth",
        noise: Noise = "diameter",
        seed: int = 0,
        task: str = "",
        scale: np.ndarray | None = None,
        newest: int | None = None,
    ) -> None:
        for axis, value, choices in (("search", search, Search), ("bound", bound, Bound), ("noise", noise, Noise)):
            if value not in get_args(choices):
                raise ConfigError(f"{axis} = {value!r}: choose one of {', '.join(get_args(choices))}")
        if not (math.isfinite(c) and c >= 0) or horizon < 1:
            raise ConfigError(f"exploration = {c}, horizon = {horizon}: need a finite c >= 0 and at least one step")
        if layers != tree.layers:
            raise ConfigError(f"layers = {layers}, but the tree knows {tree.layers} layers")
        self.tree, self.layers, self.c, self.horizon = tree, layers, c, horizon
        self.search, self.bound, self.noise, self.seed = search, bound, noise, seed
        self._newest = tree.tasks - 1 if newest is None else newest
        self._stream = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "little")
        root_delta_L = tree.delta[0]
        self.scale = np.where(root_delta_L > 1e-6, root_delta_L, 1.0) if scale is None else np.array(scale, float)
        if self.scale.shape != (layers,) or not (self.scale > 0).all():
            raise ConfigError(f"scale: need {layers} positive numbers, got {self.scale}")

        nodes = tree.nodes
        self.counts = np.zeros((layers, nodes + 1), dtype=np.int64)
        self.sums = np.zeros((layers, nodes + 1))
        self.squares = np.zeros((layers, tree.tasks))
        """Sums of squared losses of each task; kept for noise "pooled" only."""
        self.sigma = np.ones(layers)
        self.bounds = np.full((layers, nodes + 1), -np.inf)
        # own = mu - e(n) of each node, kept because the literal bound reads it at siblings.
        self._own = np.full((layers, nodes + 1), -np.inf)
        self._best = np.tile(np.append(np.where(tree.left >= 0, tree.left, np.arange(nodes)), nodes), (layers, 1))
        delta_LM = np.concatenate([tree.delta.T / self.scale[:, None], np.zeros((layers, 1))], axis=1)
        self._delta = np.ascontiguousarray(delta_LM)
        self._paths = tree.paths()
        self._depth = int(tree.level.max())
        sibling = np.full(nodes + 1, nodes)
        inner = np.flatnonzero(tree.left >= 0)
        sibling[tree.left[inner]], sibling[tree.right[inner]] = tree.right[inner], tree.left[inner]
        self._sibling = sibling
        self._is_left = np.append(np.isin(np.arange(nodes), tree.left), False)
        self._rows = np.arange(layers)
        self._row_start = self._rows * (nodes + 1)
        self._log_horizon = math.log(max(horizon, 2))

    @property
    def tasks(self) -> int:
        """N."""
        return self.tree.tasks

    def select(self, step: int = 0) -> np.ndarray:
        """The arm of every layer, [L] int64. Changes nothing; `step` matters to the search "random" only."""
        if self.search == "random":
            bits = keyed_bits(self.seed, self._stream, self.layers, purpose=PURPOSE_ARMS, block=step)
            return (bits % np.uint64(self.tasks)).astype(np.int64)
        if self.search == "newest":
            return np.full(self.layers, self._newest, dtype=np.int64)
        if self.search == "flat_lcb":
            return self.bounds[:, self.tree.leaf].argmin(axis=1)
        if self.search == "full":
            leaf = self.tree.leaf
            return (self.sums[:, leaf] / np.maximum(self.counts[:, leaf], 1)).argmin(axis=1)
        node_L = np.zeros(self.layers, dtype=np.int64)
        for _ in range(self._depth):
            node_L = self._best[self._rows, node_L]
        return self.tree.task[node_L]

    def observe(self, arms: np.ndarray, losses: np.ndarray) -> None:
        """Record the losses [L] of the arms [L], in units of the residual; only the pulled paths change.

        Raises: DataError for a wrong shape, an arm out of range, or a loss that is negative, NaN or infinite.
        """
        arms, losses = np.asarray(arms), np.asarray(losses, dtype=np.float64)
        if arms.shape != (self.layers,) or losses.shape != (self.layers,):
            raise DataError(f"arms {arms.shape} and losses {losses.shape}: need one of each for {self.layers} layers")
        if ((arms < 0) | (arms >= self.tasks)).any():
            raise DataError(f"arms {arms.tolist()}: must lie in 0..{self.tasks - 1}")
        _check_losses(losses, layer_axis=0)
        if self.noise == "pooled":
            self.squares[self._rows, arms] += (losses / self.scale) ** 2
        # A path's nodes are distinct but for the padding, whose column is never read. Flat places and levels first:
        # a step is some twenty small operations, and numpy's indexing by two arrays would be most of its time.
        path_PL = np.ascontiguousarray(self._paths[arms].T)
        place_PL = path_PL + self._row_start
        counts, sums, bounds = self.counts.reshape(-1), self.sums.reshape(-1), self.bounds.reshape(-1)
        count_PL = counts.take(place_PL) + 1
        sum_PL = sums.take(place_PL) + losses / self.scale
        counts[place_PL], sums[place_PL] = count_PL, sum_PL
        own_PL = sum_PL / count_PL - self._explore(count_PL, self.sigma)
        if self.bound == "literal":
            self._own.reshape(-1)[place_PL] = own_PL
        if self._renew_sigma():
            self._refresh()
            return
        # bound_PL[p] for p >= 1 from the child on the path (p - 1) and its sibling.
        sibling_PL = self._sibling.take(path_PL[:-1])
        beside_PL = bounds.take(sibling_PL + self._row_start)
        bound_PL, delta_PL = own_PL.copy(), self._delta.reshape(-1).take(place_PL[1:])
        if self.bound == "literal":
            own_beside_PL = self._own.reshape(-1).take(sibling_PL + self._row_start)
            bound_PL[1:] = np.minimum(own_PL[:-1], own_beside_PL) - delta_PL
        else:
            floor_PL, child_L = own_PL[1:] - delta_PL, bound_PL[0]
            for bound_L, beside_L, floor_L in zip(bound_PL[1:], beside_PL, floor_PL, strict=True):
                np.maximum(np.minimum(child_L, beside_L, out=bound_L), floor_L, out=bound_L)
                child_L = bound_L
        bounds[place_PL] = bound_PL
        # every parent on the path points at its child with the lower bound; ties: the left one
        below_PL = bound_PL[:-1]
        stays_PL = (below_PL < beside_PL) | ((below_PL == beside_PL) & self._is_left.take(path_PL[:-1]))
        self._best.reshape(-1)[place_PL[1:]] = np.where(stays_PL, path_PL[:-1], sibling_PL)

    def observe_all(self, losses: np.ndarray) -> None:
        """Record the losses [N, L] of every task: for the search "full". Raises: DataError."""
        losses = np.asarray(losses, dtype=np.float64)
        if losses.shape != (self.tasks, self.layers):
            raise DataError(f"losses {losses.shape}: the search 'full' needs [{self.tasks}, {self.layers}]")
        _check_losses(losses, layer_axis=1)
        if self.noise == "pooled":
            self.squares += (losses / self.scale).T ** 2
        self.sums[:, self.tree.leaf] += (losses / self.scale).T
        self.counts[:, self.tree.leaf] += 1
        inner = np.flatnonzero(self.tree.left >= 0)
        for node in inner[::-1]:
            children = [self.tree.left[node], self.tree.right[node]]
            self.counts[:, node] = self.counts[:, children].sum(axis=1)
            self.sums[:, node] = self.sums[:, children].sum(axis=1)
        self._renew_sigma()
        self._refresh()

    def lcb(self, arms: np.ndarray) -> np.ndarray:
        """[L] float32: the LCB of the arms' leaves in units of the residual (-inf: never pulled)."""
        return (self.bounds[self._rows, self.tree.leaf[arms]] * self.scale).astype(np.float32)

    def pulls(self) -> np.ndarray:
        """[N, L] int64: how often each task was observed."""
        return self.counts[:, self.tree.leaf].T.copy()

    def ratio(self) -> np.ndarray:
        """[L]: mean exploration term over the spread (max - min) of the mean losses, among the tasks pulled.

        Far above 1 the search is a round-robin, far below 1 it is greedy. NaN where fewer than two tasks were
        pulled, inf where their means are equal.
        """
        count_LN, sum_LN = self.counts[:, self.tree.leaf], self.sums[:, self.tree.leaf]
        ratios = np.full(self.layers, np.nan)
        for layer in range(self.layers):
            seen = count_LN[layer] > 0
            if seen.sum() >= 2:
                mean = sum_LN[layer, seen] / count_LN[layer, seen]
                explore = float((self._explore(count_LN, self.sigma[:, None])[layer, seen]).mean())
                spread = float(np.ptp(mean))
                ratios[layer] = explore / spread if spread > 0 else np.inf
        return ratios

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything that changes; the tree and the settings are the caller's to keep."""
        state = {"counts": self.counts[:, :-1].copy(), "sums": self.sums[:, :-1].copy()}
        if self.noise == "pooled":
            state |= {"squares": self.squares.copy(), "sigma": self.sigma.copy()}
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue bit for bit where `state_dict` was taken. Raises: CheckpointError where it doesn't fit."""
        shape = (self.layers, self.tree.nodes)
        counts, sums = state.get("counts"), state.get("sums")
        if counts is None or sums is None or counts.shape != shape or sums.shape != shape:
            shapes = {name: np.shape(value) for name, value in state.items()}
            raise CheckpointError(f"bandit state {shapes}: need counts and sums of shape {shape}")
        if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any() or not np.isfinite(sums).all():
            raise CheckpointError("bandit state: counts must be whole and not negative, sums finite")
        self.counts[:, :-1], self.sums[:, :-1] = counts, sums
        if self.noise == "pooled":
            squares, sigma, shape_LN = state.get("squares"), state.get("sigma"), self.squares.shape
            if squares is None or sigma is None or squares.shape != shape_LN or sigma.shape != self.sigma.shape:
                raise CheckpointError("bandit state: squares and sigma, which noise 'pooled' needs, are missing")
            self.squares, self.sigma = np.array(squares, float), np.array(sigma, float)
        self._refresh()

    def _explore(self, count: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """e(n) for counts, with sigma that fits their shape; counts of 0 give what 1 would."""
        explore: np.ndarray = self.c * sigma * np.sqrt(self._log_horizon / np.maximum(count, 1))
        return explore

    def _renew_sigma(self) -> bool:
        """Whether sigma is due, as the number of steps, the same in all layers, has doubled; then take it anew."""
        steps = int(self.counts[0, 0]) // (self.tasks if self.search == "full" else 1)
        if self.noise != "pooled" or steps < 8 or steps & (steps - 1):
            return False
        count_LN, sum_LN = self.counts[:, self.tree.leaf], self.sums[:, self.tree.leaf]
        spread_LN = self.squares - sum_LN**2 / np.maximum(count_LN, 1)
        freedom_L = np.maximum(count_LN - 1, 0).sum(axis=1)
        self.sigma = np.sqrt((1 + spread_LN.clip(min=0).sum(axis=1)) / (1 + freedom_L))
        return True

    def _refresh(self) -> None:
        """All bounds from counts and sums; the same arithmetic as `observe`, so the same bits."""
        count, seen = self.counts[:, :-1], self.counts[:, :-1] > 0
        divisor = np.maximum(count, 1)
        own = self.sums[:, :-1] / divisor - self._explore(divisor, self.sigma[:, None])
        self._own[:, :-1] = np.where(seen, own, -np.inf)
        self.bounds[:] = self._own
        inner = np.flatnonzero(self.tree.left >= 0)
        for node in inner[::-1]:
            a, b = self.tree.left[node], self.tree.right[node]
            if self.bound == "literal":
                bound = np.minimum(self._own[:, a], self._own[:, b]) - self._delta[:, node]
            else:
                lowest = np.minimum(self.bounds[:, a], self.bounds[:, b])
                bound = np.maximum(lowest, self._own[:, node] - self._delta[:, node])
            self.bounds[:, node] = np.where(seen[:, node], bound, -np.inf)
        if len(inner):
            lower = self.bounds[:, self.tree.left[inner]] <= self.bounds[:, self.tree.right[inner]]
            self._best[:, inner] = np.where(lower, self.tree.left[inner], self.tree.right[inner])


def _check_losses(losses: np.ndarray, layer_axis: int) -> None:
    sound = np.isfinite(losses) & (losses >= 0)
    if not sound.all():
        bad = np.argwhere(~sound)
        where = tuple(int(i) for i in bad[0])
        raise DataError(f"layer {where[layer_axis]}: loss {losses[where]} isn't a distance: drop steps that overflowed")
