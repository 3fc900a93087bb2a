"""Everything that is measured of an embedding matrix, at once."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from coupled_adam.geometry import frequency, metrics, post_processing
from coupled_adam.geometry.arrays import Float64, Matrix, RowMap, as_matrix
from coupled_adam.geometry.word_similarity import Benchmark, WordSimilarity, mean_similarity, word_similarity

T = TypeVar("T")

#: Of a measurement, those that take long.
PARTS = 5


@dataclass(frozen=True)
class Measurements:
    """The figures of a (V, H) embedding matrix; NaN or None where one is not defined or its data were not given."""

    tokens: int
    hidden_size: int
    isotropy: float
    isotropy_centered: float
    """Of E − μ."""
    isotropy_post_processed: float
    """Of E without its mean and its first ⌈H/100⌉ principal components (All-but-the-Top)."""
    mean_of_norms: float
    norm_of_mean: float
    mean_shift_ratio: float
    mean_cosine: float
    """Of two different rows."""
    smallest_singular_value: float
    largest_singular_value: float
    inverse_condition: float
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
        """r̄ of the matrix as it is, by cosine; None if no benchmark gives a figure."""
        return mean_similarity(self.word_similarity.get("original", []))


def measure(
    embedding: Matrix,
    *,
    counts: ArrayLike | None = None,
    token_of: Callable[[str], int | None] | None = None,
    benchmarks: Sequence[Benchmark] = (),
    show: Callable[[int], None] | None = None,
) -> Measurements:
    """Measure a (V, H) embedding matrix.

    Args:
        embedding: array or tensor of any dtype; worked on in float64, with one copy of it in that.
        counts: how often each token occurs in the training data, (V,), for the correlations with frequency.
        token_of: the row of a word, None for a word that is not one token; for word similarity.
        benchmarks: for instance ``coupled_adam.geometry.published_benchmarks``.
        show: told how many of the ``PARTS`` that take long are done.

    Raises:
        ValueError: not a finite matrix with two rows or more, or counts that do not fit it.

    >>> import numpy as np
    >>> shifted = np.random.default_rng(0).normal(size=(1000, 16)) + 2
    >>> round(measure(shifted).mean_shift_ratio, 1)
    0.9
    """
    e, done = as_matrix(embedding), itertools.count(1)

    def finished(part: T) -> T:
        if show is not None:
            show(next(done))
        return part

    values = finished(metrics.singular_values(e))
    for_isotropy, for_words = (
        post_processing.isotropy_components(e.shape[1]),
        post_processing.WORD_SIMILARITY_COMPONENTS,
    )
    top = finished(post_processing.principal_components(e, max(for_isotropy, for_words)))
    variants = post_processing.variants(e, top[:, :for_words])
    similarity = {}
    if token_of is not None and benchmarks:
        similarity = _word_similarity(e, variants, token_of, benchmarks)
    return Measurements(
        tokens=len(e),
        hidden_size=e.shape[1],
        isotropy=finished(metrics.isotropy(e)),
        isotropy_centered=finished(metrics.isotropy(e, variants["centered"])),
        isotropy_post_processed=finished(
            metrics.isotropy(e, post_processing.all_but_the_top(e, top[:, :for_isotropy]))
        ),
        mean_of_norms=metrics.mean_of_norms(e),
        norm_of_mean=metrics.norm_of_mean(e),
        mean_shift_ratio=metrics.mean_shift_ratio(e),
        mean_cosine=metrics.mean_cosine(e),
        smallest_singular_value=float(values[-1]),
        largest_singular_value=float(values[0]),
        inverse_condition=metrics.inverse_condition_of(values),
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
    """Measure by post-processing, made of the rows of the benchmarks' words alone."""
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
