"""Everything that is measured of an embedding matrix, at once."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from coupled_adam.geometry import frequency, metrics, post_processing
from coupled_adam.geometry.arrays import Float64, RowMap
from coupled_adam.geometry.partition import ratio_of_extremes
from coupled_adam.geometry.statistics import Embedding, Statistics, statistics_of
from coupled_adam.geometry.word_similarity import Benchmark, WordSimilarity, mean_similarity, word_similarity

T = TypeVar("T")

#: Of a measurement, those that take long.
PARTS = 5


@dataclass(frozen=True)
class Measurements:
    """The metrics of a (V, H) embedding matrix; NaN or None where one is not defined or its data were not given.

    The functions of ``coupled_adam.geometry`` of the same names say what each metric is, its unit and its range.
    """

    tokens: int
    """V, the number of rows."""
    hidden_size: int
    """H, the number of columns."""
    isotropy: float
    """Isotropy of E, in (0, 1]."""
    isotropy_centered: float
    """Isotropy of E − μ."""
    isotropy_post_processed: float
    """Isotropy of E without its mean and its first ⌈H/100⌉ principal components (All-but-the-Top)."""
    mean_of_norms: float
    """mean_i ‖e_i‖, in units of the embedding."""
    norm_of_mean: float
    """‖μ‖, in units of the embedding."""
    mean_shift_ratio: float
    """‖μ‖ / mean_i ‖e_i‖, in [0, 1]."""
    mean_cosine: float
    """Mean cosine similarity of two different rows, in [−1, 1]."""
    smallest_singular_value: float
    """S_min, in units of the embedding."""
    largest_singular_value: float
    """S_max, in units of the embedding."""
    inverse_condition: float
    """100·S_min/S_max, in percent."""
    logit_bound_ratio: float
    """Bound on the logits along μ after centering, over that before."""
    norm_frequency: frequency.Correlation | None
    """Correlation of ‖e_i‖ with log frequency; None without counts."""
    projection_frequency: frequency.Correlation | None
    """Correlation of e_i·μ with log frequency; None without counts."""
    word_similarity: dict[str, list[WordSimilarity]]
    """By post-processing, one entry per benchmark; empty without a way to look words up."""
    singular_values: Float64 = field(repr=False)
    """All singular values, (min(V, H),), largest first."""
    zero_rows: int
    """How many rows are exactly zero; these are usually unused tokens."""

    @property
    def mean_similarity(self) -> float | None:
        """r̄ of the unprocessed matrix, by cosine; None if no benchmark has a result."""
        return mean_similarity(self.word_similarity.get("original", []))


def measure(
    embedding: Embedding,
    *,
    counts: ArrayLike | None = None,
    token_of: Callable[[str], int | None] | None = None,
    benchmarks: Sequence[Benchmark] = (),
    show: Callable[[int], None] | None = None,
) -> Measurements:
    """Measure an embedding matrix: all metrics at once, with shared work done once.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists. One copy of it is made, in
            float64 on the CPU.
        counts: how often each token occurs in the training data, (V,); needed for the correlations with frequency.
        token_of: returns the row of a word, or None for a word that is not a single token; needed for word similarity.
        benchmarks: of word similarity, for instance those of ``coupled_adam.geometry.published_benchmarks``.
        show: called after each of the five slow parts with the number of parts done.

    Returns:
        The metrics.

    Raises:
        ValueError: E is not a finite matrix with two rows or more, or the counts do not fit it.

    Examples:
        >>> shifted = np.random.default_rng(0).normal(size=(1000, 16)) + 2
        >>> round(measure(shifted).mean_shift_ratio, 1)
        0.9
    """
    statistics, done = statistics_of(embedding), itertools.count(1)
    height, width = statistics.shape

    def finished(part: T) -> T:
        if show is not None:
            show(next(done))
        return part

    finished(statistics.scatter)
    values = finished(metrics.singular_values(statistics))
    top = finished(statistics.components(post_processing.WORD_SIMILARITY_COMPONENTS))
    isotropy = finished(metrics.isotropy(statistics))
    # Without its first principal components, E − μ has the same eigenvectors. Along those, all its rows are zero.
    removed = post_processing.isotropy_components(width)
    log_z = finished(statistics.log_partition(statistics.principal[1], slice(None), slice(-removed), centered=True))
    similarity = {}
    if token_of is not None and benchmarks:
        variants = post_processing.variants(statistics, top)
        similarity = _word_similarity(statistics.matrix, variants, token_of, benchmarks)
    return Measurements(
        tokens=height,
        hidden_size=width,
        isotropy=isotropy,
        isotropy_centered=ratio_of_extremes(log_z),
        isotropy_post_processed=ratio_of_extremes(np.append(log_z[:-removed], np.log(height))),
        mean_of_norms=metrics.mean_of_norms(statistics),
        norm_of_mean=metrics.norm_of_mean(statistics),
        mean_shift_ratio=metrics.mean_shift_ratio(statistics),
        mean_cosine=metrics.mean_cosine(statistics),
        smallest_singular_value=float(values[-1]),
        largest_singular_value=float(values[0]),
        inverse_condition=metrics.inverse_condition_of(values),
        logit_bound_ratio=metrics.logit_bound_ratio(statistics),
        norm_frequency=None if counts is None else frequency.norm_frequency_correlation(statistics, counts),
        projection_frequency=None if counts is None else frequency.projection_frequency_correlation(statistics, counts),
        word_similarity=similarity,
        singular_values=values,
        zero_rows=statistics.zero_rows,
    )


def _word_similarity(
    e: Float64,
    variants: dict[str, RowMap],
    token_of: Callable[[str], int | None],
    benchmarks: Sequence[Benchmark],
) -> dict[str, list[WordSimilarity]]:
    """Measure by post-processing, made of the rows of the benchmarks' words alone."""
    words = {word for benchmark in benchmarks for pair in benchmark.pairs for word in pair[:2]}
    tokens = {word: token for word in words if (token := token_of(word)) is not None}
    used = sorted({0, 1, *tokens.values()})  # a matrix has two rows or more
    place = dict(zip(tokens, np.searchsorted(used, list(tokens.values())).tolist(), strict=True))
    rows = e[used]
    similarity = {}
    for name, row_map in variants.items():
        made = Statistics(row_map(rows))
        similarity[name] = [word_similarity(made, place.get, benchmark) for benchmark in benchmarks]
    return similarity
