"""Some tokens of a vocabulary, for plots: where their embeddings lie, how long they are, how often they occur."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coupled_adam.geometry import plane
from coupled_adam.geometry.arrays import Float64, Matrix, as_matrix
from coupled_adam.geometry.statistics import Embedding, statistics_of

#: Significant digits of what is written to a file and drawn.
DIGITS = 5


@dataclass(frozen=True)
class TokenSample:
    """Some tokens of a vocabulary, for plots. Each list has one entry per token, the most frequent token first."""

    text: list[str]
    """The tokens."""
    count: list[int] | None
    """Occurrences in the training text; None if unknown, and the order is then that of the vocabulary."""
    norm: list[float]
    """‖e_i‖."""
    projection: list[float]
    """e_i·μ."""
    along: list[float]
    """Position along the mean embedding μ, measured from the origin."""
    across: list[float]
    """Position along the direction of largest variance orthogonal to μ."""
    second_moment: list[float] | None
    """Adam's elementwise second moment, averaged over the components; None for an optimizer without one."""

    def as_json(self) -> dict[str, Any]:
        """Return plain lists; ``TokenSample(**sample.as_json())`` is the same sample."""
        return asdict(self)


def sample_tokens(
    embedding: Embedding,
    text_of: Callable[[int], str],
    counts: Sequence[int] | NDArray[np.int64] | None = None,
    second_moment: Matrix | None = None,
    limit: int = 2000,
) -> TokenSample:
    """Sample at most ``limit`` tokens of a (V, H) matrix, evenly spread over the ranks of frequency."""
    statistics = statistics_of(embedding)
    e, scale = statistics.matrix, statistics.scale
    ranked = np.arange(len(e)) if counts is None else np.argsort(-np.asarray(counts), kind="stable")
    kept = ranked[np.linspace(0, len(e) - 1, min(limit, len(e))).round().astype(int)]
    along, across = plane(statistics)
    moment = None if second_moment is None else as_matrix(second_moment).mean(1)
    with np.errstate(over="ignore"):  # of products that float64 does not hold
        projection = statistics.projections[kept] * scale * scale
    return TokenSample(
        text=[text_of(int(i)) for i in kept],
        count=None if counts is None else [int(counts[i]) for i in kept],
        norm=_rounded(statistics.norms[kept] * scale),
        projection=_rounded(projection),
        along=_rounded(e[kept] @ along),
        across=_rounded(e[kept] @ across),
        second_moment=None if moment is None else _rounded(moment[kept]),
    )


def _rounded(values: Float64) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
