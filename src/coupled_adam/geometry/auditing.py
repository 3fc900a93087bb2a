"""Everything that is measured of an embedding matrix, and what it means in words."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from coupled_adam.geometry import frequency, metrics, post_processing
from coupled_adam.geometry.arrays import Float64, Matrix, RowMap, as_matrix
from coupled_adam.geometry.word_similarity import Benchmark, WordSimilarity, mean_similarity, word_similarity

Level = Literal["good", "fair", "poor"]


@dataclass(frozen=True)
class Finding:
    """A figure judged."""

    level: Level
    text: str
    """A sentence with the figure and the threshold it was held against."""


@dataclass(frozen=True)
class Audit:
    """The figures of a (V, H) embedding matrix; NaN or None where one is not defined or its data were not given."""

    tokens: int
    width: int
    isotropy: float
    isotropy_centered: float
    """Of E − μ."""
    isotropy_post_processed: float
    """Of E without its mean and its first ⌈H/100⌉ principal components (All-but-the-Top)."""
    average_norm: float
    mean_norm: float
    mean_shift_ratio: float
    smallest_singular_value: float
    largest_singular_value: float
    condition: float
    logit_bound_ratio: float
    norm_frequency: frequency.Correlation | None
    projection_frequency: frequency.Correlation | None
    word_similarity: dict[str, list[WordSimilarity]]
    """By post-processing, then a benchmark each; empty without a way to look words up."""
    singular_values: Float64
    """(min(V, H),), largest first."""
    zero_rows: int
    """Rows that are exactly zero: unused tokens, as a rule."""

    @property
    def mean_similarity(self) -> float | None:
        """r̄ of the matrix as it is, by cosine."""
        return mean_similarity(self.word_similarity.get("original", []))

    @property
    def findings(self) -> list[Finding]:
        """The verdict, most important first."""
        return _findings(self)


def audit(
    embedding: Matrix,
    *,
    counts: ArrayLike | None = None,
    token_of: Callable[[str], int | None] | None = None,
    benchmarks: Sequence[Benchmark] = (),
) -> Audit:
    """Measure a (V, H) embedding matrix.

    Args:
        embedding: array or tensor of any dtype; worked on in float64, with one copy of it in that.
        counts: how often each token occurs in the training data, (V,), for the correlations with frequency.
        token_of: the row of a word, None for a word that is not one token; for word similarity.
        benchmarks: for instance :func:`coupled_adam.geometry.published_benchmarks`.

    Raises:
        ValueError: not a finite matrix with two rows or more, or counts that do not fit it.

    >>> import numpy as np
    >>> shifted = np.random.default_rng(0).normal(size=(1000, 16)) + 2
    >>> round(audit(shifted).mean_shift_ratio, 1)
    0.9
    """
    e = as_matrix(embedding)
    values = metrics.singular_values(e)
    for_isotropy, for_words = (
        post_processing.isotropy_components(e.shape[1]),
        post_processing.WORD_SIMILARITY_COMPONENTS,
    )
    top = post_processing.principal_components(e, max(for_isotropy, for_words))
    variants = post_processing.variants(e, top[:, :for_words])
    similarity = {}
    if token_of is not None and benchmarks:
        similarity = _word_similarity(e, variants, token_of, benchmarks)
    return Audit(
        tokens=len(e),
        width=e.shape[1],
        isotropy=metrics.isotropy(e),
        isotropy_centered=metrics.isotropy(e, variants["centered"]),
        isotropy_post_processed=metrics.isotropy(e, post_processing.all_but_the_top(e, top[:, :for_isotropy])),
        average_norm=metrics.average_norm(e),
        mean_norm=metrics.mean_norm(e),
        mean_shift_ratio=metrics.mean_shift_ratio(e),
        smallest_singular_value=float(values[-1]),
        largest_singular_value=float(values[0]),
        condition=float(100 * values[-1] / values[0]) if values[0] > 0 else math.nan,
        logit_bound_ratio=metrics.logit_bound_ratio(e),
        norm_frequency=None if counts is None else frequency.norm_frequency_correlation(e, counts),
        projection_frequency=None if counts is None else frequency.projection_frequency_correlation(e, counts),
        word_similarity=similarity,
        singular_values=values,
        zero_rows=int((~np.any(e, axis=1)).sum()),
    )


def _word_similarity(
    e: Float64,
    variants: dict[str, RowMap],
    token_of: Callable[[str], int | None],
    benchmarks: Sequence[Benchmark],
) -> dict[str, list[WordSimilarity]]:
    """By post-processing; made of the rows of the benchmarks' words alone."""
    words = {word for benchmark in benchmarks for pair in benchmark.pairs for word in pair[:2]}
    tokens = {word: token for word in words if (token := token_of(word)) is not None}
    used = sorted({0, 1, *tokens.values()})  # a matrix has two rows or more
    place = dict(zip(tokens, np.searchsorted(used, list(tokens.values())).tolist(), strict=True))
    rows = e[used]
    similarity = {}
    for name, row_map in variants.items():
        made = row_map(rows)
        similarity[name] = [word_similarity(made, place.get, benchmark) for benchmark in benchmarks]
    return similarity


#: Bounds between good and fair, and between fair and poor. The paper's embeddings at 125M to 760M parameters and 20B
#: tokens (arXiv 2502.08441) lie well within "poor" with AdamW and "good" with Coupled Adam.
SHIFT_BOUNDS = (0.1, 0.4)
ISOTROPY_BOUNDS = (0.8, 0.4)
FREQUENCY_BOUNDS = (0.3, 0.6)
SIMILARITY_BOUNDS = (30.0, 10.0)


def _findings(figures: Audit) -> list[Finding]:
    found = []
    shift = figures.mean_shift_ratio
    if not math.isnan(shift):
        level = _level(shift, SHIFT_BOUNDS)
        words = {
            "good": "the embeddings are centred on the origin",
            "fair": "the embeddings are shifted off the origin",
            "poor": "most of an average embedding is a shift that all tokens share",
        }[level]
        found.append(
            Finding(
                level,
                f"Mean shift ratio {shift:.3f}: {words} (below {SHIFT_BOUNDS[0]:g} counts as centred, above "
                f"{SHIFT_BOUNDS[1]:g} as strongly shifted; the paper has 0.73–0.82 with AdamW, 0.01–0.03 with Coupled "
                "Adam).",
            )
        )
    level = _level(-figures.isotropy, (-ISOTROPY_BOUNDS[0], -ISOTROPY_BOUNDS[1]))
    words = {"good": "no direction is preferred", "fair": "some directions are preferred", "poor": "anisotropic"}[level]
    found.append(
        Finding(
            level,
            f"Isotropy {figures.isotropy:.3f}: {words} (above {ISOTROPY_BOUNDS[0]:g} counts as isotropic, below "
            f"{ISOTROPY_BOUNDS[1]:g} as anisotropic; the paper has 0.10–0.28 with AdamW, 0.83–0.95 with Coupled Adam). "
            f"It depends on the scale: the average norm here is {figures.average_norm:.3g}.",
        )
    )
    if level != "good":
        centred = figures.isotropy_centered
        cause = (
            "the shift is what makes it so"
            if centred >= ISOTROPY_BOUNDS[0]
            else "the shift is a part of it"
            if centred > figures.isotropy + 0.1
            else "the shift is not what makes it so; directions across it dominate"
        )
        found.append(Finding("fair", f"Centred, the isotropy is {centred:.3f}: {cause}."))
    if figures.norm_frequency is not None and not math.isnan(figures.norm_frequency.spearman):
        by_rank = figures.norm_frequency.spearman
        level = _level(abs(by_rank), FREQUENCY_BOUNDS)
        words = {"good": "hardly", "fair": "partly", "poor": "strongly"}[level]
        found.append(
            Finding(
                level,
                f"Norm and log frequency correlate by rank with {by_rank:+.2f}: the length of an embedding {words} "
                f"tells how frequent its token is (bounds {FREQUENCY_BOUNDS[0]:g} and {FREQUENCY_BOUNDS[1]:g}).",
            )
        )
    plain, processed = figures.mean_similarity, mean_similarity(figures.word_similarity.get("centered", []))
    if plain is not None and processed is not None:
        covered = sum(s.covered for s in figures.word_similarity["original"])
        found.append(
            Finding(
                _level(-plain, (-SIMILARITY_BOUNDS[0], -SIMILARITY_BOUNDS[1])),
                f"Word similarity {plain:.1f}, centred {processed:.1f} (100·correlation with human ratings over "
                f"{covered:,} pairs; above {SIMILARITY_BOUNDS[0]:g} counts as good, below {SIMILARITY_BOUNDS[1]:g} as "
                "none; the paper has 3–5 with AdamW, 57–58 with Coupled Adam).",
            )
        )
    return found


def _level(value: float, bounds: tuple[float, float]) -> Level:
    return "good" if value <= bounds[0] else "fair" if value <= bounds[1] else "poor"
