"""Vectors that are no vocabulary: sentences, documents, a few rows. What is said of them holds for them."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from coupled_adam.audit.models import Audited, audit_models
from coupled_adam.cli import app
from coupled_adam.errors import InputError

H = 32


def vectors(rows: int, offset: float = 0.0, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors as sentence encoders make them, with a common direction."""
    made = np.random.default_rng(seed).normal(size=(rows, H)) + offset
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def audited(array: NDArray[np.generic], directory: Path) -> Audited:
    np.save(directory / "vectors.npy", array)
    ((found,), _) = audit_models([str(directory / "vectors.npy")], ())
    return found


def told(found: Audited) -> str:
    return "\n".join([found.summary, *(finding.text for finding in found.findings), found.advice.text])


def levels(found: Audited) -> dict[str | None, str]:
    return {finding.figure: finding.level for finding in found.findings if finding.figure}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_vectors_of_sentences_are_judged_by_the_mean_cosine_that_people_quote(dtype: str, tmp_path: Path) -> None:
    found = audited(vectors(2000, 1.0).astype(dtype), tmp_path)
    e = vectors(2000, 1.0).astype(dtype).astype(np.float64)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    cosines = e @ e.T
    expected = cosines[~np.eye(len(e), dtype=bool)].mean()
    assert found.measured.mean_cosine == pytest.approx(expected, rel=1e-9)
    assert f"the mean cosine of two rows is {expected:.3f}" in told(found)
    assert found.advice.case == "Retrieval" and "queries too" in found.advice.text
    assert not {"token", "vocabulary", "training", "trained"} & set(told(found).lower().split())


@pytest.mark.parametrize("rows", [2, 5, 20, 60, 300])
@pytest.mark.parametrize("seed", range(5))
def test_chance_is_not_taken_for_a_shift(rows: int, seed: int, tmp_path: Path) -> None:
    found = audited(vectors(rows, seed=seed), tmp_path)
    assert "mean_shift_ratio" not in levels(found) or levels(found)["mean_shift_ratio"] == "good"
    assert "hifted" not in found.summary and "subtract their mean" not in found.advice.text


@pytest.mark.parametrize("rows", [30, 100, 1000])
def test_a_shift_is_told_also_of_few_rows(rows: int, tmp_path: Path) -> None:
    found = audited(vectors(rows, 2.0), tmp_path)
    assert levels(found)["mean_shift_ratio"] == "poor" and "subtract their mean" in found.advice.text


@pytest.mark.parametrize("rows", [8, 31, 32])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_directions_that_no_row_can_fill_are_not_called_anisotropic(rows: int, offset: float, tmp_path: Path) -> None:
    array = vectors(rows, offset)
    array[1] = array[0]
    found = audited(20 * array, tmp_path)
    assert "isotropy" not in levels(found)
    assert f"{rows} rows are too few for {H} dimensions" in told(found)
    assert not any(word in told(found) for word in ("anisotropic", "degenerate", "After centering", "dominate"))


@pytest.mark.parametrize(("empty", "level"), [(1, "note"), (2, "poor"), (16, "poor")])
def test_some_empty_directions_are_told_and_only_many_are_a_fault(empty: int, level: str, tmp_path: Path) -> None:
    array = vectors(2000)
    array[:, :empty] = 0
    found = audited(array, tmp_path)
    (finding,) = [finding for finding in found.findings if f"Rank {H - empty} of {H}" in finding.text]
    assert finding.level == level
    assert ("isotropy" in levels(found)) == (level == "note")
    assert ("degenerate" in found.summary) == (level == "poor")


def test_vectors_of_the_same_sentence_are_counted(tmp_path: Path) -> None:
    array = vectors(500)
    array[400:] = array[:100]
    assert "100 of 500 rows are unused or repeated: 100 equal to an earlier row." in told(audited(array, tmp_path))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (vectors(6).reshape(2, 3, H), "shape (2, 3, 32)"),
        (vectors(6)[0], "shape (32,)"),
        ((100 * vectors(6)).astype(np.int8), "int8, not floating-point numbers; save it with .astype('float32')"),
        (vectors(1), "two rows or more"),
    ],
)
def test_what_is_no_matrix_is_one_line(array: NDArray[np.generic], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        audited(array, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_table_speaks_of_rows_and_columns(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", vectors(100, 1.0))
    printed = CliRunner().invoke(app, ["audit", str(tmp_path / "vectors.npy")])
    assert printed.exit_code == 0
    cells = [line.split() for line in printed.stdout.splitlines()]
    assert ["rows", "100"] in cells and ["columns", str(H)] in cells
    assert "token" not in printed.stdout
    (found,) = json.loads(CliRunner().invoke(app, ["audit", str(tmp_path / "vectors.npy"), "--json"]).stdout)
    assert found["figures"]["mean_cosine"] > 0.3 and found["word_similarity"] == {}
