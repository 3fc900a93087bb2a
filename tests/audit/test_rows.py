"""Matrices and rows that nobody trained: told first, with counts, and never called good."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from coupled_adam import geometry
from coupled_adam.audit.models import Audited, audit_models
from coupled_adam.audit.rows import kinds_of_rows
from coupled_adam.audit.verdict import findings, note_on_rows

V, H = 200, 16
RNG = np.random.default_rng(0)
E = RNG.normal(0.05, 0.3, (V, H))


def audited(matrix: NDArray[Any], path: Path) -> Audited:
    np.save(path / "m.npy", matrix)
    ((found,), _) = audit_models([str(path / "m.npy")], ())
    return found


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (np.zeros((V, H)), "All 200 rows are zeros"),
        (np.ones((V, H)), "All 200 rows are the same"),
        (np.tile(E[:1], (V, 1)), "All 200 rows are the same"),
        (np.outer(np.full(V, 0.5), np.eye(H)[0]), "All 200 rows are the same"),
        (np.where(np.arange(H) == 3, 0, E), "Rank 15 of 16"),
        (np.repeat(np.eye(H)[:4], V // 4, 0), "Rank 4 of 16"),
        (np.where(np.arange(V)[:, None] < 8, E, 0), "Rank 8 of 16"),
    ],
    ids=["zeros", "ones", "same", "one-column", "dead-column", "four-rows", "mostly-zeros"],
)
def test_a_degenerate_matrix_is_told_first_and_its_isotropy_is_never_good(
    matrix: NDArray[Any], said: str, scale: float, dtype: str, tmp_path: Path
) -> None:
    found = audited((scale * matrix).astype(dtype), tmp_path)
    assert found.findings[0].level == "poor" and found.findings[0].text.startswith(said)
    assert not any(f.level == "good" and "sotropy" in f.text for f in found.findings)
    assert json.loads(json.dumps(found.as_json()))["findings"][0]["text"].startswith(said)


def test_a_matrix_of_few_directions_is_degenerate_up_to_rounding(tmp_path: Path) -> None:
    low = RNG.normal(size=(V, 3)) @ RNG.normal(size=(3, H))
    for matrix in (low, low.astype("f4")):
        assert audited(matrix, tmp_path).findings[0].text.startswith("Rank 3 of 16")
    nearly = E * np.geomspace(1, 1e-4, H)
    assert audited(nearly, tmp_path).findings[0].text.startswith("Mean shift ratio")


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_rows_are_counted_by_kind(dtype: str) -> None:
    matrix = E.astype(dtype)
    matrix[[3, 5]] = 0
    matrix[7, 2], matrix[8] = 0.0, matrix[7]
    matrix[8, 2] = -0.0  # the same number
    matrix[20:30] = matrix[19]
    rows = kinds_of_rows(matrix, tokens=190)
    assert (rows.zero, rows.repeated, rows.beyond, rows.unused) == (2, 11, 10, 23)
    assert np.flatnonzero(~rows.used).tolist() == [3, 5, 8, *range(20, 30), *range(190, 200)]
    assert kinds_of_rows(matrix, tokens=300).beyond == 0


@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(512, dtype="f4"),
        np.array(np.meshgrid(*[[1.0, -1.0, 2.0, 0.5]] * 6)).reshape(6, -1).T,
        (1 + np.arange(2**16) / 2**16)[:, None] * np.ones(2),
        RNG.permuted(np.tile(np.arange(12.0), (5000, 1)), axis=1),
    ],
    ids=["one-hot", "powers-of-two", "fractions", "permutations"],
)
def test_rows_that_differ_are_not_taken_for_the_same(matrix: NDArray[Any]) -> None:
    for each in (matrix, matrix.astype("f4")):
        rows = kinds_of_rows(each)
        assert rows.repeated == len(each) - len(np.unique(each, axis=0)) - max(rows.zero - 1, 0)


@pytest.mark.parametrize("kind", ["zeros", "common"])
def test_figures_without_rows_that_nobody_trained_are_given(kind: str) -> None:
    trained = 0.3 * RNG.normal(size=(100, H)) + 0.5
    common = np.zeros(H) if kind == "zeros" else np.full(H, -2.0)
    matrix = np.vstack([trained, np.tile(common, (100, 1))])
    note = note_on_rows(matrix, geometry.measure(matrix))
    kept = trained if kind == "zeros" else np.vstack([trained, common[None]])
    assert note is not None and note.startswith(f"{100 if kind == 'zeros' else 99} of 200 rows are unused")
    assert f"mean shift ratio is {geometry.mean_shift_ratio(kept):.3f} (" in note
    assert f"isotropy {geometry.isotropy(kept):.3f} (" in note
    assert note_on_rows(trained, geometry.measure(trained)) is None


def test_rows_beyond_the_tokenizer_are_told(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": E.astype("f4")}, tmp_path / "model.safetensors")
    vocabulary = {f"w{i}": i for i in range(180)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    ((found,), _) = audit_models([str(tmp_path)], ())
    assert found.findings[0].text.startswith("20 of 200 rows are unused or repeated: 20 beyond the tokenizer's last")
    ((chosen,), _) = audit_models([str(tmp_path)], (), tensor="model.embed_tokens.weight")
    assert "beyond" not in chosen.findings[0].text, "the rows of any tensor may be no tokens"


def test_isotropy_says_nothing_where_all_rows_are_short() -> None:
    short = findings(geometry.measure(1e-6 * (E + 1)))
    assert [(f.level, "is not judged" in f.text) for f in short[1:]] == [("note", True)]


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e305, 1e-300])
def test_the_range_of_float64_is_kept(scale: float, tmp_path: Path) -> None:
    usual, scaled = (audited(s * E, tmp_path).measured for s in (1.0, scale))
    for name in ("mean_shift_ratio", "inverse_condition", "logit_bound_ratio"):
        assert getattr(scaled, name) == pytest.approx(getattr(usual, name), rel=1e-9)
    assert scaled.mean_of_norms / scale == pytest.approx(usual.mean_of_norms, rel=1e-9)
    assert scaled.zero_rows == 0 and scaled.isotropy == (0 if scale > 1 else 1)
