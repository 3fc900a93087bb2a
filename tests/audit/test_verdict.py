"""The verdict: the words fit the figures, and the thresholds are those that are named."""

from dataclasses import replace

import numpy as np

from coupled_adam import geometry
from coupled_adam.audit.verdict import ISOTROPY, SHIFT, Finding, findings

CLOUD = 0.2 * np.random.default_rng(0).standard_normal((3000, 16))
COUNTS = np.arange(1, 3001)
RATED = geometry.Benchmark("rated", tuple((f"{i}", f"{i + 1}", float(CLOUD[i] @ CLOUD[i + 1])) for i in range(40)))


def judged(matrix: np.ndarray) -> list[Finding]:
    return findings(geometry.measure(matrix, counts=COUNTS, token_of=int, benchmarks=[RATED]))


def test_a_shifted_matrix_is_told_from_a_centered_one() -> None:
    good, poor = judged(CLOUD), judged(CLOUD + 1)
    assert [f.level for f in good[:2]] == ["good", "good"]
    assert [f.level for f in poor[:2]] == ["poor", "poor"]
    assert "the shift is the cause" in poor[2].text
    assert f"{geometry.mean_shift_ratio(CLOUD + 1):.3f}" in poor[0].text


def test_a_dominant_direction_is_not_blamed_on_the_shift() -> None:
    stretched = CLOUD * np.array([10.0, *[1.0] * 15])
    assert "directions across it dominate" in findings(geometry.measure(stretched - stretched.mean(0)))[2].text


def test_what_is_not_known_is_not_judged() -> None:
    assert len(findings(geometry.measure(CLOUD))) == 2
    assert len(judged(CLOUD)) == 4


def test_the_published_range_is_that_of_the_published_results() -> None:
    shift, isotropy = judged(CLOUD)[:2]
    assert "the paper has 0.73–0.82 with AdamW, 0.01–0.03 with Coupled Adam" in shift.text
    assert "the paper has 0.1–0.28 with AdamW, 0.83–0.97 with Coupled Adam" in isotropy.text


def test_the_levels_change_at_the_bounds() -> None:
    for criterion, better in ((SHIFT, -1e-9), (ISOTROPY, 1e-9)):
        values = [bound + sign * better for bound in (criterion.good, criterion.poor) for sign in (1, -1)]
        judged = [replace(criterion, value=lambda m, v=v: v).judge(geometry.measure(CLOUD)) for v in values]
        assert [each.level for each in judged] == ["good", "fair", "fair", "poor"]
