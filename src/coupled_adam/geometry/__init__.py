"""What an embedding matrix looks like. Works on any (V, H) array, and knows nothing of models or training."""

try:
    import numpy as _numpy  # noqa: F401
    import scipy as _scipy  # noqa: F401
except ImportError as error:
    raise ImportError(f"{error.name} not installed: pip install 'coupled-adam[geometry]'") from error

from coupled_adam.geometry.frequency import Correlation, norm_frequency_correlation
from coupled_adam.geometry.metrics import condition, isotropy, mean_norm, mean_shift_ratio, singular_values
from coupled_adam.geometry.word_similarity import (
    Benchmark,
    WordSimilarity,
    mean_similarity,
    published_benchmarks,
    word_similarity,
)

__all__ = [
    "Benchmark",
    "Correlation",
    "WordSimilarity",
    "condition",
    "isotropy",
    "mean_norm",
    "mean_shift_ratio",
    "mean_similarity",
    "norm_frequency_correlation",
    "published_benchmarks",
    "singular_values",
    "word_similarity",
]
