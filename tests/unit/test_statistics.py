import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from treelora_platform.statistics import (
    DRAWS,
    EXACT_PAIRS,
    holm,
    mean_interval,
    paired,
    pairs_needed,
    sign_flip_p,
    smallest_p,
    t_interval,
)

SAMPLE = [1.5, -0.5, 2.0, 3.25, 0.25, -1.0]
numbers = st.floats(-100, 100).map(lambda x: round(x, 3))


def test_the_bootstrap_interval_is_scipys_on_the_same_resamples():
    expected = stats.bootstrap(
        (SAMPLE,), np.mean, n_resamples=DRAWS, method="percentile", rng=np.random.default_rng(5), vectorized=True
    ).confidence_interval
    found = mean_interval(SAMPLE, seed=5)
    assert found.value == pytest.approx(5.5 / 6)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_bootstrap_of_two_values_by_hand():
    # resamples of (0, 1): the means 0, 1/2, 1 with shares 1/4, 1/2, 1/4; so the 2.5 and 97.5 percentiles are 0 and 1
    found = mean_interval([0.0, 1.0])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_one_value_has_no_interval_and_none_is_refused():
    for interval in (mean_interval([4.0]), t_interval([4.0])):
        assert interval.value == 4.0
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
    for function in (mean_interval, t_interval, sign_flip_p, pairs_needed):
        with pytest.raises(ValueError, match="at least one value"):
            function([])


def test_the_t_interval_is_scipys():
    low, high = stats.t.interval(0.95, len(SAMPLE) - 1, loc=np.mean(SAMPLE), scale=stats.sem(SAMPLE))
    assert (t_interval(SAMPLE).low, t_interval(SAMPLE).high) == pytest.approx((low, high))


def test_the_t_interval_by_hand():
    # 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.303: 2 -+ 4.303 / sqrt 3
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.low, found.high) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=9))
def test_the_sign_flip_test_is_the_enumeration_of_all_patterns(differences):
    observed = abs(sum(differences)) - 1e-9 * sum(map(abs, differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    extreme = sum(abs(sum(s * d for s, d in zip(p, differences, strict=True))) >= observed for p in patterns)
    assert sign_flip_p(differences) == pytest.approx(extreme / len(patterns))


def test_the_sign_flip_test_is_scipys_exact_permutation_test():
    expected = stats.permutation_test(
        (SAMPLE, [0.0] * 6), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", vectorized=True
    )
    assert sign_flip_p(SAMPLE) == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("pairs", [1, 2, 4, 6, 10])
def test_the_smallest_p_is_what_equal_differences_give(pairs):
    assert smallest_p(pairs) == sign_flip_p([2.5] * pairs) == 2 / 2**pairs


def test_no_difference_at_all_has_p_one():
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p([1.0, -1.0]) == 1.0


def test_beyond_the_exact_limit_patterns_are_drawn():
    rng = np.random.default_rng(1)
    many = list(rng.normal(0.35, 1, EXACT_PAIRS + 5))
    drawn, normal = sign_flip_p(many), stats.ttest_1samp(many, 0).pvalue
    assert drawn == sign_flip_p(many)
    assert drawn == pytest.approx(normal, abs=0.03)
    assert sign_flip_p([1.0] * 30) == pytest.approx(1 / 100_001)


def test_holms_correction_of_a_worked_example():
    # sorted .005 .01 .03 .04: times 4, 3, 2, 1 = .02 .03 .06 .04; none below the one before: .06 for the last
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holms_correction_stops_at_one_and_takes_ties_and_nothing():
    assert holm([0.4, 0.6, 0.5]) == [1.0, 1.0, 1.0]
    assert holm([0.02, 0.02]) == [0.04, 0.04]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    for p, c in zip(p_values, corrected, strict=True):
        assert p <= c <= min(1.0, len(p_values) * p) + 1e-15
    assert [c for _, c in sorted(zip(p_values, corrected, strict=True))] == sorted(corrected)


def test_pairs_needed_by_hand():
    # mean 2, sd 2 (1, 1, 4 has sd sqrt 3): (2.8 sqrt 3 / 2)^2 + 2 = 5.88 + 2
    assert pairs_needed([1.0, 1.0, 4.0]) == 8
    # mean 1, sd sqrt 2: 2.8^2 * 2 + 2 = 17.68
    assert pairs_needed([0.0, 2.0]) == 18
    assert pairs_needed([-2.0, 0.0]) == 18  # the direction doesn't matter
    assert pairs_needed([3.0, 3.0, 3.0]) == 2  # no spread
    assert pairs_needed([1.0, -1.0]) is None
    # sums to 2.8e-17, which would give 10^32 pairs
    assert sum([0.1, 0.2, -0.3]) != 0
    assert pairs_needed([0.1, 0.2, -0.3]) is None
    assert pairs_needed([1.0]) is None


def test_a_comparison_holds_all_of_it():
    found = paired(SAMPLE)
    assert (found.pairs, found.smallest_p, found.pairs_needed) == (6, 2 / 64, pairs_needed(SAMPLE))
    assert (found.bootstrap, found.t, found.p) == (mean_interval(SAMPLE), t_interval(SAMPLE), sign_flip_p(SAMPLE))
