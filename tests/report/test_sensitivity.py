"""The learning-rate sensitivity, against the tables of the paper that uses it."""

import math

import pytest

from coupled_adam import experiments
from coupled_adam.report.sensitivity import lr_sensitivity

SWEEPS = experiments.published_sweeps()
#: Of the fifty published values, those whose losses are known at every learning rate.
KNOWN = [sweep for sweep in SWEEPS if sweep.losses]


def test_the_published_tables_are_whole() -> None:
    sizes = ["16M", "29M", "57M", "109M", "221M"]
    methods = {("baseline", None), ("μ-centering", None)} | {
        (name, coefficient) for name in ("μ-loss", "z-loss") for coefficient in (1e-7, 1e-4, 1e-1, 1e2)
    }
    assert {(s.model, s.method, s.coefficient) for s in SWEEPS} == {(n, *m) for n in sizes for m in methods}
    assert len(SWEEPS) == 50 and len(KNOWN) == 20
    rates = experiments.published_learning_rates()
    lists = [v for s in SWEEPS for v in (s.losses, s.norm_of_mean, s.logit_mean, s.logit_max) if v is not None]
    assert len(rates) == 7 and rates == sorted(rates) and all(len(values) == 7 for values in lists)


@pytest.mark.parametrize("sweep", KNOWN, ids=lambda s: f"{s.model}-{s.method}")
def test_it_is_that_of_the_published_tables(sweep: experiments.PublishedSweep) -> None:
    assert sweep.losses and sweep.best_loss == min(sweep.losses)
    # Losses are known to 0.0005 each: seven of them and seven times the least, over six; the table to 0.0005.
    rounding = 0.0005 * (7 + 7) / 6 + 0.0005
    assert lr_sensitivity(sweep.losses, sweep.initial_loss) == pytest.approx(sweep.lr_sensitivity, abs=rounding)


def test_by_hand() -> None:
    assert lr_sensitivity([3.0, 3.5, 5.0], 9.0) == pytest.approx((0.5 + 2.0) / 2)
    assert lr_sensitivity([4.0, 4.0], 9.0) == 0


@pytest.mark.parametrize("diverged", [None, math.nan, math.inf, -math.inf, 9.0, 1e30])
def test_a_run_that_diverged_counts_with_the_initial_loss(diverged: float | None) -> None:
    assert lr_sensitivity([3.0, diverged, 3.0], 9.0) == pytest.approx(6.0 / 2)


@pytest.mark.parametrize(
    ("losses", "initial", "message"),
    [([3.0], 9.0, "two or more learning rates"), ([3.0, 4.0], math.nan, "initial_loss nan is not finite")],
)
def test_what_has_no_sensitivity(losses: list[float | None], initial: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lr_sensitivity(losses, initial)
