"""Embedding matrices with their common direction taken out, in the ways that the literature compares.

All take a (V, H) matrix E with rows e_i and mean μ, and give a new float64 array of the same shape.
Source: Biś et al. 2021, "Too Much in Common: Shifting of Embeddings in Transformer Language Models and its
Implications", section 5; Mu & Viswanath 2018, "All-but-the-Top", algorithm 1.
"""

import math
from collections.abc import Iterator

import numpy as np

from coupled_adam.geometry.arrays import Float64, Matrix, as_matrix

#: Components that the word similarity of the literature takes out.
WORD_SIMILARITY_COMPONENTS = 2


def centered(embedding: Matrix) -> Float64:
    """E − μ."""
    e = as_matrix(embedding)
    return np.asarray(e - e.mean(0))


def centered_scaled(embedding: Matrix) -> Float64:
    """e_i − ‖e_i‖·d with d the mean of e_i/‖e_i‖: each row loses as much of the mean direction as it is long."""
    e = as_matrix(embedding)
    norms = np.linalg.norm(e, axis=1, keepdims=True)
    direction = np.divide(e, norms, out=np.zeros_like(e), where=norms > 0).mean(0)
    return np.asarray(e - norms * direction)


def post_process(embedding: Matrix, top: Float64 | None = None) -> Float64:
    """All-but-the-Top as it is commonly computed: what the first two principal components of E − μ see of E is taken
    from E − μ, so that the part of μ along them is taken away twice.

    ``top`` are the components, if they are known: (H, D), of which the result is then without all D.
    """
    e = as_matrix(embedding)
    top = principal_components(e, WORD_SIMILARITY_COMPONENTS) if top is None else top
    return np.asarray((e - e.mean(0)) - (e @ top) @ top.T)


def post_process_fix(embedding: Matrix, top: Float64 | None = None) -> Float64:
    """All-but-the-Top as its authors meant it: E − μ without its first two principal components, or without ``top``."""
    e = as_matrix(embedding)
    top = principal_components(e, WORD_SIMILARITY_COMPONENTS) if top is None else top
    rest = e - e.mean(0)
    return np.asarray(rest - (rest @ top) @ top.T)


def principal_components(embedding: Matrix, count: int) -> Float64:
    """The first ``count`` principal components of E, orthonormal columns (H, count)."""
    e = as_matrix(embedding)
    mean = e.mean(0)
    scatter = e.T @ e - len(e) * np.outer(mean, mean)  # (E − μ)ᵀ(E − μ) without a second (V, H) matrix
    _, directions = np.linalg.eigh(scatter)
    return np.ascontiguousarray(directions[:, ::-1][:, :count])


def isotropy_components(width: int) -> int:
    """⌈H/100⌉: how many components All-but-the-Top takes out where isotropy is measured (Mu & Viswanath 2018)."""
    return math.ceil(width / 100)


def variants(embedding: Matrix, top: Float64 | None = None) -> Iterator[tuple[str, Float64]]:
    """The matrices between which word similarity is compared, by name; ``top`` as of :func:`post_process`."""
    e = as_matrix(embedding)
    top = principal_components(e, WORD_SIMILARITY_COMPONENTS) if top is None else top
    yield "original", e
    yield "centered", centered(e)
    yield "centered_scaled", centered_scaled(e)
    yield "post_process", post_process(e, top)
    yield "post_process_fix", post_process_fix(e, top)
