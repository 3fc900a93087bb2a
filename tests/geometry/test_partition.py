"""Isotropy by a first look in float32 is that of float64: for easy matrices, for hard ones, and where it misleads."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from coupled_adam import geometry, monitor
from coupled_adam.geometry import partition, post_processing

RNG = np.random.default_rng(0)
CLOUD = RNG.standard_normal((1500, 48)) * np.geomspace(0.3, 0.03, 48)
MEAN = RNG.standard_normal(48) / 48**0.5

MATRICES = {
    "centered": CLOUD - CLOUD.mean(0),
    "shifted": CLOUD + MEAN,
    "strongly shifted": 1e-3 * CLOUD + 30 * MEAN,
    "short": 1e-3 * CLOUD,
    "tiny": 1e-30 * CLOUD,
    "long": 40 * CLOUD,
    "too long for float32": 1e30 * CLOUD,
    "one long row": np.concatenate([CLOUD, 60 * MEAN[None]]),
    "more columns than rows": CLOUD[:20] + MEAN,
    "empty directions": CLOUD * (np.arange(48) < 40),
    "zeros": np.zeros((20, 4)),
    "one column": CLOUD[:, :1],
}


@pytest.fixture
def sifted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Have small matrices treated as large ones; holds how many directions were computed exactly, call by call."""
    counts: list[int] = []
    exact = partition.log_partition

    def counting(parts, directions):
        counts.append(directions.shape[1])
        return exact(parts, directions)

    monkeypatch.setattr(partition, "LARGE", 0)
    monkeypatch.setattr(partition, "log_partition", counting)
    return counts


def by_definition(e: np.ndarray) -> float:
    largest = max(np.abs(e).max(), 1e-300)
    _, c = np.linalg.eigh((e / largest).T @ (e / largest))
    c *= np.sign(c[np.abs(c).argmax(0), range(len(c))])
    log_z = logsumexp(e @ c, axis=0)
    return float(np.exp(log_z.min() - log_z.max()))


@pytest.mark.parametrize("name", MATRICES)
def test_the_isotropy_is_that_of_float64(name: str, sifted: list[int]) -> None:
    e = MATRICES[name]
    assert geometry.isotropy(e) == pytest.approx(by_definition(e), rel=1e-11)
    found = geometry.measure(e)
    assert found.isotropy == pytest.approx(by_definition(e), rel=1e-11)
    centered = e - e.mean(0)
    assert found.isotropy_centered == pytest.approx(by_definition(centered), rel=1e-9)
    top = post_processing.principal_components(e, post_processing.isotropy_components(e.shape[1]))
    rest = centered - (centered @ top) @ top.T
    assert found.isotropy_post_processed == pytest.approx(by_definition(rest), rel=1e-9)


def test_few_directions_are_computed_twice(sifted: list[int]) -> None:
    geometry.isotropy(MATRICES["shifted"])
    assert len(sifted) == 1 and sifted[0] < 12
    monitor.health(torch.tensor(MATRICES["shifted"]), isotropy=True)
    assert len(sifted) == 2 and sifted[1] == sifted[0]


@pytest.mark.parametrize("error", [1e-2, np.nan, np.inf])
def test_a_first_look_that_is_off_by_too_much_is_not_believed(
    error: float, sifted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rough, noise = partition.rough_log_partition, np.random.default_rng(1).normal(size=48)
    monkeypatch.setattr(partition, "rough_log_partition", lambda parts, c: rough(parts, c) + error * noise)
    e = MATRICES["shifted"]
    assert geometry.isotropy(e) == pytest.approx(by_definition(e), rel=1e-12)
    assert sifted[-1] == 48


def test_products_that_torch_rounds_are_not_believed(sifted: list[int]) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        e = MATRICES["shifted"]
        assert geometry.isotropy(e) == pytest.approx(by_definition(e), rel=1e-12)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("length", [1e-3, 1.0, partition.LONGEST])
@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("shape", ["normal", "all one sign", "one long component"])
def test_the_first_look_is_within_its_bound(length: float, width: int, shape: str) -> None:
    rng = np.random.default_rng(width)
    rows = rng.standard_normal((2100, width))
    if shape == "all one sign":
        rows = np.abs(rows)
    elif shape == "one long component":
        rows[:, 0] *= 1e4
    rows *= length / np.linalg.norm(rows, axis=1).max()
    directions = np.linalg.qr(rng.standard_normal((width, width)))[0]
    found = partition.rough_log_partition([rows[:7], rows[7:]], directions)
    wanted = logsumexp(rows @ directions, axis=0)
    assert np.abs(found - wanted).max() <= partition.rough_error(width, length)


def test_of_every_group_the_extremes_are_exact(sifted: list[int]) -> None:
    directions = np.linalg.qr(RNG.standard_normal((48, 48)))[0]
    wanted = logsumexp(CLOUD @ directions, axis=0)
    groups = (slice(None), slice(5, 20), slice(0, 0))
    found = partition.log_partition_around(np.zeros(48), lambda: [CLOUD], directions, len(CLOUD), 3.0, *groups)
    for group in groups[:2]:
        for extreme in (np.min, np.max):
            assert extreme(found[group]) == pytest.approx(extreme(wanted[group]), rel=1e-14)
