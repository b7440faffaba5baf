import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from treelora.simulation.statistics import growth, mean_interval, rank_correlation, resampled_means


def test_the_interval_is_the_percentiles_of_resampled_means():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    chosen = np.random.default_rng(3).integers(0, 4, size=(500, 4))
    means = [np.mean([values[i] for i in row]) for row in chosen]
    found = mean_interval(values, seed=3, draws=500)
    assert found.value == 4.0
    assert (found.low, found.high) == (
        pytest.approx(np.percentile(means, 2.5)),
        pytest.approx(np.percentile(means, 97.5)),
    )


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for sample in rng.normal(loc=5.0, size=(400, 40)):
        found = mean_interval(sample, draws=400)
        covered += found.low <= 5.0 <= found.high
    # 95 % less the few points that a percentile interval of 40 values is known to lack; standard error 1.1.
    assert 0.90 <= covered / 400 <= 0.98


def test_runs_without_a_score_are_left_out():
    assert mean_interval([1.0, float("nan"), 3.0]).value == 2.0
    assert np.isnan([mean_interval([float("nan")]).value, mean_interval([]).high]).all()
    assert f"{mean_interval([2.0, 2.0]):.1f}" == "2.0 [2.0, 2.0]"


def test_resamples_take_the_same_runs_in_every_row():
    values = np.random.default_rng(0).normal(size=(1, 12))
    means = resampled_means(np.concatenate([values, 3 * values + 1]), seed=5, draws=50)
    np.testing.assert_allclose(means[1], 3 * means[0] + 1)


ARMS = (16, 64, 256, 1024)


@given(a=st.floats(1, 50), b=st.floats(0.1, 20), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_logarithm_is_told_from_a_root(a, b, seed):
    runs = np.random.default_rng(seed).uniform(0.9, 1.1, size=8)
    log_like = growth(ARMS, np.outer(a + b * np.log2(ARMS), runs), draws=100)
    assert log_like.per_doubling.value == pytest.approx(b * runs.mean())
    assert log_like.log_misfit == pytest.approx(0, abs=1e-9)
    assert log_like.log_fits == 1.0
    root_like = growth(ARMS, np.outer(a + b * np.sqrt(ARMS), runs), draws=100)
    assert root_like.per_root.value == pytest.approx(b * runs.mean())
    assert root_like.root_misfit == pytest.approx(0, abs=1e-9)
    assert root_like.log_fits == 0.0


def test_the_exponent_is_the_power_of_n():
    runs = np.linspace(1, 2, 10)
    found = growth(ARMS, np.outer(3 * np.sqrt(ARMS), runs), draws=200)
    # The runs differ in size alone, so every resample has the same exponent.
    assert [found.exponent.value, found.exponent.low, found.exponent.high] == pytest.approx([0.5] * 3)
    assert found.per_root.value == pytest.approx(3 * 1.5)
    assert found.per_root.low < 4.5 < found.per_root.high


def test_slopes_equal_numpys():
    regret = np.random.default_rng(1).uniform(10, 50, size=(4, 6))
    found = growth(ARMS, regret, draws=20)
    mean = regret.mean(axis=1)
    assert found.per_doubling.value == pytest.approx(np.polyfit(np.log2(ARMS), mean, 1)[0])
    assert found.exponent.value == pytest.approx(np.polyfit(np.log(ARMS), np.log(mean), 1)[0])
    left = mean - np.polyval(np.polyfit(np.sqrt(ARMS), mean, 1), np.sqrt(ARMS))
    assert found.root_misfit == pytest.approx((left**2).sum() / ((mean - mean.mean()) ** 2).sum())


def test_rank_correlation_equals_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 60))
    assert rank_correlation(a, a + b) == pytest.approx(spearmanr(a, a + b).statistic)
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1)
