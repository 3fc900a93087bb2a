"""Embedding matrices and vectors of counts as the metrics take them."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Matrix: TypeAlias = ArrayLike | torch.Tensor
Float64 = NDArray[np.float64]

#: What is made of rows of a matrix, (n, H) -> (n, H), whichever rows they are.
RowMap: TypeAlias = Callable[[Float64], Float64]

#: Rows of which something of their size is held at a time.
ROWS = 4096


def as_matrix(embedding: Matrix) -> Float64:
    """Convert to a float64 array (V, H). Raises ValueError unless it is 2-D, finite, and has two rows or more."""
    if isinstance(embedding, torch.Tensor):
        embedding = embedding.detach().to("cpu", torch.float64).numpy()
    matrix = np.asarray(embedding, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] < 2 or matrix.shape[1] < 1:
        raise ValueError(f"an embedding matrix is (vocabulary, hidden) with two rows or more; got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"the embedding matrix holds {(~np.isfinite(matrix)).sum()} values that are NaN or infinite")
    return matrix


def blocks(e: Float64, row_map: RowMap | None = None) -> Iterator[Float64]:
    """Yield the rows of ``e``, or what ``row_map`` makes of them, some thousand at a time."""
    for start in range(0, len(e), ROWS):
        rows = e[start : start + ROWS]
        yield rows if row_map is None else row_map(rows)


def row_norms(e: Float64) -> Float64:
    """Compute ‖e_i‖, (V,), without a matrix of squares."""
    return np.sqrt(np.einsum("ij,ij->i", e, e))  # type: ignore[no-any-return]
