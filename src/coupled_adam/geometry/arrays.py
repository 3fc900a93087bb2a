"""Embedding matrices and vectors of counts as the metrics take them."""

import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from coupled_adam.errors import InputError

__all__ = ["Float64", "Matrix", "RowMap"]

Matrix: TypeAlias = ArrayLike | torch.Tensor
"""A matrix as the metrics take it: an array, a tensor of any dtype on any device, or nested lists."""

Float64 = NDArray[np.float64]
"""An array of float64."""

RowMap: TypeAlias = Callable[[Float64], Float64]
"""A map of any rows of a matrix, (n, H) -> (n, H), float64."""

#: Between these the squares of a matrix's largest value, their sums and products are within the range of float64.
SQUARES = (1e-100, 1e100)

#: Rows of which something of their size is held at a time.
ROWS = 4096


#: The memory that Linux allows a container, in bytes, or "max".
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def as_matrix(embedding: Matrix) -> Float64:
    """Convert to a float64 array (V, H).

    Raises:
        ValueError: it is not 2-D, not finite, or has fewer than two rows.
        InputError: a ValueError too: it does not fit into memory as float64; the message says how much is needed.
    """
    shape = tuple(getattr(embedding, "shape", ()))
    kept = isinstance(embedding, np.ndarray) and embedding.dtype == np.float64
    with enough_memory("the embedding matrix", *(() if kept else shape)):
        if isinstance(embedding, torch.Tensor):
            embedding = embedding.detach().to("cpu", torch.float64).numpy()
        matrix = np.asarray(embedding, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] < 2 or matrix.shape[1] < 1:
        raise ValueError(f"an embedding matrix is (vocabulary, hidden) with two rows or more; got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        count = (~np.isfinite(matrix)).sum()
        raise ValueError(f"the embedding matrix contains {count} values that are NaN or infinite")
    return matrix


@contextmanager
def enough_memory(what: str, *shape: int) -> Iterator[None]:
    """Raise InputError where a matrix of this shape does not fit into memory in float64, before and while it is made.

    Linux grants more memory than there is and ends the program that uses it, so the size is compared first.
    """
    needed = 8.0
    for length in shape:
        needed *= length
    message = f"{what} needs {needed / 1e9:,.3g} GB of memory in float64"
    if needed > (limit := memory_limit()):
        raise InputError(f"{message}, but the machine has {limit / 1e9:,.3g} GB")
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"{message}, but less is free") from None


def memory_limit() -> float:
    """Return the memory of the machine or its container in bytes; infinity where it is not known."""
    try:
        limit = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # Windows
        return float("inf")
    try:
        return min(limit, float(CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):
        return limit


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory could not be allocated: each library has another for it."""
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or "llocate memory" in str(error)  # torch: "can't allocate memory", "Cannot allocate memory"
    )


def blocks(e: Float64, row_map: RowMap | None = None) -> Iterator[Float64]:
    """Yield the rows of ``e``, or what ``row_map`` makes of them, some thousand at a time."""
    for start in range(0, len(e), ROWS):
        rows = e[start : start + ROWS]
        yield rows if row_map is None else row_map(rows)


def row_norms(e: Float64) -> Float64:
    """Compute ‖e_i‖, (V,), without a matrix of squares."""
    e, scale = in_range(e)
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", e, e)) * scale)


def pearson(x: Float64, y: Float64) -> float:
    """Compute the linear correlation of two vectors of one length, in [−1, 1]; NaN where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # so that no square overflows or vanishes
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1, 1))


def in_range(e: Float64) -> tuple[Float64, float]:
    """Return e/s and s, a power of two, so that no square overflows or vanishes: nearly always ``e`` itself and 1."""
    scale = scale_of(e)
    return (e if scale == 1 else e / scale), scale


def scale_of(e: Float64) -> float:
    """Return s, as above."""
    largest = float(max(e.max(), -e.min()))
    if largest == 0 or SQUARES[0] < largest < SQUARES[1]:
        return 1.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1)
