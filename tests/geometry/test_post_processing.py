"""What is taken out of an embedding matrix, against the singular value decomposition and by hand."""

import numpy as np
import pytest

from coupled_adam.geometry import post_processing as pp

E = np.random.default_rng(0).normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1] + [1, 2, 0, 0, 0, 3]


def components(count: int) -> np.ndarray:
    return np.linalg.svd(E - E.mean(0))[2][:count].T


def test_principal_components_are_the_right_singular_vectors() -> None:
    mine = pp.principal_components(E, 3)
    np.testing.assert_allclose(np.abs(mine.T @ components(3)), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(mine.T @ mine, np.eye(3), atol=1e-12)


def test_centered_has_the_mean_at_the_origin() -> None:
    assert np.abs(pp.centering(E)(E).mean(0)).max() < 1e-14
    np.testing.assert_allclose(pp.centering(E)(E) - pp.centering(E)(E)[0], E - E[0], atol=1e-12)


def test_centered_scaled_by_hand() -> None:
    # Unit rows (1, 0) and (0, 1), their mean (½, ½); the rows are 2 and 4 long. A row of zeros has no direction.
    two = np.array([[2.0, 0.0], [0.0, 4.0]])
    assert pp.scaled_centering(two)(two).tolist() == [[1.0, -1.0], [-2.0, 2.0]]
    one = np.array([[2.0, 0.0], [0.0, 0.0]])
    assert pp.scaled_centering(one)(one).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_all_but_the_top_and_its_common_error() -> None:
    top = components(2)
    expected = (E - E.mean(0)) @ (np.eye(6) - top @ top.T)
    np.testing.assert_allclose(pp.all_but_the_top(E)(E), expected, atol=1e-9)
    assert np.abs(pp.all_but_the_top(E)(E).mean(0)).max() < 1e-12
    # The other takes what the components see of μ away as well.
    np.testing.assert_allclose(pp.all_but_the_top_as_computed(E)(E), expected - E.mean(0) @ top @ top.T, atol=1e-9)


@pytest.mark.parametrize(("width", "count"), [(100, 1), (101, 2), (768, 8)])
def test_how_many_components(width: int, count: int) -> None:
    assert pp.isotropy_components(width) == count


def test_components_that_are_known_are_taken_as_they_are() -> None:
    three = components(3)
    np.testing.assert_allclose(
        pp.all_but_the_top(E, three)(E), (E - E.mean(0)) @ (np.eye(6) - three @ three.T), atol=1e-9
    )
    known = pp.variants(E, components(2))
    for name, row_map in pp.variants(E).items():
        np.testing.assert_allclose(row_map(E), known[name](E), atol=1e-9)


def test_rows_are_made_the_same_alone_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: row_map(E) for name, row_map in pp.variants(E).items()}
    monkeypatch.setattr("coupled_adam.geometry.arrays.ROWS", 7)
    for name, row_map in pp.variants(E).items():
        np.testing.assert_allclose(row_map(E[[3, 11]]), whole[name][[3, 11]], atol=1e-12)


def test_the_argument_is_left_as_it_was() -> None:
    before = E.copy()
    made = {name: row_map(E) for name, row_map in pp.variants(E).items()}
    assert list(made) == ["original", "centered", "centered_scaled", "post_process", "post_process_fix"]
    assert np.array_equal(E, before)
