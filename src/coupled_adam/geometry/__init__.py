"""What an embedding matrix looks like. Works on any (V, H) array, knows nothing of models."""

from coupled_adam.errors import require

try:
    import numpy as _numpy  # noqa: F401
    import scipy as _scipy  # noqa: F401
except ImportError:
    require("geometry", "numpy", "scipy")
    raise

from coupled_adam.geometry.frequency import (
    Correlation,
    norm_frequency_correlation,
    projection_frequency_correlation,
    second_moment_frequency_fit,
)
from coupled_adam.geometry.measurements import Measurements, measure
from coupled_adam.geometry.metrics import (
    inverse_condition,
    isotropy,
    logit_bound_ratio,
    mean_cosine,
    mean_of_norms,
    mean_shift_ratio,
    norm_of_mean,
    principal_share,
    singular_values,
)
from coupled_adam.geometry.plane import plane
from coupled_adam.geometry.statistics import Statistics
from coupled_adam.geometry.word_similarity import (
    Benchmark,
    WordSimilarity,
    mean_similarity,
    published_benchmarks,
    read_benchmarks,
    word_similarity,
)

__all__ = [
    "Benchmark",
    "Correlation",
    "Measurements",
    "Statistics",
    "WordSimilarity",
    "inverse_condition",
    "isotropy",
    "logit_bound_ratio",
    "mean_cosine",
    "mean_of_norms",
    "mean_shift_ratio",
    "mean_similarity",
    "measure",
    "norm_frequency_correlation",
    "norm_of_mean",
    "plane",
    "principal_share",
    "projection_frequency_correlation",
    "published_benchmarks",
    "read_benchmarks",
    "second_moment_frequency_fit",
    "singular_values",
    "word_similarity",
]
