"""The verdict of an audit in words: figures held against thresholds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coupled_adam import experiments, geometry
from coupled_adam.audit.rows import kinds_of_rows
from coupled_adam.geometry import Measurements
from coupled_adam.geometry.arrays import as_matrix
from coupled_adam.lm.config import OPTIMIZER_LABELS

#: A note judges nothing: it says what was not measured, or what the figures include.
Level = Literal["good", "fair", "poor", "note"]

#: Singular values below this share of the largest are what rounding to float32 left of zeros.
ROUNDING = 1e-6

#: Relative change of a figure that is worth telling.
NOTICEABLE = 0.02


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
        level = self.level(value)
        return Finding(level, self.sentence(measured, value, level))

    def level(self, value: float) -> Level:
        """Return the level of a figure."""
        sign = 1 if self.good < self.poor else -1  # lower or higher is better
        return "good" if sign * value <= sign * self.good else "fair" if sign * value <= sign * self.poor else "poor"


def findings(measured: Measurements, notes: Sequence[str] = ()) -> list[Finding]:
    """Judge the figures of an embedding matrix, the most important first.

    Args:
        measured: the figures.
        notes: what else to say, such as what was not measured.
    """
    said = [Finding("note", note) for note in notes]
    nothing, empty = _nothing_learned(measured), _empty_dimensions(measured)
    if nothing is not None:
        return [Finding("poor", nothing), *said]
    isotropy = ISOTROPY.judge(measured)
    if isotropy is not None and isotropy.level == "good":
        if math.exp(-2 * measured.largest_singular_value) >= ISOTROPY.good:
            isotropy = Finding("note", _too_short(measured))
        elif empty is not None:
            isotropy = None
    judged = (
        None if empty is None else Finding("poor", empty),
        *said,
        SHIFT.judge(measured),
        isotropy,
        Finding("fair", _centered(measured)) if measured.isotropy < ISOTROPY.good else None,
        FREQUENCY.judge(measured),
        SIMILARITY.judge(measured),
    )
    return [finding for finding in judged if finding is not None]


def _nothing_learned(measured: Measurements) -> str | None:
    if measured.zero_rows == measured.tokens:
        return f"All {measured.tokens:,} rows are zeros: there is nothing to judge. Were the weights saved?"
    if _rank(measured) == 1 and measured.mean_shift_ratio > 1 - ROUNDING:
        return f"All {measured.tokens:,} rows are the same, or multiples of one: nothing to judge. Were they trained?"
    return None


def _rank(measured: Measurements) -> int:
    return int((measured.singular_values > ROUNDING * measured.singular_values[0]).sum())


def _empty_dimensions(measured: Measurements) -> str | None:
    rank, full = _rank(measured), len(measured.singular_values)
    if rank == full:
        return None
    return f"Rank {rank:,} of {full:,}: the matrix is degenerate, and some directions are empty."


def _too_short(measured: Measurements) -> str:
    return (
        f"Isotropy {measured.isotropy:.3f} is not judged: where rows are as short as here (mean norm "
        f"{measured.mean_of_norms:.3g}) it is high whatever their directions."
    )


def note_on_rows(matrix: NDArray[np.floating[Any]], measured: Measurements, tokens: int | None = None) -> str | None:
    """Say which rows of a matrix say nothing about training, and what the figures are without them, if that matters.

    Args:
        matrix: (V, H), float32 or float64.
        measured: its figures.
        tokens: the highest ID of the tokenizer plus one; None if it is not known.

    Returns:
        A text of a few sentences; None if there are no such rows.
    """
    rows = kinds_of_rows(matrix, tokens)
    if not rows.unused:
        return None
    kinds = (
        (rows.zero, "of zeros"),
        (rows.repeated, "the same as an earlier one"),
        (rows.beyond, "beyond the tokenizer's last token"),
    )
    counted = ", ".join(f"{count:,} {kind}" for count, kind in kinds if count)
    said = f"Of {len(matrix):,} rows {rows.unused:,} tell nothing about training: {counted}."
    if rows.used.sum() < 2:
        return f"{said} Without them too few are left to measure."
    rest = as_matrix(matrix[rows.used])
    shift, isotropy = geometry.mean_shift_ratio(rest), geometry.isotropy(rest)
    condition = geometry.inverse_condition(rest)
    before = (measured.mean_shift_ratio, measured.isotropy, measured.inverse_condition)
    if np.allclose((shift, isotropy, condition), before, rtol=NOTICEABLE, atol=NOTICEABLE / 10):
        return f"{said} Without them the figures are nearly the same."
    return (
        f"{said} Without them the mean shift ratio is {shift:.3f} ({SHIFT.level(shift)}), the isotropy {isotropy:.3f} "
        f"({ISOTROPY.level(isotropy)}) and the inverse condition {condition:.2f} %."
    )


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
