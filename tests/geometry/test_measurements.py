"""Measurements: their figures are those of the functions."""

import math
import tracemalloc

import numpy as np
import pytest

from coupled_adam import geometry
from coupled_adam.geometry import post_processing

RNG = np.random.default_rng(0)
CLOUD = 0.2 * RNG.standard_normal((3000, 16))
COUNTS = np.arange(1, 3001)
RATED = geometry.Benchmark("rated", tuple((f"{i}", f"{i + 1}", float(CLOUD[i] @ CLOUD[i + 1])) for i in range(40)))


def measure(matrix: np.ndarray) -> geometry.Measurements:
    return geometry.measure(matrix, counts=COUNTS, token_of=int, benchmarks=[RATED])


def test_the_figures_are_those_of_the_functions() -> None:
    shifted = CLOUD + 0.3
    found = measure(shifted)
    assert (found.tokens, found.hidden_size, found.zero_rows) == (3000, 16, 0)
    assert found.isotropy == geometry.isotropy(shifted)
    assert found.isotropy_centered == pytest.approx(geometry.isotropy(shifted - shifted.mean(0)), rel=1e-12)
    without = post_processing.all_but_the_top(shifted, post_processing.principal_components(shifted, 1))
    assert found.isotropy_post_processed == pytest.approx(geometry.isotropy(without(shifted)), rel=1e-12)
    assert found.mean_shift_ratio == geometry.mean_shift_ratio(shifted)
    assert found.inverse_condition == geometry.inverse_condition(shifted)
    assert found.norm_frequency == geometry.norm_frequency_correlation(shifted, COUNTS)
    assert found.projection_frequency == geometry.projection_frequency_correlation(shifted, COUNTS)
    assert found.largest_singular_value == found.singular_values[0]
    assert list(found.word_similarity) == list(post_processing.variants(shifted))
    for name, row_map in post_processing.variants(shifted).items():
        whole = geometry.word_similarity(row_map(shifted), int, RATED)
        assert found.word_similarity[name][0].cosine == pytest.approx(whole.cosine, rel=1e-9)
        assert found.word_similarity[name][0].covered == whole.covered == 40
    assert found.mean_similarity == found.word_similarity["original"][0].cosine
    # Centering gives back the cloud, whose dot products are the ratings but for the cloud's own small mean.
    assert found.word_similarity["centered"][0].dot > 99 > found.word_similarity["original"][0].cosine


def test_no_second_matrix_is_made() -> None:
    matrix = np.tile(CLOUD, (20, 4))
    matrix += np.random.default_rng(0).normal(scale=0.1, size=matrix.shape)  # of full rank: no SVD, which takes a copy
    tracemalloc.start()
    try:
        geometry.measure(matrix, counts=np.tile(COUNTS, 20), token_of=int, benchmarks=[RATED])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.6 * matrix.nbytes


def test_without_words_and_counts_the_rest_is_measured() -> None:
    found = geometry.measure(CLOUD)
    assert found.norm_frequency is None and found.word_similarity == {} and found.mean_similarity is None


def test_a_matrix_of_zeros_has_no_figures_but_no_error_either() -> None:
    found = geometry.measure(np.zeros((4, 3)))
    assert found.zero_rows == 4 and math.isnan(found.mean_shift_ratio) and math.isnan(found.inverse_condition)
    assert found.isotropy == 1


def test_bad_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="1 values that are NaN"):
        geometry.measure([[1.0, math.nan], [1.0, 2.0]])
    with pytest.raises(ValueError, match="3000 rows, but there are 2 counts"):
        geometry.measure(CLOUD, counts=[1, 2])
