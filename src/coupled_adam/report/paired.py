"""Statistics of runs that come in pairs: one seed, so the same initial weights and batches, and two methods.

What two methods differ by is the mean of the differences within pairs. The spread of the runs themselves is no measure
of its error: a seed that is good for one method is good for the other.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from coupled_adam.figures import MISSING

#: Of all intervals.
LEVEL = 0.95

#: Resamples of a bootstrap, and the seed that they are drawn with.
RESAMPLES, BOOTSTRAP_SEED = 10_000, 0

#: Numbers of a bootstrap that exist at a time.
AT_A_TIME = 2**22

#: A spread below this share of the figures is rounding: no spread that a test could use.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """An interval at ``LEVEL``."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """By how much one method's figure is above another's, over the seeds that both have."""

    count: int
    """Pairs."""
    mean: float
    deviation: float | None
    """Sample standard deviation of the differences; None of a single pair."""
    interval: Interval | None
    """Student's t interval of the mean; None of a single pair."""
    p_value: float | None
    """Two-sided paired t-test that the mean is zero; None of a single pair, or where the pairs do not differ in it."""


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference | None:
    """Compare a figure of two methods, ``second`` minus ``first``.

    Args:
        first, second: the figure of each seed. Seeds that only one has are left out.

    Returns:
        None if they share no seed.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    a, b = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    differences = [y - x for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return PairedDifference(1, mean, None, None, None)
    deviation = statistics.stdev(differences)
    if deviation <= ROUNDING * max(map(abs, (*a, *b))):
        return PairedDifference(len(seeds), mean, deviation, Interval(mean, mean), None)
    test = stats.ttest_rel(b, a)
    bounds = test.confidence_interval(LEVEL)
    interval = Interval(float(bounds.low), float(bounds.high))
    return PairedDifference(len(seeds), mean, deviation, interval, float(test.pvalue))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return Student's t interval of a mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return Interval(mean - reach, mean + reach)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust the p-values of tests that are read together, by Holm's method; None stays None and is not counted.

    An adjusted value below 0.05 may be called significant with a chance of 5% that any true null hypothesis of the
    table is.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def pairs_needed(deviation: float, difference: float) -> int:
    """Return so many pairs that the 95% interval of the mean difference is as wide as ``difference``.

    n = (2·1.96·s/δ)², s being the standard deviation of the differences within pairs, and at least 2.

    Raises:
        ValueError: ``difference`` is not above 0.
    """
    if not difference > 0:
        raise ValueError(f"difference {difference:g} to detect must be above 0")
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    return max(2, math.ceil((2 * z * deviation / difference) ** 2))


def document_bootstrap(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    tokens: NDArray[np.int64],
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> Interval:
    """Return a percentile interval of the mean loss of ``second`` minus ``first`` over seeds and documents.

    All runs read the same documents, so both are drawn with replacement and every drawn seed reads the drawn documents.
    It covers what the t interval over seeds does not: that other documents would have given another difference. With
    few seeds it covers their spread less well than the t interval does; read both.

    Args:
        first, second: mean loss of each document, (seeds, documents) float64; a row a seed, in the same order.
        tokens: tokens of each document, (documents,), above 0.
        resamples: how many are drawn.
        seed: of the random numbers; the same seed gives the same interval.

    Raises:
        ValueError: the shapes do not fit, nothing is there, or a document has no tokens.
    """
    if first.shape != second.shape or first.ndim != 2 or tokens.shape != first.shape[1:] or 0 in first.shape:
        raise ValueError(f"losses {first.shape} and {second.shape} of {tokens.shape} documents do not fit")
    if (tokens < 1).any():
        raise ValueError("a document has no tokens")
    seeds, documents = first.shape
    rng = np.random.default_rng(seed)
    summed = ((second - first) * tokens).T  # (documents, seeds)
    means = np.empty(resamples)
    part = max(1, AT_A_TIME // documents)
    for start in range(0, resamples, part):
        size = min(part, resamples - start)
        drawn = rng.multinomial(documents, np.full(documents, 1 / documents), size).astype(np.float64)
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size) / seeds
        by_seed = (drawn @ summed) / (drawn @ tokens)[:, None]
        means[start : start + size] = (by_seed * of_seeds).sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def with_sign(value: float | None, form: str = ".3f") -> str:
    """Format a difference with its sign; a dash if there is none."""
    return MISSING if value is None else f"{value:+{form}}"


def bracketed(interval: Interval | None, form: str = ".3f") -> str:
    """Format an interval of a difference; a dash if there is none."""
    return MISSING if interval is None else f"[{interval.low:+{form}}, {interval.high:+{form}}]"


def difference_text(found: PairedDifference | None, form: str = ".3f") -> str:
    """Format a mean difference and its interval: ``-0.031 [-0.059, -0.002]``."""
    if found is None:
        return MISSING
    return with_sign(found.mean, form) + (f" {bracketed(found.interval, form)}" if found.interval else "")


def p_text(p: float | None) -> str:
    """Format a p-value, rounded up where it is small: a few pairs carry no more."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
