"""Matrices at the ends of float64's range have the metrics that they have in the middle, and memory is named."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from coupled_adam import geometry
from coupled_adam.errors import InputError
from coupled_adam.geometry import arrays

E = np.random.default_rng(0).normal(0.3, 1, (300, 12))
COUNTS = np.arange(1, 301)
RATED = geometry.Benchmark("rated", tuple((f"{i}", f"{i + 1}", float(i % 7)) for i in range(40)))


# Not below 1e-300: some libraries have the processor take subnormal numbers for zero.
@pytest.mark.parametrize("scale", [2.0**700, 2.0**-700, 1e200, 1e-200, 1e306, 1e-300])
@pytest.mark.parametrize(
    ("metric", "power"),
    [
        (geometry.mean_shift_ratio, 0),
        (geometry.mean_cosine, 0),
        (geometry.inverse_condition, 0),
        (geometry.logit_bound_ratio, 0),
        (geometry.principal_share, 0),
        (geometry.norm_of_mean, 1),
        (geometry.mean_of_norms, 1),
        (geometry.singular_values, 1),
        (lambda e: geometry.norm_frequency_correlation(e, COUNTS).pearson, 0),
        (lambda e: geometry.projection_frequency_correlation(e, COUNTS).pearson, 0),
        (lambda e: geometry.word_similarity(e, int, RATED).cosine, 0),
        (lambda e: geometry.word_similarity(e, int, RATED).dot, 0),
        (lambda e: np.abs(geometry.plane(e)), 0),
    ],
)
def test_metrics_do_not_depend_on_the_scale(metric: Callable[[Any], Any], power: int, scale: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(metric(E * scale) / scale**power, metric(E), rtol=1e-9)


def test_a_matrix_that_does_not_fit_into_memory_says_how_much_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "memory_limit", lambda: 16e9)
    huge = torch.zeros(1, 1).expand(250_000, 12_000)
    with pytest.raises(InputError, match=r"needs 24 GB of memory in float64, but the machine has 16 GB"):
        geometry.measure(huge)
    with pytest.raises(InputError, match=r"needs 24 GB of memory"):
        geometry.mean_shift_ratio(np.broadcast_to(np.float32(0), (250_000, 12_000)))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 24000000000 bytes."),
        RuntimeError("unable to mmap 4 bytes from file <x>: Cannot allocate memory (12)"),
    ],
)
def test_what_libraries_raise_without_memory_is_one_line(error: Exception) -> None:
    told = r"x needs 0\.8 GB of memory in float64, but less is free"
    with pytest.raises(InputError, match=told), arrays.enough_memory("x", 10**5, 10**3):
        raise error
    with pytest.raises(RuntimeError, match="another"), arrays.enough_memory("x", 2, 2):
        raise RuntimeError("another")
