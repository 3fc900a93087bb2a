"""Figures of an embedding matrix by name, as they go into metrics.jsonl and the files of an evaluation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from coupled_adam import geometry
from coupled_adam.errors import InputError
from coupled_adam.figures import Figures
from coupled_adam.geometry.arrays import Matrix


def read_benchmarks(directory: Path | None) -> tuple[geometry.Benchmark, ...]:
    """Read the word-similarity benchmarks in ``directory``, or those that come with packages. Raises InputError."""
    if directory is None:
        return geometry.published_benchmarks()
    try:
        return geometry.read_benchmarks(directory)
    except ValueError as error:
        raise InputError(str(error)) from None


def figures_while_training(
    embedding: Matrix,
    unigram_counts: ArrayLike,
    token_of: Callable[[str], int | None],
    benchmarks: Sequence[geometry.Benchmark],
) -> Figures:
    """Measure what is followed while a (V, H) matrix is trained, beside its health; None where a figure is not defined.

    ``word_similarity_pairs`` is the number of pairs, over all benchmarks, that could be looked up.
    """
    statistics = geometry.Statistics(embedding)
    correlation = geometry.norm_frequency_correlation(statistics, unigram_counts)
    similarities = [geometry.word_similarity(statistics, token_of, benchmark) for benchmark in benchmarks]
    return defined(
        {
            "norm_frequency_pearson": correlation.pearson,
            "norm_frequency_spearman": correlation.spearman,
            "word_similarity": geometry.mean_similarity(similarities),
            "word_similarity_pairs": sum(s.covered for s in similarities),
        }
    )


def figures_of(measured: geometry.Measurements) -> Figures:
    """Return the numbers of a measurement by name."""
    plain = measured.word_similarity.get("original", [])
    dots = [s.dot for s in plain if s.dot is not None]
    figures: Figures = {
        "tokens": measured.tokens,
        "hidden_size": measured.hidden_size,
        "isotropy": measured.isotropy,
        "isotropy_centered": measured.isotropy_centered,
        "isotropy_post_processed": measured.isotropy_post_processed,
        "mean_of_norms": measured.mean_of_norms,
        "norm_of_mean": measured.norm_of_mean,
        "mean_shift_ratio": measured.mean_shift_ratio,
        "mean_cosine": measured.mean_cosine,
        "smallest_singular_value": measured.smallest_singular_value,
        "largest_singular_value": measured.largest_singular_value,
        "inverse_condition": measured.inverse_condition,
        "logit_bound_ratio": measured.logit_bound_ratio,
        "zero_rows": measured.zero_rows,
        "word_similarity": measured.mean_similarity,
        "word_similarity_dot": sum(dots) / len(dots) if dots else None,
        "word_similarity_centered": _mean(measured, "centered"),
        "word_similarity_post_processed": _mean(measured, "post_process"),
        "word_similarity_pairs": sum(s.covered for s in plain) if plain else None,
    }
    for name, correlation in (("norm", measured.norm_frequency), ("projection", measured.projection_frequency)):
        figures[f"{name}_frequency_pearson"] = correlation.pearson if correlation else None
        figures[f"{name}_frequency_spearman"] = correlation.spearman if correlation else None
    return defined(figures)


def _mean(measured: geometry.Measurements, processing: str) -> float | None:
    rows = measured.word_similarity.get(processing)
    return geometry.mean_similarity(rows) if rows else None


def as_json(measured: geometry.Measurements) -> dict[str, Any]:
    """Return all of a measurement as plain values: figures, word similarity by post-processing, spectrum."""
    return {
        "figures": figures_of(measured),
        "word_similarity": {name: [asdict(s) for s in rows] for name, rows in measured.word_similarity.items()},
        "singular_values": [float(f"{value:.6g}") for value in measured.singular_values],
    }


def defined(figures: Figures) -> Figures:
    """Put None where a figure is NaN."""
    return {name: None if value is None or math.isnan(value) else value for name, value in figures.items()}
