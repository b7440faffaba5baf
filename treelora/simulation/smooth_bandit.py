"""Bandit problems on a smooth hierarchy: arms are leaves, and leaves that share a deep branch have similar means.

Shapes: R runs, N arms (a power of two), M = 2N - 1 nodes, D = log2 N levels below the root. A run is a layer of
`TreeBandit`, so that all runs of one size are searched at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from treelora.errors import ConfigError
from treelora.tree import SignatureTree

CLIP = 4.0  # noise beyond so many sigmas is cut off on both sides: the mean stays, and losses have a bound
_NOISE, _NOISE_OF_ALL, _SHUFFLE = 1, 2, 3


@dataclass(frozen=True)
class SmoothProblem:
    """Where the means lie and how noisy losses are. Raises: ConfigError.

    A walk goes down a complete binary tree: a node at level d is its parent plus A gamma^d u, u uniform in
    [-1, 1], A = (1 - gamma) / (2 gamma). Two leaves whose lowest common node is at level l differ by at most
    2 A (gamma^(l+1) + .. + gamma^D) = gamma^l - gamma^D: that is the node's delta, so the tree is smooth by
    construction and the root's delta is below 1.

    A loss is offset + mean + sigma z, z normal and cut off at +-4. offset = 1/2 + 4 sigma makes every loss
    non-negative, as a distance is; common to all arms, it changes no choice.

    Run r draws from generators of its own, level by level: its problem of 2N arms refines that of N arms, and
    doesn't depend on how many runs there are.
    """

    sigma: float = 0.3
    gamma: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.sigma) and self.sigma >= 0 and 0 < self.gamma < 1):
            raise ConfigError(f"sigma = {self.sigma}, gamma = {self.gamma}: need sigma >= 0 and 0 < gamma < 1")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed = {self.seed}: must lie in [0, 2**64)")

    @property
    def offset(self) -> float:
        """What is added to every loss; the means lie within 1/2 of 0."""
        return 0.5 + CLIP * self.sigma

    def means(self, arms: int, runs: int) -> np.ndarray:
        """[R, N]: the arms' mean losses, less the offset."""
        means_RN = np.zeros((runs, 1))
        step = (1 - self.gamma) / (2 * self.gamma)
        generators = [np.random.default_rng([self.seed, run]) for run in range(runs)]
        for level in range(1, levels(arms) + 1):
            walk = np.stack([generator.uniform(-1, 1, size=2**level) for generator in generators])
            means_RN = np.repeat(means_RN, 2, axis=1) + step * self.gamma**level * walk
        return means_RN

    def shuffled(self, means_RN: np.ndarray) -> np.ndarray:
        """Every run's means at random leaves: to it the tree is wrong, its delta believed in vain."""
        arms = means_RN.shape[1]
        return np.stack([self._generator(run, arms, _SHUFFLE).permutation(mu) for run, mu in enumerate(means_RN)])

    def tree(self, arms: int, runs: int, slack: float = 1.0) -> SignatureTree:
        """The complete binary tree over the arms in order, with slack times the delta above in every run."""
        left, right, task, level = (np.full(2 * arms - 1, -1) for _ in range(4))
        pending = [(0, 0, arms)]
        level[0] = 0
        while pending:
            node, low, high = pending.pop()
            if high - low == 1:
                task[node] = low
                continue
            middle = (low + high) // 2
            left[node], right[node] = node + 1, node + 2 * (middle - low)
            level[[left[node], right[node]]] = level[node] + 1
            pending += [(right[node], middle, high), (left[node], low, middle)]
        delta_M = slack * (self.gamma ** level.astype(float) - self.gamma ** levels(arms))
        return SignatureTree(left, right, task, np.repeat(delta_M[:, None], runs, axis=1))

    def noise(self, arms: int, runs: int, steps: int) -> Iterator[np.ndarray]:
        """[R] for every step: of the one arm that is pulled."""
        noise_RT = np.stack([self._generator(run, arms, _NOISE).standard_normal(steps) for run in range(runs)])
        yield from self.sigma * noise_RT.clip(-CLIP, CLIP).T

    def noise_of_all(self, arms: int, runs: int, steps: int) -> Iterator[np.ndarray]:
        """[R, N] for every step: of all arms."""
        generators = [self._generator(run, arms, _NOISE_OF_ALL) for run in range(runs)]
        for _ in range(steps):
            noise_RN = np.stack([generator.standard_normal(arms) for generator in generators])
            yield self.sigma * noise_RN.clip(-CLIP, CLIP)

    def _generator(self, run: int, arms: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, run, arms, purpose])


def levels(arms: int) -> int:
    """D = log2 N. Raises: ConfigError where N is not a power of two from 2 on."""
    if arms < 2 or arms & (arms - 1):
        raise ConfigError(f"arms = {arms}: must be a power of two, at least 2, such as 64")
    return arms.bit_length() - 1
