"""Statistics of paired runs, against scipy, by hand, and on simulated data of which the truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from coupled_adam.report.paired import (
    Interval,
    difference_text,
    document_bootstrap,
    holm,
    mean_interval,
    p_text,
    paired_difference,
    pairs_needed,
)


def test_three_pairs_by_hand() -> None:
    found = paired_difference({1: 5.091, 2: 5.087, 3: 5.098, 9: 0.0}, {3: 5.066, 1: 5.064, 2: 5.053, 4: 7.0})
    differences = [-0.027, -0.034, -0.032]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    t = 4.302652729911275  # of 97.5% with two degrees of freedom
    assert found.count == 3, "seeds that one of them lacks are left out"
    assert found.mean == pytest.approx(mean) and found.deviation == pytest.approx(deviation)
    assert found.interval.low == pytest.approx(mean - t * deviation / math.sqrt(3))
    assert found.interval.high == pytest.approx(mean + t * deviation / math.sqrt(3))
    # With two degrees of freedom P(|T| > t) = 1 − t/√(t² + 2).
    statistic = abs(mean) / (deviation / math.sqrt(3))
    assert found.p_value == pytest.approx(1 - statistic / math.sqrt(statistic**2 + 2))


def test_what_seeds_have_in_common_is_no_error() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(0, 10, 8)
    a, b = common + rng.normal(0, 0.1, 8), common + 0.5 + rng.normal(0, 0.1, 8)
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    assert found.p_value == pytest.approx(stats.ttest_1samp(b - a, 0).pvalue) and found.p_value < 1e-4
    assert stats.ttest_ind(a, b).pvalue > 0.5, "a test that takes the runs for unrelated sees nothing"


@pytest.mark.parametrize("second", [{}, {2: 1.0}])
def test_without_a_common_seed_there_is_no_difference(second: dict[int, float]) -> None:
    assert paired_difference({1: 1.0}, second) is None


def test_one_pair_has_a_difference_and_no_error() -> None:
    found = paired_difference({1: 1.0, 2: 3.0}, {1: 1.5})
    assert (found.count, found.mean) == (1, 0.5)
    assert found.deviation is None and found.interval is None and found.p_value is None


@pytest.mark.parametrize("figure", [1.0, 1e-3, 9.026776432991028])
def test_rounding_is_no_spread(figure: float) -> None:
    first = {seed: figure * seed for seed in range(1, 5)}
    same = paired_difference(first, {seed: value + 0.1 for seed, value in first.items()})
    assert same.p_value is None and same.interval == Interval(same.mean, same.mean)
    assert same.mean == pytest.approx(0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        seeds = rng.normal(0, 1, 4)
        first, second = seeds + rng.normal(0, 0.1, 4), seeds + 0.3 + rng.normal(0, 0.2, 4)
        found = paired_difference(dict(enumerate(first)), dict(enumerate(second)))
        covered += found.interval.low <= 0.3 <= found.interval.high
    assert 930 <= covered <= 970


def test_the_interval_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = mean_interval(values)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert mean_interval([1.0]) is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.02, None, 0.5, 0.9]) == [None, pytest.approx(0.06), None, 1.0, 1.0]
    assert holm([]) == [] and holm([None]) == [None] and holm([0.2]) == [0.2]


def test_holm_keeps_the_order_and_never_lowers() -> None:
    rng = np.random.default_rng(2)
    for size in (1, 2, 7, 30):
        p = rng.random(size) ** 3
        adjusted = np.array(holm(p.tolist()))
        assert (adjusted >= p).all() and (adjusted <= np.minimum(1, size * p)).all()
        assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_holm_errs_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(3)
    wrong = sum(min(holm(rng.random(10).tolist())) < 0.05 for _ in range(2000))
    assert wrong / 2000 < 0.065


def test_pairs_that_are_needed() -> None:
    assert pairs_needed(0.02, 0.02) == math.ceil((2 * 1.959964) ** 2) == 16
    assert pairs_needed(0.04, 0.02) == 62 and pairs_needed(0.0, 0.02) == 2
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be above 0"):
            pairs_needed(0.02, wrong)


def test_the_bootstrap_of_one_document_and_seed_is_their_difference() -> None:
    found = document_bootstrap(np.array([[2.0]]), np.array([[1.5]]), np.array([7]), 100)
    assert (found.low, found.high) == (-0.5, -0.5)


def test_the_bootstrap_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 400, 30)
    first, second = rng.normal(6, 1, (3, 30)), rng.normal(5.9, 1, (3, 30))
    means = []
    for _ in range(20000):
        documents, seeds = rng.integers(0, 30, 30), rng.integers(0, 3, 3)
        differences = [(second - first)[s][documents] @ tokens[documents] / tokens[documents].sum() for s in seeds]
        means.append(np.mean(differences))
    low, high = np.quantile(means, [0.025, 0.975])
    found = document_bootstrap(first, second, tokens, 20000)
    # The standard error of such a quantile is 0.005 here.
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert found == document_bootstrap(first, second, tokens, 20000), "the same numbers each time"
    assert found != document_bootstrap(first, second, tokens, 20000, seed=1)


def test_resamples_do_not_depend_on_how_many_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    first, second, tokens = rng.normal(6, 1, (2, 50)), rng.normal(6, 1, (2, 50)), np.full(50, 9)
    whole = document_bootstrap(first, second, tokens)
    monkeypatch.setattr("coupled_adam.report.paired.AT_A_TIME", 50 * 700)
    parts = document_bootstrap(first, second, tokens)
    assert (parts.low, parts.high) == (pytest.approx(whole.low, abs=0.02), pytest.approx(whole.high, abs=0.02))


def test_the_bootstrap_covers_what_documents_add() -> None:
    """Documents that all seeds read alike do not average out over seeds."""
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(150):
        of_documents, of_seeds = rng.normal(0, 1, 80), rng.normal(0, 0.02, (4, 1))
        difference = 0.2 + of_documents + of_seeds + rng.normal(0, 0.1, (4, 80))
        found = document_bootstrap(np.zeros((4, 80)), difference, np.full(80, 50), 400)
        covered += found.low <= 0.2 <= found.high
    assert covered / 150 > 0.88


@pytest.mark.parametrize(
    ("first", "second", "tokens"),
    [((2, 3), (3, 3), 3), ((2, 3), (2, 3), 2), ((0, 3), (0, 3), 3), ((3,), (3,), 3)],
)
def test_what_does_not_fit_is_refused(first: tuple[int, ...], second: tuple[int, ...], tokens: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        document_bootstrap(np.zeros(first), np.zeros(second), np.ones(tokens, dtype=np.int64))
    with pytest.raises(ValueError, match="has no tokens"):
        document_bootstrap(np.zeros((1, 2)), np.zeros((1, 2)), np.array([1, 0]))


def test_how_differences_are_written() -> None:
    found = paired_difference({1: 5.0, 2: 5.0, 3: 5.0}, {1: 5.1, 2: 5.09, 3: 5.11})
    assert difference_text(found) == "+0.100 [+0.075, +0.125]"
    assert difference_text(paired_difference({1: 5.0}, {1: 4.9})) == "-0.100" and difference_text(None) == "–"
    assert [p_text(p) for p in (None, 1e-11, 0.0123, 0.5, 1.0)] == ["–", "< 0.001", "0.012", "0.50", "1.00"]
