"""What may be claimed from a few paired runs: intervals, an exact test, Holm's correction, runs that would be needed.

Two methods are compared on the same (order, seed), and only the differences of such pairs count: orders and seeds
differ by far more than methods do. scipy is imported where it is needed only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treelora.simulation.statistics import LEVEL, Interval, interval, resampled_means

DRAWS = 10_000
EXACT_PAIRS = 20  # 2^19 patterns of signs take a moment; beyond, patterns are drawn
RANDOM_FLIPS = 100_000
POWER_FACTOR = 2.8  # 1.96 + 0.84: significance at 5 %, two-sided, with power 80 %
ROUNDING = 1e-12  # of the largest value: a mean this small is one of zero


@dataclass(frozen=True)
class Paired:
    """The differences of some pairs: their mean, and what can be said of it."""

    pairs: int
    bootstrap: Interval
    """Percentile bootstrap over pairs. Too narrow for a handful of pairs: read the t interval beside it."""
    t: Interval
    p: float
    """Of the exact sign-flip test, two-sided, not corrected for the number of comparisons."""
    smallest_p: float
    """The least p that so many pairs can give at all."""
    pairs_needed: int | None
    """For a difference of this size and spread; None where it can't be told."""


def paired(differences: Sequence[float], seed: int = 0) -> Paired:
    """All that is reported of one comparison; `differences` has a number a pair, at least one."""
    return Paired(
        pairs=len(differences),
        bootstrap=mean_interval(differences, seed),
        t=t_interval(differences),
        p=sign_flip_p(differences, seed),
        smallest_p=smallest_p(len(differences)),
        pairs_needed=pairs_needed(differences),
    )


def mean_interval(values: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Interval:
    """Mean and percentile bootstrap interval (Efron, 1979). Of one value nothing is known but itself: NaN ends.

    Raises:
        ValueError: there is no value.
    """
    sample = _sample(values)
    if len(sample) < 2:
        return Interval(float(sample[0]), math.nan, math.nan)
    return interval(float(sample.mean()), resampled_means(sample[None], seed, draws)[0])


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and Student's interval, which takes the values for normal; NaN ends for one value.

    Raises:
        ValueError: there is no value.
    """
    sample = _sample(values)
    mean, n = float(sample.mean()), len(sample)
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, n - 1)) * float(sample.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the sign-flip (paired permutation) test of a zero mean (Fisher, 1935).

    If the methods were alike, each difference could as well have the other sign: p is the share of all 2^n patterns of
    signs whose mean is at least as far from zero as the observed one. Exact up to `EXACT_PAIRS` pairs; beyond, of
    `RANDOM_FLIPS` drawn patterns and the observed one.

    Raises:
        ValueError: there is no difference.
    """
    sample = _sample(differences)
    n = len(sample)
    # Rounding must not part a pattern from its equal.
    observed = abs(sample.sum()) - 1e-9 * np.abs(sample).sum()
    if n > EXACT_PAIRS:
        rng = np.random.default_rng(seed)
        extreme = 1
        for _ in range(0, RANDOM_FLIPS, 1000):
            signs = 1.0 - 2.0 * rng.integers(0, 2, size=(1000, n))
            extreme += int((np.abs(signs @ sample) >= observed).sum())
        return extreme / (RANDOM_FLIPS + 1)
    # A pattern and its mirror image give the same |sum|, so the last sign stays.
    sums = sample[-1:]
    for value in sample[:-1]:
        sums = np.concatenate([sums + value, sums - value])
    return float((np.abs(sums) >= observed).mean())


def smallest_p(pairs: int) -> float:
    """2 / 2^n: only the observed pattern of signs and its mirror image are as extreme as themselves."""
    return 2.0 / 2.0**pairs


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of a family of comparisons, in the order given.

    The smallest of m values is multiplied by m, the next by m - 1 and so on; none gets smaller than one before it, and
    none larger than 1.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def pairs_needed(differences: Sequence[float]) -> int | None:
    """(2.8 sd / |mean|)^2 + 2, rounded up: pairs for 80 % power at 5 %, two-sided, should this be the true difference.

    None for fewer than two pairs, and where the mean is zero but for rounding: no number of pairs would show that.
    """
    sample = _sample(differences)
    mean = abs(float(sample.mean()))
    if len(sample) < 2 or mean <= ROUNDING * float(np.abs(sample).max()):
        return None
    return math.ceil((POWER_FACTOR * float(sample.std(ddof=1)) / mean) ** 2 + 2 - 1e-9)


def _sample(values: Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"a sample has one axis and at least one value, not the shape {sample.shape}")
    return sample
