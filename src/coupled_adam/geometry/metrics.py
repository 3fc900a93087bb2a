"""Isotropy, mean shift and spectrum of an embedding matrix E of shape (V, H) with rows e_i; μ is their mean.

Every function takes a numpy array, a tensor of any dtype or device, nested lists, or ``Statistics`` of one of them, and
works in float64.
"""

import numpy as np

from coupled_adam.geometry.arrays import Float64, RowMap
from coupled_adam.geometry.partition import ratio_of_extremes
from coupled_adam.geometry.statistics import Embedding, Statistics, statistics_of


def isotropy(embedding: Embedding, row_map: RowMap | None = None) -> float:
    """Compute the isotropy min_c Z(c) / max_c Z(c) with Z(c) = Σ_i exp(e_i·c), over the unit eigenvectors c of EᵀE.

    Of a large matrix, exponents are first computed in float32. They say which directions may have the least or the
    greatest Z, and those are computed in float64: so the result has the digits of float64.

    It depends on the scale of E: when you compare models whose embeddings differ in norm, say so. The sign of an
    eigenvector is arbitrary; here its component of largest magnitude is positive, which makes the result reproducible.

    Source: Arora et al. 2016, "A latent variable model approach to PMI-based word embeddings"; Mu & Viswanath 2018,
    "All-but-the-Top", eq. 5; used by Biś et al. 2021 and by Coupled Adam, arXiv 2502.08441, section 4.2.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.
        row_map: applied to the rows of E first, for instance one of ``coupled_adam.geometry.post_processing``.

    Returns:
        Isotropy in (0, 1], without unit; 1 where no direction is preferred.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Examples:
        >>> round(isotropy([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 6)
        1.0
    """
    statistics = statistics_of(embedding)
    if row_map is not None:
        statistics = Statistics(statistics.matrix, row_map)
    return ratio_of_extremes(statistics.log_partition(statistics.spectrum[1]))


def norm_of_mean(embedding: Embedding) -> float:
    """Compute ‖μ‖, the norm of the mean embedding.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        A length in units of the embedding, 0 or above.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Source: Coupled Adam, arXiv 2502.08441, section 4.2.

    Examples:
        >>> norm_of_mean([[3.0, 0.0], [3.0, 8.0]])
        5.0
    """
    statistics = statistics_of(embedding)
    return float(np.linalg.norm(statistics.mean)) * statistics.scale


def mean_of_norms(embedding: Embedding) -> float:
    """Compute mean_i ‖e_i‖, the mean of the embeddings' norms.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        A length in units of the embedding, 0 or above.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Examples:
        >>> mean_of_norms([[3.0, 4.0], [0.0, 1.0]])
        3.0
    """
    statistics = statistics_of(embedding)
    return float(statistics.norms.mean()) * statistics.scale


def mean_shift_ratio(embedding: Embedding) -> float:
    """Compute the mean shift ratio ‖μ‖ / mean_i ‖e_i‖: how much of an average embedding is shared by all of them.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        A ratio in [0, 1]; 0 for a cloud centered on the origin, 1 where all rows are equal, NaN for a matrix of zeros.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Source: Coupled Adam, arXiv 2502.08441, section 4.2.

    Examples:
        >>> mean_shift_ratio([[1.0, 1.0], [1.0, -1.0]])  # the mean is (1, 0), the norms are √2
        0.7071067811865475
    """
    statistics = statistics_of(embedding)
    length = float(statistics.norms.mean())
    return float(np.linalg.norm(statistics.mean)) / length if length > 0 else float("nan")


def mean_cosine(embedding: Embedding) -> float:
    """Compute the mean cosine similarity of two different rows, over all pairs.

    Rows of zeros have no direction and are left out.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        A cosine in [−1, 1]; 0 for evenly spread directions, 1 where all rows point the same way, NaN with fewer than
        two rows that are not zero.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Source: the anisotropy of Ethayarajh 2019, "How contextual are contextualized word representations?",
    arXiv 1909.00512, which estimates it from a sample of pairs.

    Examples:
        >>> mean_cosine([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])  # the cosines are 0, 1 and 0
        0.3333333333333333
    """
    statistics = statistics_of(embedding)
    total, count = statistics.sum_of_directions, int((statistics.norms > 0).sum())
    if count < 2:
        return float("nan")
    # ‖Σ_i u_i‖² is the sum over all pairs, with the n pairs of a row and itself.
    return float(np.clip((total @ total - count) / (count * (count - 1)), -1, 1))


def singular_values(embedding: Embedding) -> Float64:
    """Compute the singular values of E.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        The min(V, H) singular values, float64, largest first, in units of the embedding; relative errors are below
        1e-6.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Examples:
        >>> singular_values([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]).tolist()
        [3.0, 2.0]
    """
    statistics = statistics_of(embedding)
    return np.asarray(statistics.singular_values * statistics.scale)


def inverse_condition(embedding: Embedding) -> float:
    """Compute 100·S_min/S_max of the singular values: the inverse of the condition number, so higher is better.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        Percent, in [0, 100]; NaN for a matrix of zeros.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Source: Coupled Adam, arXiv 2502.08441, section 4.2.

    Examples:
        >>> inverse_condition([[1.0, 0.0], [0.0, 4.0]])
        25.0
    """
    return inverse_condition_of(singular_values(embedding))


def inverse_condition_of(values: Float64) -> float:
    """The same from singular values, largest first."""
    return float(100 * (values[-1] / values[0])) if values[0] > 0 else float("nan")


def principal_share(embedding: Embedding) -> float:
    """Compute the share of the first principal component in the variance around the mean, λ_1/Σλ of (E − μ)ᵀ(E − μ).

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        A share in [1/H, 1]; 1 where all embeddings lie on a line, 1/H for a round cloud, NaN where all are equal.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Examples:
        >>> principal_share([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        0.8
    """
    statistics = statistics_of(embedding)
    return principal_share_of(statistics.principal[0], float(np.trace(statistics.squares)))


def principal_share_of(values: Float64, squares: float, rounding: float = 1e-12) -> float:
    """The same from the eigenvalues, ascending, and Σ_i ‖e_i‖², of which they may be what rounding left.

    ``rounding`` is how far the mean may be off, relatively.
    """
    total = float(values.sum())
    return float(values[-1]) / total if total > rounding**2 * squares else float("nan")


def logit_bound_ratio(embedding: Embedding) -> float:
    """Compute by which factor centering the output embedding tightens the bound on the logits along μ.

    It is max(B₋, B₊) / max(B₋ − ‖μ‖², B₊ + ‖μ‖²) with B₊ = max_i e_i·μ − ‖μ‖² and B₋ = ‖μ‖² − min_i e_i·μ: the largest
    |e_i·μ| after centering over that before.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        A ratio of 0 or above. Well below 1, centering helps; NaN for μ = 0.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Source: "Output Embedding Centering", arXiv 2601.02031.

    Examples:
        >>> logit_bound_ratio([[3.0, 0.0], [1.0, 0.0]])  # e_i·μ is 6 and 2, centered 2 and -2
        0.3333333333333333
    """
    statistics = statistics_of(embedding)
    projections, square = statistics.projections, statistics.mean @ statistics.mean
    above, below = projections.max() - square, square - projections.min()
    before = max(below - square, above + square)
    return float(max(below, above) / before) if before > 0 else float("nan")
