"""The statistics of tools.compare, against SciPy and by simulation."""

import math

import numpy as np
import pytest

from tools.significance import (
    LEVEL,
    POWER,
    holm,
    mcnemar_p,
    paired_test,
    pairs_needed,
    t_probability,
    t_quantile,
)

# Measured on this project over the seeds 0 to 7: learning rate 0.2 against 0.1.
DIFFERENCE = 0.0043
BETWEEN_SEEDS = 0.0030  # standard deviation of the accuracy of one setting
BETWEEN_PAIRS = 0.0011  # standard deviation of the difference of two runs with the same seed


def test_functions_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 7, 30, 199):
        for t in (0, 0.1, 1, 2.5, 12, 200):
            expected = 1 - 2 * stats.t.sf(t, freedom)
            assert t_probability(t, freedom) == pytest.approx(expected, abs=1e-12)
        assert t_quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom))
    for wrong in ((0, 0), (0, 5), (3, 9), (40, 41), (500, 610)):
        assert mcnemar_p(*wrong) == pytest.approx(
            stats.binomtest(wrong[0], sum(wrong)).pvalue if sum(wrong) else 1
        )
    differences = np.random.default_rng(0).normal(0.3, 1, 9)
    result, expected = paired_test(list(differences)), stats.ttest_1samp(differences, 0)
    interval = expected.confidence_interval()
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))


def test_many_changed_predictions_are_no_problem() -> None:
    assert mcnemar_p(10_000, 10_000) == 1
    assert 0 <= mcnemar_p(1_000, 10_000) < 1e-300


def test_one_pair_has_no_interval() -> None:
    result = paired_test([0.5])
    assert (result.pairs, result.mean) == (1, 0.5)
    assert math.isnan(result.deviation) and math.isnan(result.p)


@pytest.mark.parametrize(("difference", "p"), [(0.0, 1), (0.01, 0)])
def test_equal_differences_have_no_deviation(difference: float, p: float) -> None:
    result = paired_test([difference] * 4)
    assert (result.low, result.high, result.p) == (difference, difference, p)


def test_holm_corrects_for_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def t_tests(differences: np.ndarray) -> np.ndarray:
    """Return the p-values of paired tests of the last axis."""
    flat = differences.reshape(-1, differences.shape[-1])
    return np.array([paired_test(row).p for row in flat.tolist()]).reshape(differences.shape[:-1])


def detected(pairs: int, comparisons: int, difference: float, cases: int) -> np.ndarray:
    """Simulate families of comparisons with one baseline. Return (cases, comparisons) of bool.

    The difference is between the true means of each setting and the baseline.
    """
    rng = np.random.default_rng(0)
    # The deviation of a difference comes from two runs, so each run has a part of it.
    noise = rng.normal(0, BETWEEN_PAIRS / math.sqrt(2), (cases, comparisons + 1, pairs))
    p_values = t_tests(difference + noise[:, 1:] - noise[:, :1])
    return np.array([holm(row) for row in p_values.tolist()]) < LEVEL


@pytest.mark.parametrize("pairs", [3, 8])
@pytest.mark.parametrize("comparisons", [1, 3])
def test_equal_settings_are_rarely_called_different(pairs: int, comparisons: int) -> None:
    cases = 2_000
    errors = detected(pairs, comparisons, 0, cases).any(axis=1)
    three_standard_errors = 3 * math.sqrt(LEVEL * (1 - LEVEL) / cases)
    assert errors.mean() <= LEVEL + three_standard_errors


def test_three_seeds_paired_find_what_they_miss_unpaired() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert detected(3, 1, DIFFERENCE, 2_000).mean() >= 0.75
    rng = np.random.default_rng(0)
    settings = rng.normal(0, BETWEEN_SEEDS, (2, 2_000, 3))
    unpaired = stats.ttest_ind(DIFFERENCE + settings[0], settings[1], axis=1)
    assert (unpaired.pvalue < LEVEL).mean() < 0.35


@pytest.mark.parametrize("difference", [0.0006, 0.001, 0.002])
def test_needed_pairs_find_the_difference(difference: float) -> None:
    needed = int(pairs_needed(difference, BETWEEN_PAIRS))
    found = detected(needed, 1, difference, 1_000).mean()
    assert POWER - 0.06 < found < 0.97
    assert pairs_needed(difference, BETWEEN_PAIRS, comparisons=3) >= needed


def test_no_number_of_pairs_shows_no_difference() -> None:
    assert pairs_needed(0, BETWEEN_PAIRS) == math.inf
