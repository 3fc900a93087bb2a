"""Isotropy, mean shift and spectrum of an embedding matrix E of shape (V, H) with rows e_i; μ is their mean.

Every function takes a numpy array, a tensor of any dtype or device, or nested lists, and works in float64.
"""

import numpy as np
from scipy.special import logsumexp

from coupled_adam.geometry.arrays import Float64, Matrix, as_matrix


def isotropy(embedding: Matrix) -> float:
    """Iso(E) = min_c Z(c) / max_c Z(c) with Z(c) = Σ_i exp(e_i·c), over the unit eigenvectors c of EᵀE; in (0, 1].

    1 means that no direction is preferred. It depends on the scale of E: do not compare it across models whose
    embeddings differ in norm without saying so. The sign of an eigenvector is arbitrary; here its component of largest
    magnitude is positive, so that the figure is reproducible.

    Source: Arora et al. 2016, "A latent variable model approach to PMI-based word embeddings"; Mu & Viswanath 2018,
    "All-but-the-Top", eq. 5; used by Biś et al. 2021 and by Coupled Adam, arXiv 2502.08441, section 4.2.

    Raises:
        ValueError: not a finite matrix with two rows or more. The same holds for the other functions.
    """
    e = as_matrix(embedding)
    _, directions = np.linalg.eigh(e.T @ e)  # (H, H), one eigenvector a column
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0, keepdims=True), axis=0)
    directions *= np.sign(largest)
    log_z = logsumexp(e @ directions, axis=0)  # the ratio of Z without overflow
    return float(np.exp(log_z.min() - log_z.max()))


def mean_norm(embedding: Matrix) -> float:
    """‖μ‖, the length of the mean embedding. Source: Coupled Adam, arXiv 2502.08441, section 4.2."""
    return float(np.linalg.norm(as_matrix(embedding).mean(0)))


def mean_shift_ratio(embedding: Matrix) -> float:
    """‖μ‖^r = ‖μ‖ / mean_i ‖e_i‖, in [0, 1]: 0 for a cloud around the origin, 1 where all rows are the same.

    NaN for a matrix of zeros. Source: Coupled Adam, arXiv 2502.08441, section 4.2.
    """
    e = as_matrix(embedding)
    average_norm = np.linalg.norm(e, axis=1).mean()
    return float(np.linalg.norm(e.mean(0)) / average_norm) if average_norm > 0 else float("nan")


def singular_values(embedding: Matrix) -> Float64:
    """The min(V, H) singular values of E, largest first."""
    return np.linalg.svd(as_matrix(embedding), compute_uv=False).astype(np.float64)


def condition(embedding: Matrix) -> float:
    """100·S_min/S_max of the singular values, in percent: higher is better. NaN for a matrix of zeros.

    Source: Coupled Adam, arXiv 2502.08441, section 4.2.
    """
    values = singular_values(embedding)
    return float(100 * values[-1] / values[0]) if values[0] > 0 else float("nan")
