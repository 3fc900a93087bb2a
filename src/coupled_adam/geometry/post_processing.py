"""Embedding matrices with their common direction taken out, in the ways that the literature compares.

Each function looks at a (V, H) matrix E with rows e_i and mean μ, and returns what to make of its rows (float64):
all of them, ``all_but_the_top(E)(E)``, or some, so that nobody needs to hold a second matrix.
Source: Biś et al. 2021, "Too Much in Common: Shifting of Embeddings in Transformer Language Models and its
Implications", section 5; Mu & Viswanath 2018, "All-but-the-Top", algorithm 1.
"""

import math

import numpy as np

from coupled_adam.geometry.arrays import Float64, Matrix, RowMap, as_matrix, blocks, in_range, mean_row, row_norms

__all__ = ["all_but_the_top", "centering", "scaled_centering"]

#: Components that the word similarity of the literature takes out.
WORD_SIMILARITY_COMPONENTS = 2


def centering(embedding: Matrix) -> RowMap:
    """Subtract the mean: e_i − μ.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        A map of rows of E, (n, H) -> (n, H), float64: apply it to all rows or to some.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Examples:
        >>> matrix = np.array([[1.0, 2.0], [3.0, 4.0]])
        >>> centering(matrix)(matrix).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
    """
    mean = mean_row(as_matrix(embedding))
    return lambda rows: np.asarray(rows - mean)


def scaled_centering(embedding: Matrix) -> RowMap:
    """Subtract the mean direction d = mean_i e_i/‖e_i‖ in proportion to each row's norm: e_i − ‖e_i‖·d.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        A map of rows of E, (n, H) -> (n, H), float64: apply it to all rows or to some.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Source: Biś et al. 2021, "Too Much in Common", section 5.

    Examples:
        >>> matrix = np.array([[2.0, 0.0], [0.0, 4.0]])
        >>> scaled_centering(matrix)(matrix).tolist()
        [[1.0, -1.0], [-2.0, 2.0]]
    """
    e = as_matrix(embedding)
    direction = sum(_directions(rows).sum(0) for rows in blocks(e)) / len(e)
    return lambda rows: np.asarray(rows - np.outer(row_norms(rows), direction))


def _directions(rows: Float64) -> Float64:
    norms = row_norms(rows)[:, None]
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def all_but_the_top_as_computed(embedding: Matrix, top: Float64 | None = None) -> RowMap:
    """All-but-the-Top as it is commonly computed: what the first two principal components of E − μ see of e_i is taken
    from e_i − μ, so that the part of μ along them is taken away twice.

    ``top`` are the components, if they are known: (H, D), of which the result is then without all D.
    """
    e = as_matrix(embedding)
    mean = mean_row(e)
    top = principal_components(e, WORD_SIMILARITY_COMPONENTS) if top is None else top
    return lambda rows: np.asarray((rows - mean) - (rows @ top) @ top.T)


def all_but_the_top(embedding: Matrix, top: Float64 | None = None) -> RowMap:
    """All-but-the-Top: remove the mean and the first principal components.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.
        top: orthonormal components to remove, (H, D); None for the first two principal components.

    Returns:
        A map of rows of E, (n, H) -> (n, H), float64: apply it to all rows or to some.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Source: Mu & Viswanath 2018, "All-but-the-Top", algorithm 1.

    Examples:
        >>> matrix = np.array([[2.0, 0.0, 1.0], [-2.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
        >>> bool(np.allclose(all_but_the_top(matrix)(matrix), 0))  # two components are all that varies
        True
    """
    e = as_matrix(embedding)
    mean = mean_row(e)
    top = principal_components(e, WORD_SIMILARITY_COMPONENTS) if top is None else top

    def without(rows: Float64) -> Float64:
        rest = rows - mean
        return np.asarray(rest - (rest @ top) @ top.T)

    return without


def principal_components(embedding: Matrix, count: int) -> Float64:
    """Compute the first ``count`` principal components of E, orthonormal columns (H, count)."""
    e, _ = in_range(as_matrix(embedding))
    mean = e.mean(0)
    scatter = e.T @ e - len(e) * np.outer(mean, mean)  # (E − μ)ᵀ(E − μ) without a second (V, H) matrix
    _, directions = np.linalg.eigh(scatter)
    return np.ascontiguousarray(directions[:, ::-1][:, :count])


def isotropy_components(width: int) -> int:
    """⌈H/100⌉: how many components All-but-the-Top takes out where isotropy is measured (Mu & Viswanath 2018)."""
    return math.ceil(width / 100)


def variants(embedding: Matrix, top: Float64 | None = None) -> dict[str, RowMap]:
    """Between which word similarity is compared, by the names of the literature's programs; ``top`` as above."""
    e = as_matrix(embedding)
    top = principal_components(e, WORD_SIMILARITY_COMPONENTS) if top is None else top
    return {
        "original": np.asarray,
        "centered": centering(e),
        "centered_scaled": scaled_centering(e),
        "post_process": all_but_the_top_as_computed(e, top),
        "post_process_fix": all_but_the_top(e, top),
    }
