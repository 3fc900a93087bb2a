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
    """What is followed while a (V, H) matrix is trained, by name; None where a figure is not defined.

    ``word_similarity_pairs`` is the number of pairs, over all benchmarks, that could be looked up.
    """
    e = as_matrix(embedding)
    correlation = geometry.norm_frequency_correlation(e, unigram_counts)
    similarities = [geometry.word_similarity(e, token_of, benchmark) for benchmark in benchmarks]
    return _defined(
        {
            "isotropy": geometry.isotropy(e),
            "mean_norm": geometry.mean_norm(e),
            "mean_shift_ratio": geometry.mean_shift_ratio(e),
            "condition": geometry.condition(e),
            "norm_frequency_pearson": correlation.pearson,
            "norm_frequency_spearman": correlation.spearman,
            "word_similarity": geometry.mean_similarity(similarities),
            "word_similarity_pairs": sum(s.covered for s in similarities),
        }
    )


def audit_figures(audit: geometry.Audit) -> Figures:
    """The numbers of an audit by name, those of :func:`embedding_figures` among them; None where not defined."""
    plain = audit.word_similarity.get("original", [])
    figures: Figures = {
        "tokens": audit.tokens,
        "width": audit.width,
        "isotropy": audit.isotropy,
        "isotropy_centered": audit.isotropy_centered,
        "isotropy_post_processed": audit.isotropy_post_processed,
        "average_norm": audit.average_norm,
        "mean_norm": audit.mean_norm,
        "mean_shift_ratio": audit.mean_shift_ratio,
        "smallest_singular_value": audit.smallest_singular_value,
        "largest_singular_value": audit.largest_singular_value,
        "condition": audit.condition,
        "logit_bound_ratio": audit.logit_bound_ratio,
        "zero_rows": audit.zero_rows,
        "word_similarity": audit.mean_similarity,
        "word_similarity_dot": _mean([s.dot for s in plain if s.dot is not None]),
        "word_similarity_pairs": sum(s.covered for s in plain) if plain else None,
    }
    for name, correlation in (("norm", audit.norm_frequency), ("projection", audit.projection_frequency)):
        figures[f"{name}_frequency_pearson"] = correlation.pearson if correlation else None
        figures[f"{name}_frequency_spearman"] = correlation.spearman if correlation else None
    return _defined(figures)


def audit_json(audit: geometry.Audit) -> dict[str, Any]:
    """All of an audit as plain values: figures, word similarity by post-processing, spectrum, verdict."""
    return {
        "figures": audit_figures(audit),
        "word_similarity": {name: [asdict(s) for s in rows] for name, rows in audit.word_similarity.items()},
        "singular_values": [float(f"{value:.6g}") for value in audit.singular_values],
        "findings": [asdict(finding) for finding in audit.findings],
    }


def word_similarity_figures(
    embedding: Matrix, token_of: Callable[[str], int | None], benchmarks: Sequence[geometry.Benchmark]
) -> list[dict[str, Any]]:
    """One object a benchmark: its name, the correlations, and how many of its pairs could be looked up."""
    return [asdict(geometry.word_similarity(embedding, token_of, benchmark)) for benchmark in benchmarks]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _defined(figures: Figures) -> Figures:
    return {name: None if value is None or math.isnan(value) else value for name, value in figures.items()}
