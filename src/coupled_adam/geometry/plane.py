"""The plane in which token embeddings are drawn."""

import numpy as np

from coupled_adam.geometry.arrays import Float64, Matrix, as_matrix, in_range


def plane(embedding: Matrix) -> tuple[Float64, Float64]:
    """Return two orthonormal directions (H,): of the mean embedding, and the widest one at right angles to it.

    The plane passes through the origin, so distances from it are not distorted by centering.
    """
    e, _ = in_range(as_matrix(embedding))
    mean = e.mean(0)
    length = np.linalg.norm(mean)
    along = mean / length if length > 0 else np.eye(len(mean))[0]
    scatter = e.T @ e - len(e) * np.outer(mean, mean)
    aside = np.eye(len(mean)) - np.outer(along, along)
    _, directions = np.linalg.eigh(aside @ scatter @ aside)
    across = directions[:, -1]
    return along, across * np.sign(across[np.abs(across).argmax()])
