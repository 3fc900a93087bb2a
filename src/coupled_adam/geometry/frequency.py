"""How an embedding matrix depends on how often its tokens occur."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from coupled_adam.geometry.arrays import Float64, Matrix, as_matrix


class Correlation(NamedTuple):
    """Two correlation coefficients of the same pairs, each in [−1, 1]; NaN where one side is constant."""

    pearson: float
    spearman: float


def log_probability(counts: ArrayLike) -> Float64:
    """log(p_i + 1e-10) of the unigram probabilities p_i = counts_i / Σ counts, shape (V,).

    Raises:
        ValueError: ``counts`` is not a vector of non-negative numbers with a positive sum.
    """
    c = np.asarray(counts, dtype=np.float64)
    if c.ndim != 1 or not np.isfinite(c).all() or (c < 0).any() or c.sum() == 0:
        raise ValueError("counts must be one non-negative number a token, (V,), and not all zero")
    return np.asarray(np.log(c / c.sum() + 1e-10))


def norm_frequency_correlation(embedding: Matrix, counts: ArrayLike) -> Correlation:
    """Correlation of ‖e_i‖ with log(p_i + 1e-10).

    Args:
        embedding: (V, H).
        counts: how often each token occurs in the training data, (V,); probabilities will do.

    Source: Coupled Adam, arXiv 2502.08441, section 4.2.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or counts that are all zero.
    """
    norms, log_p = np.linalg.norm(as_matrix(embedding), axis=1), log_probability(counts)
    if norms.shape != log_p.shape:
        raise ValueError(f"the embedding has {len(norms)} rows, but there are {len(log_p)} counts")
    if np.ptp(norms) == 0 or np.ptp(log_p) == 0:
        return Correlation(float("nan"), float("nan"))
    return Correlation(float(stats.pearsonr(norms, log_p)[0]), float(stats.spearmanr(norms, log_p)[0]))
