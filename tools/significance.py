"""Statistics of comparisons: McNemar's exact test, the paired t-test, Holm's correction.

SciPy has all but the last. It is not used, because it would be the largest package of the project.
The tests compare these functions with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, mean, stdev

LEVEL = 0.05  # accepted probability of calling equal settings different
POWER = 0.8  # wanted probability of finding a difference
FEWEST_PAIRS = 3


def mcnemar_p(only_a_wrong: int, only_b_wrong: int) -> float:
    """Return the two-sided p-value of McNemar's exact test from the numbers of discordant examples.

    It is the probability of a split at least as uneven if each of these examples were equally
    likely to go either way (Dietterich 1998, Neural Computation 10, section 3.1).
    """
    total = only_a_wrong + only_b_wrong
    term, tail = 1, 0  # term is the binomial coefficient (total over k)
    for k in range(min(only_a_wrong, only_b_wrong) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


@dataclass(frozen=True)
class PairedTest:
    """Student's t-test of the mean of paired differences against zero."""

    pairs: int
    mean: float
    deviation: float  # sample standard deviation; it and all below are nan for less than 2 pairs
    low: float  # 95% confidence interval of the mean
    high: float
    p: float  # two-sided


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Test whether the mean of at least one difference is zero (Student 1908, Biometrika 6)."""
    pairs, average = len(differences), mean(differences)
    if pairs < 2:
        return PairedTest(pairs, average, *[math.nan] * 4)
    deviation = stdev(differences)
    error = deviation / math.sqrt(pairs)
    margin = t_quantile(1 - LEVEL, pairs - 1) * error
    if error == 0:
        return PairedTest(pairs, average, 0, average, average, float(average == 0))
    p = 1 - t_probability(abs(average) / error, pairs - 1)
    return PairedTest(pairs, average, deviation, average - margin, average + margin, p)


def t_probability(t: float, freedom: int) -> float:
    """Return P(|T| < t) of Student's t with `freedom` degrees of freedom.

    It is a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    angle = math.atan2(t, math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """Find the t where P(|T| < t) equals `probability`, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if t_probability(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values, so that all together err at most as often as a single one.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def pairs_needed(difference: float, deviation: float, comparisons: int = 1) -> float:
    """Return how many pairs show a difference of this mean and deviation with 80% probability.

    With several comparisons, the level is the one of Holm's first step. The result is infinite if
    the difference is zero. Source: Guenther 1981, The American Statistician 35 (a normal
    approximation with a correction for Student's t).
    """
    if not difference:
        return math.inf
    quantile = NormalDist().inv_cdf
    z = quantile(1 - LEVEL / comparisons / 2)
    needed = ((z + quantile(POWER)) * deviation / difference) ** 2 + z**2 / 2
    return max(FEWEST_PAIRS, math.ceil(needed))
