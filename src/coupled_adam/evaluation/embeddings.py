"""The quality of a model's embeddings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from numpy.typing import ArrayLike

from coupled_adam import geometry
from coupled_adam.geometry.arrays import Matrix, as_matrix

Figures = dict[str, float | None]


def embedding_figures(
    embedding: Matrix,
    unigram_counts: ArrayLike,
    token_of: Callable[[str], int | None],
    benchmarks: Sequence[geometry.Benchmark],
) -> Figures:
    """The figures of the papers for a (V, H) matrix, by name; None where one is not defined.

    ``word_similarity_pairs`` is the number of pairs, over all benchmarks, that could be looked up.
    """
    e = as_matrix(embedding)
    correlation = geometry.norm_frequency_correlation(e, unigram_counts)
    similarities = [geometry.word_similarity(e, token_of, benchmark) for benchmark in benchmarks]
    figures: Figures = {
        "isotropy": geometry.isotropy(e),
        "mean_norm": geometry.mean_norm(e),
        "mean_shift_ratio": geometry.mean_shift_ratio(e),
        "condition": geometry.condition(e),
        "norm_frequency_pearson": correlation.pearson,
        "norm_frequency_spearman": correlation.spearman,
        "word_similarity": geometry.mean_similarity(similarities),
        "word_similarity_pairs": sum(s.covered for s in similarities),
    }
    return {name: None if value is None or math.isnan(value) else value for name, value in figures.items()}


def word_similarity_figures(
    embedding: Matrix, token_of: Callable[[str], int | None], benchmarks: Sequence[geometry.Benchmark]
) -> list[dict[str, Any]]:
    """One object a benchmark: its name, the correlations, and how many of its pairs could be looked up."""
    return [asdict(geometry.word_similarity(embedding, token_of, benchmark)) for benchmark in benchmarks]
