"""What the metrics of one embedding matrix share, computed once."""

import functools
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from coupled_adam.geometry.arrays import Float64, Matrix, RowMap, as_matrix, blocks, scale_of
from coupled_adam.geometry.partition import log_partition_around, with_positive_largest

__all__ = ["Embedding", "Statistics"]

#: (S_min/S_max)² above which the singular values are taken from EᵀE: they are then exact to 1e-6, relatively.
SQUARED_CONDITION = 1e-9

#: The largest scale at which e·c is computed: sums of products stay below the largest number of float64, 2^1024.
LARGEST_SCALE = 2.0**990


class Statistics:
    """Sums over the rows of a matrix, and its spectrum: several metrics of one matrix share them.

    Give it to functions in place of the matrix. What they need is computed once, when the first of them asks for it.
    The mean is taken from the rows before they are multiplied, so that a large one costs no digits.

    Args:
        embedding: E: an array or tensor of any dtype on any device, or nested lists; V ≥ 2.
        row_map: applied to the rows of E first.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Examples:
        >>> from coupled_adam import geometry
        >>> shared = Statistics([[1.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
        >>> round(geometry.principal_share(shared), 6), round(geometry.inverse_condition(shared), 2)
        (1.0, 17.68)
    """

    # All but the matrix itself is that of E/scale, with rows e_i and their mean μ.

    def __init__(self, embedding: Matrix, row_map: RowMap | None = None) -> None:
        self.matrix = as_matrix(embedding)
        """E in float64, (V, H)."""
        self.scale = scale_of(self.matrix)
        """A power of two, nearly always 1, such that no square of E/scale overflows or vanishes."""
        self.shape = self.matrix.shape
        """V and H."""
        self._row_map = row_map

    def rows(self) -> Iterator[Float64]:
        """Yield the rows, some thousand at a time."""
        for rows in blocks(self.matrix, self._row_map):
            yield rows if self.scale == 1 else rows / self.scale

    def centered_rows(self) -> Iterator[Float64]:
        """Yield e_i − μ, some thousand rows at a time: in one place, so each block is gone with the next."""
        place: Float64 | None = None
        for rows in self.rows():
            place = np.empty(rows.shape) if place is None else place
            yield np.subtract(rows, self.mean, out=place[: len(rows)])

    @functools.cached_property
    def mean(self) -> Float64:
        """μ, (H,)."""
        return np.asarray(sum(rows.sum(0) for rows in self.rows()) / self.shape[0])

    @functools.cached_property
    def norms(self) -> Float64:
        """‖e_i‖, (V,)."""
        return np.concatenate([_norms(rows) for rows in self.rows()])

    @functools.cached_property
    def projections(self) -> Float64:
        """e_i·μ, (V,)."""
        return np.concatenate([rows @ self.mean for rows in self.rows()])

    @functools.cached_property
    def sum_of_directions(self) -> Float64:
        """Σ_i e_i/‖e_i‖, (H,); rows of zeros have no direction."""
        total, start = np.zeros(self.shape[1]), 0
        for rows in self.rows():
            norms = self.norms[start : start + len(rows)]
            total += (1 / np.where(norms > 0, norms, 1)) @ rows
            start += len(rows)
        return total

    @functools.cached_property
    def zero_rows(self) -> int:
        """How many rows are zero."""
        return sum(int((~np.any(rows, axis=1)).sum()) for rows in self.rows())

    @property
    def scatter(self) -> Float64:
        """(E − μ)ᵀ(E − μ), (H, H)."""
        return self._around_mean[0]

    @functools.cached_property
    def squares(self) -> Float64:
        """EᵀE, (H, H)."""
        return np.asarray(self.scatter + self.shape[0] * np.outer(self.mean, self.mean))

    @functools.cached_property
    def spectrum(self) -> tuple[Float64, Float64]:
        """Eigenvalues of EᵀE, ascending (H,), and unit eigenvectors in columns (H, H)."""
        values, directions = np.linalg.eigh(self.squares)
        return values, with_positive_largest(directions)

    @functools.cached_property
    def principal(self) -> tuple[Float64, Float64]:
        """Eigenvalues of (E − μ)ᵀ(E − μ), ascending (H,), and unit eigenvectors in columns (H, H)."""
        values, directions = np.linalg.eigh(self.scatter)
        return values, with_positive_largest(directions)

    def components(self, count: int) -> Float64:
        """Return the first ``count`` principal components, orthonormal columns (H, count)."""
        return np.ascontiguousarray(self.principal[1][:, ::-1][:, :count])

    @functools.cached_property
    def singular_values(self) -> Float64:
        """All min(V, H) of them, largest first."""
        height, width = self.shape
        if height > width:
            squares = self.spectrum[0][::-1]
        else:
            e = self._whole()
            squares = np.asarray(np.linalg.eigvalsh(e @ e.T)[::-1], dtype=np.float64)
        # Squaring costs digits of the small ones: below this, the exact way, which takes ten times as long.
        if squares[-1] < SQUARED_CONDITION * squares[0]:
            return np.asarray(np.linalg.svd(self._whole(), compute_uv=False))
        return np.asarray(np.sqrt(squares))

    def log_partition(self, directions: Float64, *groups: slice, centered: bool = False) -> Float64:
        """Compute log Z(c) of unit directions c, (H, K) -> (K,), exactly where it is the least or greatest of a group.

        It is that of E itself, whatever the scale, or that of E − μ.
        """
        # Beyond the limit e·c itself would overflow, and Iso is 0 long before.
        factor = min(self.scale, LARGEST_SCALE)
        mean = np.zeros(self.shape[1]) if centered else self.mean
        longest = self._around_mean[1] * factor
        return log_partition_around(mean, self.centered_rows, directions * factor, self.shape[0], longest, *groups)

    @functools.cached_property
    def _around_mean(self) -> tuple[Float64, float]:
        """(E − μ)ᵀ(E − μ), and the largest ‖e_i − μ‖."""
        scatter, longest = np.zeros((self.shape[1], self.shape[1])), 0.0
        for rows in self.centered_rows():
            scatter += rows.T @ rows  # numpy sees that such a product is symmetric, and computes half of it
            longest = max(longest, float(_norms(rows).max()))
        return scatter, longest

    def _whole(self) -> Float64:
        """E/scale itself, which is nearly always the matrix as it was given."""
        if self.scale == 1 and self._row_map is None:
            return self.matrix
        return np.concatenate(list(self.rows()))


Embedding: TypeAlias = Matrix | Statistics
"""A matrix, or its statistics, which several functions can share."""


def statistics_of(embedding: Embedding) -> Statistics:
    """Return the statistics of a matrix, or those that are given."""
    return embedding if isinstance(embedding, Statistics) else Statistics(embedding)


def _norms(rows: Float64) -> Float64:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows)))
