"""The verdict of an audit in words: figures held against thresholds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from coupled_adam import experiments, geometry
from coupled_adam.geometry import Measurements
from coupled_adam.lm.config import OPTIMIZER_LABELS

Level = Literal["good", "fair", "poor"]


@dataclass(frozen=True)
class Finding:
    """A figure judged."""

    level: Level
    text: str
    """A sentence with the figure and the threshold it was held against."""


@dataclass(frozen=True)
class Criterion:
    """How one figure is judged. The published embeddings lie in "poor" with AdamW and in "good" with Coupled Adam."""

    good: float
    """Bound between good and fair."""
    poor: float
    """Bound between fair and poor."""
    value: Callable[[Measurements], float | None]
    """The figure; None or NaN if it is not known."""
    sentence: Callable[[Measurements, float, Level], str]
    """What it means, from the measurements, the figure and its level."""

    def judge(self, measured: Measurements) -> Finding | None:
        """Judge the figure; None if it is not known."""
        value = self.value(measured)
        if value is None or math.isnan(value):
            return None
        sign = 1 if self.good < self.poor else -1  # lower or higher is better
        level: Level = (
            "good" if sign * value <= sign * self.good else "fair" if sign * value <= sign * self.poor else "poor"
        )
        return Finding(level, self.sentence(measured, value, level))


def findings(measured: Measurements) -> list[Finding]:
    """Judge the figures of an embedding matrix, the most important first."""
    cause = Finding("fair", _centered(measured)) if measured.isotropy < ISOTROPY.good else None
    judged = (
        SHIFT.judge(measured),
        ISOTROPY.judge(measured),
        cause,
        FREQUENCY.judge(measured),
        SIMILARITY.judge(measured),
    )
    return [finding for finding in judged if finding is not None]


def _published(figure: str) -> str:
    """Format the range of a figure in the paper, with either optimizer."""
    ranges = []
    for method in (OPTIMIZER_LABELS["adamw"], OPTIMIZER_LABELS["coupled_adam"]):
        values = [
            v for row in experiments.published() if row.method == method and (v := getattr(row, figure)) is not None
        ]
        ranges.append(f"{min(values):g}–{max(values):g} with {method}")
    return f"the paper has {', '.join(ranges)}"


def _shift(measured: Measurements, value: float, level: Level) -> str:
    words = {
        "good": "the embeddings are centered on the origin",
        "fair": "the embeddings are shifted off the origin",
        "poor": "most of an average embedding is a shift that all tokens share",
    }[level]
    return (
        f"Mean shift ratio {value:.3f}: {words} (below {SHIFT.good:g} counts as centered, above {SHIFT.poor:g} as "
        f"strongly shifted; {_published('mean_shift_ratio')})."
    )


def _isotropy(measured: Measurements, value: float, level: Level) -> str:
    words = {"good": "no direction is preferred", "fair": "some directions are preferred", "poor": "anisotropic"}[level]
    return (
        f"Isotropy {value:.3f}: {words} (above {ISOTROPY.good:g} counts as isotropic, below {ISOTROPY.poor:g} as "
        f"anisotropic; {_published('isotropy')}). It depends on the scale: the mean norm of an embedding here is "
        f"{measured.mean_of_norms:.3g}."
    )


def _centered(measured: Measurements) -> str:
    value = measured.isotropy_centered
    if value >= ISOTROPY.good:
        cause = "the shift is the cause"
    elif value > measured.isotropy + 0.1:
        cause = "the shift is part of the cause"
    else:
        cause = "the shift is not the cause; directions across it dominate"
    return f"Centered, the isotropy is {value:.3f}: {cause}."


def _frequency(measured: Measurements, value: float, level: Level) -> str:
    assert measured.norm_frequency is not None
    words = {"good": "hardly depends", "fair": "partly depends", "poor": "depends strongly"}[level]
    return (
        f"Norm and log frequency have a rank correlation of {measured.norm_frequency.spearman:+.2f}: the length of an "
        f"embedding {words} on how frequent its token is (bounds {FREQUENCY.good:g} and {FREQUENCY.poor:g})."
    )


def _similarity(measured: Measurements, value: float, level: Level) -> str:
    centered = geometry.mean_similarity(measured.word_similarity["centered"])
    after = "" if centered is None else f", centered {centered:.1f}"
    covered = sum(s.covered for s in measured.word_similarity["original"])
    return (
        f"Word similarity {value:.1f}{after} (100·correlation with human ratings over {covered:,} pairs; above "
        f"{SIMILARITY.good:g} counts as good, below {SIMILARITY.poor:g} as none; {_published('word_similarity')})."
    )


SHIFT = Criterion(0.1, 0.4, lambda m: m.mean_shift_ratio, _shift)
ISOTROPY = Criterion(0.8, 0.4, lambda m: m.isotropy, _isotropy)
FREQUENCY = Criterion(0.3, 0.6, lambda m: abs(m.norm_frequency.spearman) if m.norm_frequency else None, _frequency)
SIMILARITY = Criterion(30.0, 10.0, lambda m: m.mean_similarity, _similarity)
