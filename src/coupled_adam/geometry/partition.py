"""The partition function of isotropy, Z(c) = Σ_i exp(x_i·c) of the rows x_i of a matrix, for many directions c."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.nn.functional import linear

from coupled_adam.geometry.arrays import Float64

#: Rows whose exponents are held at a time: they should stay in the cache of a CPU.
PIECE = 1024

#: V·H² from which a first look in float32 saves time.
LARGE = 10**9

#: Length of a row up to which float32 holds the sum over a piece: 1024·exp(80) is below 2^128.
LONGEST = 80.0

Rows = Callable[[], Iterable[Float64]]
"""Returns the rows of a matrix, some at a time."""


def log_partition_around(
    mean: Float64, centered: Rows, directions: Float64, height: int, longest: float, *groups: slice
) -> Float64:
    """Compute log Z(c) of unit directions c, (H, K) -> (K,), for the rows μ + d_i.

    That of a direction is exact if it may be the least or the greatest of all, or of those in one of the ``groups`` of
    columns. The others are rough where that saves time, and lie between.

    Args:
        mean: μ, (H,).
        centered: the rows d_i.
        directions: the unit directions in columns, or multiples of them.
        height: the number of rows.
        longest: the largest norm of a row d_i times the length of a direction.
        groups: of columns; without any, all are one group.
    """

    def exact(directions: Float64) -> Float64:
        return np.asarray(mean @ directions + log_partition(centered(), directions))

    if height * len(directions) ** 2 < LARGE or longest > LONGEST:
        return exact(directions)
    found = mean @ directions + rough_log_partition(centered(), directions)
    error, wanted = rough_error(len(directions), longest), np.zeros(len(found), bool)
    for group in groups or (slice(None),):
        if len(part := found[group]):
            wanted[group] |= ~((part > part.min() + 2 * error) & (part < part.max() - 2 * error))
    checked = exact(np.ascontiguousarray(directions[:, wanted]))
    if not (np.abs(checked - found[wanted]) <= error).all():
        return exact(directions)  # torch was told to multiply in less than float32
    found[wanted] = checked
    return found


def log_partition(parts: Iterable[Float64], directions: Float64) -> Float64:
    """Compute log Z(c) of every column c, (H, K) -> (K,), with the largest exponent taken out: exp overflows above 709.

    ``parts`` are the rows, some at a time; without any, log Z is −∞.
    """
    largest = np.full(directions.shape[1], -np.inf)
    total = np.zeros(directions.shape[1])
    for rows in _pieces(parts):
        exponents = rows @ directions
        before, largest = largest, np.maximum(largest, exponents.max(0))
        exponents -= largest
        total = total * np.exp(before - largest) + np.exp(exponents, out=exponents).sum(0)
    with np.errstate(divide="ignore"):
        return np.asarray(largest + np.log(total))


@torch.no_grad()
def rough_log_partition(parts: Iterable[Float64], directions: Float64) -> Float64:
    """The same in float32, for rows up to LONGEST: within ``rough_error``, in a third of the time."""
    # oneDNN uses AVX-512 wherever it is, unlike the library behind torch's own product.
    fast = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    weight = torch.from_numpy(np.ascontiguousarray(directions.T, np.float32))
    weight = weight.to_mkldnn() if fast else weight
    total = torch.zeros(directions.shape[1], dtype=torch.float64)
    for rows in _pieces(parts):
        x = torch.from_numpy(rows.astype(np.float32))
        exponents = linear(x.to_mkldnn(), weight).to_dense() if fast else linear(x, weight)
        total += exponents.exp_().sum(0)
    return total.log_().numpy()


def rough_error(width: int, longest: float) -> float:
    """Bound the error of ``rough_log_partition`` for H columns and rows up to this length.

    The rounding errors of n operations in float32, each at most u, add up to less than 8·√n·u but for once in 10^13
    times (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 3.1).
    """
    return 8 * 2.0**-24 * (math.sqrt(width + 3) * longest + math.sqrt(PIECE) + 1)


def ratio_of_extremes(log_z: Float64) -> float:
    """Compute min Z / max Z."""
    return float(np.exp(log_z.min() - log_z.max()))


def with_positive_largest(directions: Float64) -> Float64:
    """Give each column the sign that makes its component of largest magnitude positive: eigenvectors have none."""
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0, keepdims=True), axis=0)
    return np.asarray(directions * np.sign(largest))


def _pieces(parts: Iterable[Float64]) -> Iterator[Float64]:
    for rows in parts:
        for start in range(0, len(rows), PIECE):
            yield rows[start : start + PIECE]
