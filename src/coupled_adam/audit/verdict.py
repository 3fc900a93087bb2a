"""The verdict of an audit in words: metrics held against thresholds."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coupled_adam import experiments, geometry
from coupled_adam.audit.rows import kinds_of_rows
from coupled_adam.figures import FIGURES
from coupled_adam.geometry import Measurements
from coupled_adam.lm.config import OPTIMIZER_LABELS

__all__ = ["Finding", "Level"]

#: A note judges nothing: it says what was not measured, what the metrics include, or what explains them.
Level = Literal["good", "fair", "poor", "note"]
"""How a metric was judged; ``"note"`` for a remark without judgment."""

#: Singular values below this share of the largest are what rounding to float32 left of zeros.
ROUNDING = 1e-6

#: A matrix of at least this share of the full rank is not degenerate: sentence encoders leave a few directions empty.
NEARLY_FULL = 0.95

#: Relative change of a metric that is worth telling.
NOTICEABLE = 0.02

#: A gain of isotropy that is worth a step of post-processing.
WORTHWHILE = 0.1


@dataclass(frozen=True)
class Finding:
    """One metric judged, or a note."""

    level: Level
    """The judgment."""
    text: str
    """A sentence with the value of the metric."""
    figure: str | None = None
    """The name of the metric that was judged, as in ``coupled_adam.geometry.Measurements``; None for a note."""


@dataclass(frozen=True)
class Criterion:
    """How one metric is judged. The published embeddings lie in "poor" with AdamW and in "good" with Coupled Adam."""

    figure: str
    """The name of the metric."""
    good: float
    """Bound between good and fair."""
    poor: float
    """Bound between fair and poor."""
    value: Callable[[Measurements], float | None]
    """The metric; None or NaN if it is not known."""
    sentence: Callable[[Measurements, float, Level], str]
    """What it means, from the measurements, the value and its level."""
    published: str | None = None
    """The attribute of the published results that holds the same metric."""
    remark: str = ""
    """What else to know before two models are compared by it."""

    def judge(self, measured: Measurements) -> Finding | None:
        """Judge the metric; None if it is not known."""
        value = self.value(measured)
        if value is None or math.isnan(value):
            return None
        level = self.level(value)
        return Finding(level, self.sentence(measured, value, level), self.figure)

    def level(self, value: float) -> Level:
        """Return the level of a value."""
        sign = 1 if self.lower_is_better else -1
        return "good" if sign * value <= sign * self.good else "fair" if sign * value <= sign * self.poor else "poor"

    @property
    def lower_is_better(self) -> bool:
        """Whether small values are good."""
        return self.good < self.poor

    @property
    def range(self) -> str:
        """The bounds, and the published values beside them, in one sentence."""
        good, poor = ("up to", "above") if self.lower_is_better else ("from", "below")
        paper = f"; {_published(self.published)}" if self.published else ""
        remark = f" {self.remark}" if self.remark else ""
        return f"good {good} {self.good:g}, poor {poor} {self.poor:g}{paper}.{remark}"


def ranges(found: Iterable[Finding]) -> list[tuple[str, str]]:
    """Return label and range of each metric that one of the findings judges, once."""
    judged = {finding.figure for finding in found}
    return [(FIGURES[each.figure].label, each.range) for each in CRITERIA if each.figure in judged]


def summary(measured: Measurements) -> str:
    """Say in one line what a matrix is like: whether it is shifted, whether it is isotropic, and why not."""
    if (nothing := nothing_learned(measured)) is not None:
        return nothing
    if too_few_for_shift(measured):
        return f"{measured.tokens:,} rows are too few to judge: their mean may be off the origin by chance."
    shift, isotropy = SHIFT.level(measured.mean_shift_ratio), ISOTROPY.level(measured.isotropy)
    words = {"good": "Centered", "fair": "Shifted off the origin", "poor": "Strongly shifted off the origin"}[shift]
    text = f"{words} (mean shift ratio {measured.mean_shift_ratio:.3f})"
    if too_few_for_isotropy(measured):
        return f"{text}; too few rows to judge their isotropy."
    if (empty := _empty_dimensions(measured)) is not None and empty.level == "poor":
        return f"{text}; {empty.text[0].lower()}{empty.text[1:]}"
    if _is_too_short(measured):
        return f"{text}; the rows are too short to judge their isotropy."
    if isotropy != "good":
        words = {"fair": "somewhat anisotropic", "poor": "anisotropic"}[isotropy]
        text = f"{text} and {words} (isotropy {measured.isotropy:.3f})"
        return f"{text}: {_cause(measured)}." if shift != "good" or helped_by_removal(measured) else f"{text}."
    if shift == "good":
        return f"{text} and isotropic (isotropy {measured.isotropy:.3f})."
    return f"{text}; evenly spread around that offset (isotropy after centering {measured.isotropy_centered:.3f})."


def findings(measured: Measurements, notes: Sequence[str] = ()) -> list[Finding]:
    """Judge the metrics of an embedding matrix, the most important first.

    Args:
        measured: the metrics.
        notes: what else to say, such as what was not measured.
    """
    said = [Finding("note", note) for note in notes]
    nothing, empty = nothing_learned(measured), _empty_dimensions(measured)
    if nothing is not None:
        return [Finding("poor", nothing), *said]
    shift, isotropy = SHIFT.judge(measured), ISOTROPY.judge(measured)
    centered = Finding("note", _centered(measured)) if measured.isotropy < ISOTROPY.good else None
    if too_few_for_shift(measured):
        shift = Finding("note", _by_chance(measured))
    if too_few_for_isotropy(measured):
        isotropy, centered = Finding("note", _flat(measured)), None
    elif isotropy is not None and isotropy.level == "good":
        if _is_too_short(measured):
            isotropy = Finding("note", _too_short(measured))
        elif empty is not None and empty.level == "poor":
            isotropy = None
    judged = (
        empty,
        *said,
        shift,
        isotropy,
        centered,
        FREQUENCY.judge(measured),
        SIMILARITY.judge(measured),
    )
    return [finding for finding in judged if finding is not None]


def nothing_learned(measured: Measurements) -> str | None:
    """Say why there is nothing to judge: zeros, or one row alone; None for other matrices."""
    if measured.zero_rows == measured.tokens:
        return f"All {measured.tokens:,} rows are zeros: there is nothing to judge. Were the weights saved?"
    if _rank(measured) == 1 and measured.mean_shift_ratio > 1 - ROUNDING:
        return f"All {measured.tokens:,} rows are the same, or multiples of one: nothing to judge. Were they trained?"
    return None


def _rank(measured: Measurements) -> int:
    return int((measured.singular_values > ROUNDING * measured.singular_values[0]).sum())


def _empty_dimensions(measured: Measurements) -> Finding | None:
    rank, full = _rank(measured), len(measured.singular_values)
    if rank == full or too_few_for_isotropy(measured):
        return None
    if rank < NEARLY_FULL * full:
        return Finding("poor", f"Rank {rank:,} of {full:,}: the matrix is degenerate, and some directions are empty.")
    empty = "one direction is" if full - rank == 1 else f"{full - rank:,} directions are"
    return Finding("note", f"Rank {rank:,} of {full:,}: {empty} empty.")


def too_few_for_shift(measured: Measurements) -> bool:
    """Whether a shift that is not good may be chance: the mean of N rows without a common direction is about 1/√N of
    their norm from the origin.
    """
    chance = 1 / math.sqrt(measured.tokens)
    return SHIFT.level(measured.mean_shift_ratio) != "good" and measured.mean_shift_ratio < 2 * chance


def _by_chance(measured: Measurements) -> str:
    return (
        f"Mean shift ratio {measured.mean_shift_ratio:.3f} is not judged: for {measured.tokens:,} rows, about "
        f"{1 / math.sqrt(measured.tokens):.3f} is expected by chance."
    )


def too_few_for_isotropy(measured: Measurements) -> bool:
    """Whether there are no more rows than dimensions, so that some directions are empty whatever the rows are."""
    return measured.tokens <= measured.hidden_size


def _flat(measured: Measurements) -> str:
    return (
        f"Isotropy {measured.isotropy:.3f} is not judged: {measured.tokens:,} rows are too few for "
        f"{measured.hidden_size:,} dimensions."
    )


def _is_too_short(measured: Measurements) -> bool:
    """Whether any directions would give rows of this length a good isotropy."""
    return math.exp(-2 * measured.largest_singular_value) >= ISOTROPY.good


def _too_short(measured: Measurements) -> str:
    return (
        f"Isotropy {measured.isotropy:.3f} is not judged: with rows this short (mean norm "
        f"{measured.mean_of_norms:.3g}), it is high whatever their directions."
    )


def note_on_rows(matrix: NDArray[np.floating[Any]], measured: Measurements, tokens: int | None = None) -> str | None:
    """Say which rows of a matrix are unused or repeated, and what the figures are without them, if that matters.

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
        (rows.zero, "all-zero"),
        (rows.repeated, "equal to an earlier row"),
        (rows.beyond, "beyond the tokenizer's last token"),
    )
    counted = ", ".join(f"{count:,} {kind}" for count, kind in kinds if count)
    said = f"{rows.unused:,} of {len(matrix):,} rows are unused or repeated: {counted}."
    if rows.used.sum() < 2:
        return f"{said} Without them, too few are left to measure."
    rest = geometry.Statistics(matrix[rows.used])
    shift, isotropy = geometry.mean_shift_ratio(rest), geometry.isotropy(rest)
    condition = geometry.inverse_condition(rest)
    before = (measured.mean_shift_ratio, measured.isotropy, measured.inverse_condition)
    if np.allclose((shift, isotropy, condition), before, rtol=NOTICEABLE, atol=NOTICEABLE / 10):
        return f"{said} Without them, the metrics are nearly the same."
    return (
        f"{said} Without them, the mean shift ratio is {shift:.3f} ({SHIFT.level(shift)}), the isotropy "
        f"{isotropy:.3f} ({ISOTROPY.level(isotropy)}) and the inverse condition {condition:.2f} %."
    )


def _published(figure: str) -> str:
    """Format the range of a metric in the paper, with either optimizer."""
    ranges = []
    for method in (OPTIMIZER_LABELS["adamw"], OPTIMIZER_LABELS["coupled_adam"]):
        values = [
            v for row in experiments.published() if row.method == method and (v := getattr(row, figure)) is not None
        ]
        ranges.append(f"{min(values):g}–{max(values):g} with {method}")
    return f"the paper reports {', '.join(ranges)}"


def _shift(measured: Measurements, value: float, level: Level) -> str:
    words = {
        "good": "the embeddings are centered on the origin",
        "fair": "the embeddings share an offset from the origin",
        "poor": "the embeddings share a large offset from the origin",
    }[level]
    cosine = measured.mean_cosine
    cosines = "" if math.isnan(cosine) else f"; the mean cosine of two rows is {cosine:z.3f}"
    return f"Mean shift ratio {value:.3f}: {words}{cosines}."


def _isotropy(measured: Measurements, value: float, level: Level) -> str:
    words = {"good": "no direction is preferred", "fair": "some directions are preferred", "poor": "anisotropic"}[level]
    if level == "good" and SHIFT.level(measured.mean_shift_ratio) != "good":
        words = (
            "high despite the shift, because isotropy is barely sensitive to embeddings this short (mean norm "
            f"{measured.mean_of_norms:.3g})"
        )
    return f"Isotropy {value:.3f}: {words}."


def _centered(measured: Measurements) -> str:
    return f"After centering, isotropy is {measured.isotropy_centered:.3f}: {_cause(measured)}."


def _cause(measured: Measurements) -> str:
    """Say whether the shift is why the isotropy is not good."""
    if measured.isotropy_centered >= ISOTROPY.good:
        return "the shift is the cause"
    if measured.isotropy_centered > measured.isotropy + WORTHWHILE:
        return "the shift is part of the cause"
    if helped_by_removal(measured):
        return "a few other directions dominate, not the shift"
    return (
        "the cause is not the shift but variance that differs between directions; isotropy shows more of it the "
        f"longer the embeddings are (mean norm {measured.mean_of_norms:.3g})"
    )


def helped_by_removal(measured: Measurements) -> bool:
    """Whether embeddings that centering leaves anisotropic gain by the removal of their first principal components."""
    centered, removed = measured.isotropy_centered, measured.isotropy_post_processed
    return not too_few_for_isotropy(measured) and centered < ISOTROPY.good and removed > centered + WORTHWHILE


def _frequency(measured: Measurements, value: float, level: Level) -> str:
    assert measured.norm_frequency is not None
    words = {"good": "hardly depends", "fair": "partly depends", "poor": "depends strongly"}[level]
    return (
        f"Rank correlation {measured.norm_frequency.spearman:+.2f} between norm and frequency: the norm of an "
        f"embedding {words} on how frequent its token is."
    )


def _similarity(measured: Measurements, value: float, level: Level) -> str:
    centered = geometry.mean_similarity(measured.word_similarity["centered"])
    after = "" if centered is None else f" ({centered:.1f} after centering)"
    covered = sum(s.covered for s in measured.word_similarity["original"])
    words = {"good": "clear", "fair": "some", "poor": "no measurable"}[level]
    return f"Word similarity {value:.1f}{after}: {words} agreement with human ratings, over {covered:,} word pairs."


SHIFT = Criterion(
    "mean_shift_ratio", 0.1, 0.4, lambda measured: measured.mean_shift_ratio, _shift, published="mean_shift_ratio"
)
ISOTROPY = Criterion(
    "isotropy",
    0.8,
    0.4,
    lambda measured: measured.isotropy,
    _isotropy,
    published="isotropy",
    remark="It depends on the length of the embeddings: compare models by it only if their mean norms are similar.",
)
FREQUENCY = Criterion(
    "norm_frequency_spearman",
    0.3,
    0.6,
    lambda measured: abs(measured.norm_frequency.spearman) if measured.norm_frequency else None,
    _frequency,
    remark="Bounds apply to its absolute value.",
)
SIMILARITY = Criterion(
    "word_similarity",
    30.0,
    10.0,
    lambda measured: measured.mean_similarity,
    _similarity,
    published="word_similarity",
)
CRITERIA = (SHIFT, ISOTROPY, FREQUENCY, SIMILARITY)
