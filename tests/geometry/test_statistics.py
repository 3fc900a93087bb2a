"""Statistics that several metrics share: the same figures as from the matrix, and no digits lost to a large mean."""

import numpy as np
import pytest
import torch
from scipy import stats

from coupled_adam import geometry
from coupled_adam.geometry.arrays import pearson
from coupled_adam.geometry.statistics import Statistics

RNG = np.random.default_rng(0)
E = RNG.standard_normal((900, 12)) * np.geomspace(1, 0.05, 12)
FUNCTIONS = {
    name: getattr(geometry, name)
    for name in (
        "inverse_condition",
        "isotropy",
        "logit_bound_ratio",
        "mean_cosine",
        "mean_of_norms",
        "mean_shift_ratio",
        "norm_of_mean",
        "plane",
        "principal_share",
        "singular_values",
    )
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_functions_take_statistics_in_place_of_the_matrix(dtype: torch.dtype) -> None:
    matrix = torch.tensor(E + 0.3).to(dtype)
    shared = Statistics(matrix)
    for function in FUNCTIONS.values():
        np.testing.assert_array_equal(function(shared), function(matrix))


@pytest.mark.parametrize("shift", [0, 1e4, 1e8])
@pytest.mark.parametrize("scale", [1, 1e-30, 1e30])
@pytest.mark.parametrize("shape", [(900, 12), (12, 30)])
def test_a_large_mean_costs_no_digits(shift: float, scale: float, shape: tuple[int, int]) -> None:
    # Multiples of 2⁻²⁰, so that a shift by a whole number is exact.
    spread = np.round(RNG.standard_normal(shape) * 2**20) / 2**20
    e = (spread + shift * np.arange(1, shape[1] + 1)) * scale
    centered = np.linalg.svd(spread - spread.mean(0), compute_uv=False)
    assert geometry.principal_share(e) == pytest.approx(centered[0] ** 2 / (centered**2).sum(), rel=1e-7)
    wanted = np.linalg.svd(e / scale, compute_uv=False) * scale
    np.testing.assert_allclose(geometry.singular_values(e), wanted, rtol=1e-6 if shift < 1e8 else 1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(ties: bool) -> None:
    counts = RNG.integers(1, 5 if ties else 10**6, len(E))
    norms, log_p = np.linalg.norm(E, axis=1), np.log(counts / counts.sum() + 1e-10)
    found = geometry.norm_frequency_correlation(E, counts)
    assert found.pearson == pytest.approx(stats.pearsonr(norms, log_p)[0], rel=1e-12)
    assert found.spearman == pytest.approx(stats.spearmanr(norms, log_p)[0], rel=1e-12)


@pytest.mark.parametrize("scale", [1, 1e200, 1e-200])
def test_the_linear_correlation_does_not_depend_on_the_scale(scale: float) -> None:
    x, y = E[:, 0], E[:, 0] + E[:, 1]
    assert pearson(x * scale, 7 - y) == pytest.approx(-pearson(x, y), rel=1e-12)
    assert pearson(x * scale, x) == pytest.approx(1)
    assert np.isnan(pearson(x, np.ones_like(x)))
