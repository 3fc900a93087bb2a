"""How an embedding matrix depends on how often its tokens occur."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from coupled_adam.geometry.arrays import Float64, Matrix, as_matrix, pearson
from coupled_adam.geometry.statistics import Embedding, statistics_of


class Correlation(NamedTuple):
    """Two correlation coefficients of the same pairs, each in [−1, 1]; NaN where one side is constant."""

    pearson: float
    """Linear correlation."""
    spearman: float
    """Rank correlation."""


def probability(counts: ArrayLike) -> Float64:
    """Compute the unigram probabilities p_i = counts_i / Σ counts, shape (V,).

    Raises:
        ValueError: ``counts`` is not a vector of non-negative numbers with a positive sum.
    """
    c = np.asarray(counts, dtype=np.float64)
    if c.ndim != 1 or not np.isfinite(c).all() or (c < 0).any() or c.sum() == 0:
        raise ValueError("counts must be one non-negative number per token, shape (V,), and not all zero")
    return np.asarray(c / c.sum())


def log_probability(counts: ArrayLike) -> Float64:
    """Compute log(p_i + 1e-10), shape (V,). Raises ValueError as ``probability``."""
    return np.asarray(np.log(probability(counts) + 1e-10))


def norm_frequency_correlation(embedding: Embedding, counts: ArrayLike) -> Correlation:
    """Correlate the norms ‖e_i‖ with the log frequencies log(p_i + 1e-10).

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists.
        counts: how often each token occurs in the training data, (V,), as counts or probabilities.

    Returns:
        Pearson and Spearman correlation.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or counts that are negative or all zero.

    Source: Coupled Adam, arXiv 2502.08441, section 4.2.

    Examples:
        >>> norm_frequency_correlation([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], counts=[10, 100, 1000]).spearman
        1.0
    """
    return _correlation(statistics_of(embedding).norms, log_probability(counts))


def projection_frequency_correlation(embedding: Embedding, counts: ArrayLike) -> Correlation:
    """Correlate the projections e_i·μ with log(p_i + 1e-10): does the mean direction separate frequent and rare tokens?

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists.
        counts: how often each token occurs in the training data, (V,), as counts or probabilities.

    Returns:
        Pearson and Spearman correlation.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or counts that are negative or all zero.

    Source: Coupled Adam, arXiv 2502.08441, section 4.2.

    Examples:
        >>> projection_frequency_correlation([[1.0, 1.0], [2.0, -1.0], [3.0, 0.0]], counts=[10, 100, 1000]).spearman
        1.0
    """
    return _correlation(statistics_of(embedding).projections, log_probability(counts))


def second_moment_frequency_fit(second_moment: Matrix, counts: ArrayLike) -> float:
    """Compute R² of the fit v_i = a·p_i through the origin; v_i is the mean over H of Adam's second moment of token i.

    Args:
        second_moment: Adam's elementwise second moment, (V, H), an array or tensor of any dtype.
        counts: how often each token occurs in the training data, (V,), as counts or probabilities.

    Returns:
        1 − Σ(v_i − a·p_i)² / Σ(v_i − v̄)², at most 1, and negative where v̄ alone fits better; NaN for a constant v.
        The paper reports 0.85 to 0.91 at 125M parameters and 20B tokens.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or counts that are negative or all zero.

    Source: Coupled Adam, arXiv 2502.08441, section 3.

    Examples:
        >>> second_moment_frequency_fit([[1.0, 3.0], [2.0, 6.0], [4.0, 4.0]], counts=[1, 2, 2])
        1.0
    """
    v, p = as_matrix(second_moment).mean(1), probability(counts)
    _same_length(v, p)
    slope = (v @ p) / (p @ p)
    spread = np.square(v - v.mean()).sum()
    return float(1 - np.square(v - slope * p).sum() / spread) if spread > 0 else float("nan")


def _correlation(values: Float64, log_p: Float64) -> Correlation:
    _same_length(values, log_p)
    from scipy.stats import rankdata  # takes longer to import than a small matrix to measure

    return Correlation(pearson(values, log_p), pearson(rankdata(values), rankdata(log_p)))


def _same_length(values: Float64, frequencies: Float64) -> None:
    if values.shape != frequencies.shape:
        raise ValueError(f"the matrix has {len(values)} rows, but there are {len(frequencies)} counts")
