"""The plane in which token embeddings are drawn."""

import numpy as np

from coupled_adam.geometry.arrays import Float64
from coupled_adam.geometry.statistics import Embedding, statistics_of


def plane(embedding: Embedding) -> tuple[Float64, Float64]:
    """Find the plane in which to draw embeddings: through the origin, the mean embedding and the widest direction.

    As it passes through the origin, it shows how far the embeddings are shifted off it.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists; V ≥ 2.

    Returns:
        Two orthonormal directions, each (H,) and float64. The first is that of the mean embedding, the second that of
        the largest variance orthogonal to it.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Examples:
        >>> along, across = plane([[1.0, 3.0, 0.0], [1.0, -3.0, 0.0]])
        >>> along.tolist(), across.round(6).tolist()
        ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    """
    statistics = statistics_of(embedding)
    mean = statistics.mean
    length = np.linalg.norm(mean)
    along = mean / length if length > 0 else np.eye(len(mean))[0]
    aside = np.eye(len(mean)) - np.outer(along, along)
    _, directions = np.linalg.eigh(aside @ statistics.scatter @ aside)
    across = directions[:, -1]
    return along, across * np.sign(across[np.abs(across).argmax()])
