"""Isotropy, mean shift and spectrum of an embedding matrix E of shape (V, H) with rows e_i; μ is their mean.

Every function takes a numpy array, a tensor of any dtype or device, or nested lists, and works in float64.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from coupled_adam.geometry.arrays import Float64, Matrix, RowMap, as_matrix, blocks, in_range, row_norms

#: (S_min/S_max)² above which the singular values are taken from EᵀE: they are then exact to 1e-6, relatively.
SQUARED_CONDITION = 1e-9

#: The largest scale at which e·c is computed: sums of products stay below the largest number of float64, 2^1024.
LARGEST_SCALE = 2.0**990


def isotropy(embedding: Matrix, row_map: RowMap | None = None) -> float:
    """Iso(E) = min_c Z(c) / max_c Z(c) with Z(c) = Σ_i exp(e_i·c), over the unit eigenvectors c of EᵀE; in (0, 1].

    1 means that no direction is preferred. It depends on the scale of E: do not compare it across models whose
    embeddings differ in norm without saying so. The sign of an eigenvector is arbitrary; here its component of largest
    magnitude is positive, so that the figure is reproducible.

    Source: Arora et al. 2016, "A latent variable model approach to PMI-based word embeddings"; Mu & Viswanath 2018,
    "All-but-the-Top", eq. 5; used by Biś et al. 2021 and by Coupled Adam, arXiv 2502.08441, section 4.2.

    Args:
        embedding: E.
        row_map: what to make of the rows of E first, as of ``coupled_adam.geometry.post_processing``.

    Raises:
        ValueError: not a finite matrix with two rows or more. The same holds for the other functions.
    """
    e = as_matrix(embedding)
    scale = in_range(e)[1]
    squares = sum(rows.T @ rows for rows in _scaled(blocks(e, row_map), scale))  # EᵀE
    _, directions = np.linalg.eigh(squares)  # (H, H), one eigenvector a column
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0, keepdims=True), axis=0)
    directions *= np.sign(largest)
    # Beyond the limit e·c itself would overflow, and Iso is 0 long before.
    log_z = _log_partition(_scaled(blocks(e, row_map), scale), directions * min(scale, LARGEST_SCALE))
    return float(np.exp(log_z.min() - log_z.max()))


def _scaled(parts: Iterable[Float64], scale: float) -> Iterator[Float64]:
    return (rows if scale == 1 else rows / scale for rows in parts)


def _log_partition(parts: Iterable[Float64], directions: Float64) -> Float64:
    """Compute log Z(c) of every column c, (H,), with the largest exponent taken out: exp overflows above 709."""
    largest = np.full(directions.shape[1], -np.inf)
    total = np.zeros(directions.shape[1])
    for rows in parts:
        exponents = rows @ directions
        before, largest = largest, np.maximum(largest, exponents.max(0))
        exponents -= largest
        total = total * np.exp(before - largest) + np.exp(exponents, out=exponents).sum(0)
    return np.asarray(largest + np.log(total))


def norm_of_mean(embedding: Matrix) -> float:
    """‖μ‖, the norm of the mean embedding. Source: Coupled Adam, arXiv 2502.08441, section 4.2."""
    e, scale = in_range(as_matrix(embedding))
    return float(np.linalg.norm(e.mean(0))) * scale


def mean_of_norms(embedding: Matrix) -> float:
    """mean_i ‖e_i‖, the mean of the embeddings' norms."""
    e, scale = in_range(as_matrix(embedding))
    return float(row_norms(e).mean()) * scale


def mean_shift_ratio(embedding: Matrix) -> float:
    """‖μ‖^r = ‖μ‖ / mean_i ‖e_i‖, in [0, 1]: 0 for a cloud around the origin, 1 where all rows are the same.

    NaN for a matrix of zeros. Source: Coupled Adam, arXiv 2502.08441, section 4.2.
    """
    e, _ = in_range(as_matrix(embedding))
    length = mean_of_norms(e)
    return norm_of_mean(e) / length if length > 0 else float("nan")


def mean_cosine(embedding: Matrix) -> float:
    """Mean cosine of two different rows, over all pairs, in [-1, 1]: the anisotropy of Ethayarajh 2019.

    0 for directions that are spread evenly, 1 where all rows point the same way. Rows of zeros have no direction and
    are left out; NaN with fewer than two others. Source: Ethayarajh 2019, "How contextual are contextualized word
    representations?", arXiv 1909.00512, which estimates it from a sample of pairs.

    >>> mean_cosine([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])  # the cosines are 0, 1 and 0
    0.3333333333333333
    """
    e, _ = in_range(as_matrix(embedding))
    total, count = np.zeros(e.shape[1]), 0
    for rows in blocks(e):
        norms = row_norms(rows)
        total += (rows[norms > 0] / norms[norms > 0, None]).sum(0)
        count += int((norms > 0).sum())
    if count < 2:
        return float("nan")
    # ‖Σ_i u_i‖² is the sum over all pairs, with the n pairs of a row and itself.
    return float(np.clip((total @ total - count) / (count * (count - 1)), -1, 1))


def singular_values(embedding: Matrix) -> Float64:
    """Compute the min(V, H) singular values of E, largest first."""
    e, scale = in_range(as_matrix(embedding))
    squares = np.linalg.eigvalsh(e.T @ e if len(e) > e.shape[1] else e @ e.T)[::-1]
    # Squaring costs digits of the small ones: below this, the exact way, which takes ten times as long.
    if squares[-1] < SQUARED_CONDITION * squares[0]:
        return np.asarray(np.linalg.svd(e, compute_uv=False) * scale)
    return np.asarray(np.sqrt(squares) * scale)


def inverse_condition(embedding: Matrix) -> float:
    """100·S_min/S_max of the singular values, in percent: the inverse of the condition number, so higher is better.

    NaN for a matrix of zeros. Source: Coupled Adam, arXiv 2502.08441, section 4.2.
    """
    return inverse_condition_of(singular_values(embedding))


def inverse_condition_of(values: Float64) -> float:
    """The same from singular values, largest first."""
    return float(100 * (values[-1] / values[0])) if values[0] > 0 else float("nan")


def principal_share(embedding: Matrix) -> float:
    """The share of the largest principal direction in the variance around the mean: λ_1/Σλ of (E − μ)ᵀ(E − μ).

    In [1/H, 1]: 1 where all embeddings lie on a line, 1/H for a round cloud; NaN where all are the same.
    """
    e, _ = in_range(as_matrix(embedding))
    mean = e.mean(0)
    squares = e.T @ e
    return principal_share_of(np.linalg.eigvalsh(squares - len(e) * np.outer(mean, mean)), float(np.trace(squares)))


def principal_share_of(values: Float64, squares: float) -> float:
    """The same from the eigenvalues, ascending, and Σ_i ‖e_i‖², of which they may be what rounding left."""
    total = float(values.sum())
    return float(values[-1]) / total if total > 1e-12 * squares else float("nan")


def logit_bound_ratio(embedding: Matrix) -> float:
    """By which factor centering the output embedding bounds the logits along μ more tightly, in [0, 1] or above.

    max(B₋, B₊) / max(B₋ − ‖μ‖², B₊ + ‖μ‖²) with B₊ = max_i e_i·μ − ‖μ‖² and B₋ = ‖μ‖² − min_i e_i·μ: the widest
    e_i·μ after centering over that before. Well below 1: centering helps. NaN for μ = 0. Source: arXiv 2601.02031.
    """
    e, _ = in_range(as_matrix(embedding))
    mean = e.mean(0)
    projections, square = e @ mean, mean @ mean
    above, below = projections.max() - square, square - projections.min()
    before = max(below - square, above + square)
    return float(max(below, above) / before) if before > 0 else float("nan")
