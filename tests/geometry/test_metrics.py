"""The embedding metrics against cases computed by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coupled_adam import geometry

#: Rows along the axes, so that the eigenvectors of EᵀE are the axes.
AXES = np.array([[2.0, 0.0], [0.0, 1.0]])


def test_isotropy_by_hand() -> None:
    # Z along the axes: e² + e⁰ and e⁰ + e¹.
    assert geometry.isotropy(AXES) == pytest.approx((1 + math.e) / (math.e**2 + 1))


def test_isotropy_of_a_cloud_is_near_1_and_of_a_shifted_one_is_not() -> None:
    cloud = 0.1 * np.random.default_rng(0).standard_normal((5000, 8))
    assert geometry.isotropy(cloud) > 0.98
    assert geometry.isotropy(cloud + 1.0) < 0.2


def test_isotropy_does_not_overflow() -> None:
    assert geometry.isotropy(1000 * AXES) == pytest.approx(math.exp(1000 - 2000))
    assert geometry.isotropy([[800.0, 0.0], [800.0, 1.0], [0.0, -1.0]]) == 0.0


def test_isotropy_does_not_depend_on_the_solvers_sign() -> None:
    # The eigenvectors are (1, 1)/√2 and (1, −1)/√2, the latter up to its sign; E·c is √2 and 0.
    embedding = np.array([[1.0, 1.0], [1.0, 1.0]])
    assert geometry.isotropy(embedding) == pytest.approx(math.exp(0 - math.sqrt(2)))
    assert geometry.isotropy(-embedding) == pytest.approx(math.exp(-math.sqrt(2) - 0))


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    rows = np.random.default_rng(0).normal(0.5, 1, (40, 6)) * np.geomspace(1e-3, 1e3, 40)[:, None]
    rows[[3, 17]] = 0
    used = [row / np.linalg.norm(row) for row in rows if row.any()]
    pairs = [a @ b for i, a in enumerate(used) for b in used[:i]]
    assert geometry.mean_cosine(rows) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert geometry.mean_cosine([[1.0, 0.0], [-2.0, 0.0]]) == -1
    assert math.isnan(geometry.mean_cosine([[1.0, 0.0], [0.0, 0.0]]))


def test_mean_norm_and_mean_shift_ratio_by_hand() -> None:
    assert geometry.norm_of_mean(AXES) == pytest.approx(math.hypot(1.0, 0.5))
    assert geometry.mean_shift_ratio(AXES) == pytest.approx(math.hypot(1.0, 0.5) / 1.5)
    assert geometry.mean_shift_ratio([[3.0, 4.0], [3.0, 4.0]]) == pytest.approx(1.0)
    assert geometry.mean_shift_ratio([[3.0, 4.0], [-3.0, -4.0]]) == 0.0
    assert math.isnan(geometry.mean_shift_ratio(np.zeros((3, 2))))


def test_spectrum_by_hand() -> None:
    assert geometry.singular_values(AXES).tolist() == [2.0, 1.0]
    assert geometry.inverse_condition(AXES) == pytest.approx(50.0)
    assert math.isnan(geometry.inverse_condition(np.zeros((3, 2))))


def test_norm_frequency_correlation_by_hand() -> None:
    # The norms are the logarithms of the counts but for constants: both coefficients are 1, and −1 when reversed.
    counts = np.array([1, 10, 100, 1000])
    embedding = np.log10(counts * 10.0)[:, None] * np.array([[0.6, 0.8]])
    assert geometry.norm_frequency_correlation(embedding, counts) == pytest.approx((1.0, 1.0))
    assert geometry.norm_frequency_correlation(embedding[::-1], counts) == pytest.approx((-1.0, -1.0))
    # Ranks 1, 2, 3, 4 against 1, 2, 4, 3: Spearman is 1 − 6·2/(4·15) = 0.8.
    assert geometry.norm_frequency_correlation(embedding[[0, 1, 3, 2]], counts).spearman == pytest.approx(0.8)
    assert all(map(math.isnan, geometry.norm_frequency_correlation(np.ones((4, 2)), counts)))


MATRICES = arrays(np.float64, (6, 3), elements=st.floats(-5, 5, allow_subnormal=False))


@given(MATRICES)
def test_bounds(embedding: np.ndarray) -> None:
    assert 0 <= geometry.isotropy(embedding) <= 1
    if np.abs(embedding).max() > 1e-6:
        assert 0 <= geometry.mean_shift_ratio(embedding) <= 1 + 1e-12
        assert 0 <= geometry.inverse_condition(embedding) <= 100 * (1 + 1e-12)


@given(MATRICES, st.permutations(range(6)))
def test_the_order_of_the_tokens_does_not_matter(embedding: np.ndarray, order: list[int]) -> None:
    assert geometry.norm_of_mean(embedding[order]) == pytest.approx(geometry.norm_of_mean(embedding))
    expected = geometry.singular_values(embedding)
    np.testing.assert_allclose(geometry.singular_values(embedding[order]), expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_dtype_and_parameters_are_taken(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.tensor(AXES, dtype=dtype))
    assert geometry.isotropy(parameter) == pytest.approx(geometry.isotropy(AXES))


@pytest.mark.parametrize(
    "metric", [geometry.isotropy, geometry.norm_of_mean, geometry.mean_shift_ratio, geometry.inverse_condition]
)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((1, 3)), r"\(1, 3\)"),
        ([[1.0, math.nan], [1, 2]], "1 values that are NaN"),
    ],
)
def test_bad_matrices_are_refused(metric, bad, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(bad)


@pytest.mark.parametrize("counts", [[1, 2, 3], [[1, 2]], [0, 0], [1, -1], [1, math.nan]])
def test_bad_counts_are_refused(counts: list) -> None:
    with pytest.raises(ValueError, match="counts"):
        geometry.norm_frequency_correlation(AXES, counts)


def test_isotropy_by_parts_is_that_of_the_whole_matrix() -> None:
    # More rows than are taken at a time, the largest exponent in the last part.
    rows = np.random.default_rng(1).normal(size=(9000, 4)) * np.linspace(0.1, 3, 9000)[:, None]
    _, directions = np.linalg.eigh(rows.T @ rows)
    directions *= np.sign(directions[np.abs(directions).argmax(0), range(4)])
    z = np.exp(rows @ directions).sum(0)
    assert geometry.isotropy(rows) == pytest.approx(z.min() / z.max(), rel=1e-12)


def test_small_singular_values_are_as_exact_as_large_ones() -> None:
    rng = np.random.default_rng(2)
    left, right = np.linalg.qr(rng.normal(size=(100, 5)))[0], np.linalg.qr(rng.normal(size=(5, 5)))[0]
    wanted = np.array([1.0, 1e-2, 1e-5, 1e-8, 1e-11])
    assert geometry.singular_values(left * wanted @ right) == pytest.approx(wanted, rel=1e-4)


def test_projection_frequency_correlation_by_hand() -> None:
    # μ = (¼·10, 0), so e·μ rises with the first component; the second one, and the norm with it, falls.
    counts = np.array([1, 10, 100, 1000])
    embedding = np.array([[1.0, 9.0], [2.0, -6.0], [3.0, 0.0], [4.0, -3.0]])
    assert geometry.projection_frequency_correlation(embedding, counts) == pytest.approx((1.0, 1.0))
    assert geometry.norm_frequency_correlation(embedding, counts).spearman < 0


def test_second_moment_frequency_fit_by_hand() -> None:
    # v = (1, 2, 6), p = (1, 2, 3)/6: a·p = (23/14)·(1, 2, 3), residuals² = 41 − 23²/14, spread = 14.
    moment = np.array([[0.5, 1.5], [2.0, 2.0], [6.0, 6.0]])
    assert geometry.second_moment_frequency_fit(moment, [1, 2, 3]) == pytest.approx(1 - (41 - 23**2 / 14) / 14)
    assert geometry.second_moment_frequency_fit(7 * np.array([[1.0], [2.0], [3.0]]), [1, 2, 3]) == pytest.approx(1)
    assert math.isnan(geometry.second_moment_frequency_fit(np.ones((3, 2)), [1, 2, 3]))


def test_logit_bound_ratio_by_hand() -> None:
    # μ = (2, 0): e·μ = 2, 4, 6 and ‖μ‖² = 4, so B₊ = B₋ = 2 and the ratio is 2/6.
    assert geometry.logit_bound_ratio([[1.0, 5.0], [2.0, -5.0], [3.0, 0.0]]) == pytest.approx(1 / 3)
    assert math.isnan(geometry.logit_bound_ratio([[1.0], [-1.0]]))
