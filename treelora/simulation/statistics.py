"""What is said about simulated runs: means and growth, each with a bootstrap interval.

Shapes: S sizes or other conditions, R runs, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A statistic of the runs at hand, and the percentile bootstrap interval (Efron 1979) around it."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def resampled_means(values_SR: np.ndarray, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """[S, B]: means over resampled runs. A resample takes the same runs in every row, because rows are paired."""
    runs = values_SR.shape[1]
    chosen_BR = np.random.default_rng(seed).integers(0, runs, size=(draws, runs))
    means: np.ndarray = values_SR[:, chosen_BR].mean(axis=2)
    return means


def interval(value: float, resampled_B: np.ndarray, level: float = LEVEL) -> Interval:
    """The statistic of the runs themselves, and the percentiles of its resampled values."""
    low, high = np.quantile(resampled_B, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def mean_interval(values_R: Sequence[float] | np.ndarray, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Mean over runs. NaN runs (a score that isn't defined there) are left out; all NaN gives NaN."""
    values = np.asarray(values_R, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    return interval(float(values.mean()), resampled_means(values[None], seed, draws)[0])


@dataclass(frozen=True)
class Growth:
    """How regret grows with the number of arms N, by least squares over the sizes' mean regrets.

    per_doubling: slope over log2 N. per_root: slope over sqrt N. exponent: slope of log regret over log N, 0.5
    for sqrt N and near 0 for log N. root_misfit, log_misfit: share of the variance over sizes that the straight
    line over sqrt N or log N leaves, 0 for a perfect line. log_fits: share of resamples in which log N fits better.
    """

    per_doubling: Interval
    per_root: Interval
    exponent: Interval
    log_misfit: float
    root_misfit: float
    log_fits: float


def growth(arms_S: Sequence[int], regret_SR: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Growth:
    """The growth of regret [S, R] over the numbers of arms [S], S at least 2. Runs are paired over sizes."""
    arms = np.asarray(arms_S, dtype=np.float64)
    mean_S1, mean_SB = regret_SR.mean(axis=1)[:, None], resampled_means(regret_SR, seed, draws)

    def slope(x_S: np.ndarray, of: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Interval:
        return interval(_line(x_S, of(mean_S1))[0][0], _line(x_S, of(mean_SB))[0])

    def log_of(mean: np.ndarray) -> np.ndarray:
        # A regret of exactly 0 happens without noise; its logarithm would spoil the fit.
        return np.asarray(np.log(np.maximum(mean, 1e-12)))

    log_misfit_B, root_misfit_B = _line(np.log2(arms), mean_SB)[1], _line(np.sqrt(arms), mean_SB)[1]
    return Growth(
        per_doubling=slope(np.log2(arms)),
        per_root=slope(np.sqrt(arms)),
        exponent=slope(np.log(arms), log_of),
        log_misfit=float(_line(np.log2(arms), mean_S1)[1][0]),
        root_misfit=float(_line(np.sqrt(arms), mean_S1)[1][0]),
        log_fits=float((log_misfit_B < root_misfit_B).mean()),
    )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho of two samples without ties (ties are ranked in order of appearance)."""
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _line(x_S: np.ndarray, y_SB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes [B] of least squares, and the share of y's variance that each line leaves [B]."""
    x, y = x_S - x_S.mean(), y_SB - y_SB.mean(axis=0)
    slope_B = x @ y / (x @ x)
    left_B = ((y - x[:, None] * slope_B) ** 2).sum(axis=0)
    all_B = (y**2).sum(axis=0)
    return slope_B, np.divide(left_B, all_B, out=np.zeros_like(all_B), where=all_B > 0)
