"""Embedding matrices and vectors of counts as the metrics take them."""

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Matrix: TypeAlias = ArrayLike | torch.Tensor
Float64 = NDArray[np.float64]


def as_matrix(embedding: Matrix) -> Float64:
    """``embedding`` as a float64 array (V, H). Raises ValueError unless it is 2-D, finite, and has two rows or more."""
    if isinstance(embedding, torch.Tensor):
        embedding = embedding.detach().to("cpu", torch.float64).numpy()
    matrix = np.asarray(embedding, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] < 2 or matrix.shape[1] < 1:
        raise ValueError(f"an embedding matrix is (vocabulary, hidden) with two rows or more; got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"the embedding matrix holds {(~np.isfinite(matrix)).sum()} values that are NaN or infinite")
    return matrix
