"""Rows that say nothing about training: of zeros, the same as another, or beyond the tokenizer's last token."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coupled_adam.geometry.arrays import ROWS


@dataclass(frozen=True)
class Rows:
    """What kinds of rows a (V, H) matrix has."""

    zero: int
    """Rows of zeros."""
    repeated: int
    """Rows, not of zeros, that an earlier one equals."""
    beyond: int
    """Rows after that of the tokenizer's last token."""
    used: NDArray[np.bool_]
    """All others, (V,)."""

    @property
    def unused(self) -> int:
        """The number of rows that are of one kind or several."""
        return int((~self.used).sum())


def kinds_of_rows(matrix: NDArray[np.floating[Any]], tokens: int | None = None) -> Rows:
    """Find the rows of a (V, H) matrix that nobody trained, as far as it shows.

    Args:
        matrix: of finite numbers, float32 or float64.
        tokens: the highest ID of the tokenizer plus one; None if it is not known.
    """
    zero = ~np.any(matrix, axis=1)
    repeated = np.ones(len(matrix), bool)
    repeated[np.unique(_keys(matrix), return_index=True)[1]] = False
    repeated &= ~zero
    beyond = np.arange(len(matrix)) >= (len(matrix) if tokens is None else tokens)
    return Rows(int(zero.sum()), int(repeated.sum()), int(beyond.sum()), ~(zero | repeated | beyond))


def _keys(matrix: NDArray[np.floating[Any]]) -> NDArray[np.uint64]:
    """Compute a number for each row, (V,), that is the same for rows that are, and hardly ever for others.

    It is the sum of the bits of the values, each multiplied by an odd number of its column and mixed, modulo 2^64.
    """
    bits = np.uint32 if matrix.dtype.itemsize == 4 else np.uint64
    factors = np.random.default_rng(0).integers(2**64, size=matrix.shape[1], dtype=np.uint64) | np.uint64(1)
    keys = np.empty(len(matrix), np.uint64)
    for start in range(0, len(matrix), ROWS):
        rows = np.ascontiguousarray(matrix[start : start + ROWS] + matrix.dtype.type(0))  # −0 becomes 0
        mixed = rows.view(bits).astype(np.uint64) * factors
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        keys[start : start + ROWS] = mixed.sum(1)
    return keys
