"""Embedding matrices with their common direction taken out, in the ways that the literature compares.

Each function looks at a (V, H) matrix E with rows e_i and mean μ, and returns what to make of its rows (float64):
all of them, ``all_but_the_top(E)(E)``, or some, so that nobody needs to hold a second matrix.
Source: Biś et al. 2021, "Too Much in Common: Shifting of Embeddings in Transformer Language Models and its
Implications", section 5; Mu & Viswanath 2018, "All-but-the-Top", algorithm 1.
"""

import math

import numpy as np

from coupled_adam.geometry.arrays import Float64, RowMap, row_norms
from coupled_adam.geometry.statistics import Embedding, Statistics, statistics_of

__all__ = ["all_but_the_top", "centering", "scaled_centering"]

#: Components that the word similarity of the literature takes out.
WORD_SIMILARITY_COMPONENTS = 2


def centering(embedding: Embedding) -> RowMap:
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
    mean = _mean(statistics_of(embedding))
    return lambda rows: np.asarray(rows - mean)


def scaled_centering(embedding: Embedding) -> RowMap:
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
    statistics = statistics_of(embedding)
    direction = statistics.sum_of_directions / len(statistics.matrix)
    return lambda rows: np.asarray(rows - np.outer(row_norms(rows), direction))


def _mean(statistics: Statistics) -> Float64:
    return statistics.mean * statistics.scale


def all_but_the_top_as_computed(embedding: Embedding, top: Float64 | None = None) -> RowMap:
    """All-but-the-Top as it is commonly computed: what the first two principal components of E − μ see of e_i is taken
    from e_i − μ, so that the part of μ along them is taken away twice.

    ``top`` are the components, if they are known: (H, D), of which the result is then without all D.
    """
    statistics = statistics_of(embedding)
    mean = _mean(statistics)
    top = statistics.components(WORD_SIMILARITY_COMPONENTS) if top is None else top
    return lambda rows: np.asarray((rows - mean) - (rows @ top) @ top.T)


def all_but_the_top(embedding: Embedding, top: Float64 | None = None) -> RowMap:
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
    statistics = statistics_of(embedding)
    mean = _mean(statistics)
    top = statistics.components(WORD_SIMILARITY_COMPONENTS) if top is None else top

    def without(rows: Float64) -> Float64:
        rest = rows - mean
        return np.asarray(rest - (rest @ top) @ top.T)

    return without


def principal_components(embedding: Embedding, count: int) -> Float64:
    """Compute the first ``count`` principal components of E, orthonormal columns (H, count)."""
    return statistics_of(embedding).components(count)


def isotropy_components(width: int) -> int:
    """⌈H/100⌉: how many components All-but-the-Top takes out where isotropy is measured (Mu & Viswanath 2018)."""
    return math.ceil(width / 100)


def variants(embedding: Embedding, top: Float64 | None = None) -> dict[str, RowMap]:
    """Between which word similarity is compared, by the names of the literature's programs; ``top`` as above."""
    statistics = statistics_of(embedding)
    return {
        "original": np.asarray,
        "centered": centering(statistics),
        "centered_scaled": scaled_centering(statistics),
        "post_process": all_but_the_top_as_computed(statistics, top),
        "post_process_fix": all_but_the_top(statistics, top),
    }
