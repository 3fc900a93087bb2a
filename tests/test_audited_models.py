"""The program behind docs/models.md, on wheels that are made here."""

import csv
import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from coupled_adam import geometry
from coupled_adam.cli import app

ROOT = Path(__file__).parents[1]
WORDS = sorted({word for each in geometry.published_benchmarks() for pair in each.pairs for word in pair[:2]})[:900]
E = np.random.default_rng(0).normal(size=(len(WORDS), 8)).astype("f4") * np.linspace(2, 1, len(WORDS))[:, None] + 0.5


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import audited_models

    monkeypatch.setattr(audited_models, "TABLE", tmp_path / "audited.csv")
    yield audited_models


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["audited_models.py", *map(str, arguments)])
    tool.main()


def table(tool: ModuleType) -> list[dict[str, str]]:
    with tool.TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def wheel(tool: ModuleType, directory: Path, words: bool) -> None:
    """Make the wheel of a package with vectors, and perhaps their words, and audit that alone."""
    np.save(directory / "vectors.npy", E)
    parquet.write_table(pa.table({"index": [word.lower() for word in WORDS]}), directory / "words")
    with zipfile.ZipFile(directory / "a_b-1.0-py3-none-any.whl", "w") as made:
        made.write(directory / "vectors.npy", "a_b/vectors.npy")
        made.write(directory / "words", "a_b/words")
    tool.MODELS = (tool.Packaged("made up", "a-b", "1.0", "a_b/vectors.npy", words="a_b/words" if words else None),)


@pytest.mark.parametrize("words", [False, True])
def test_a_model_in_a_wheel_is_measured(
    tool: ModuleType, words: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "MODELS", ())
    wheel(tool, tmp_path, words)
    run(tool, monkeypatch, tmp_path)
    (row,) = table(tool)
    assert (row["model"], row["source"], row["tokens"], row["hidden_size"]) == ("made up", "a-b 1.0", "900", "8")
    assert float(row["mean_shift_ratio"]) == pytest.approx(geometry.mean_shift_ratio(E), rel=1e-4)
    assert float(row["mean_cosine"]) == pytest.approx(geometry.mean_cosine(E), rel=1e-4)
    if words:
        assert float(row["norm_frequency_spearman"]) > 0.3 and abs(float(row["word_similarity"])) < 50
    else:
        assert (row["norm_frequency_spearman"], row["word_similarity"]) == ("", "")


def test_a_wheel_that_is_not_there_is_named_and_its_row_stays(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "MODELS", ())
    wheel(tool, tmp_path, words=False)
    run(tool, monkeypatch, tmp_path)
    before = table(tool)
    tool.MODELS = (replace(tool.MODELS[0], version="2.0"),)
    run(tool, monkeypatch, tmp_path)
    assert table(tool) == before and "a-b==2.0: no wheel in" in capsys.readouterr().err


def test_an_audit_of_ones_own_is_added_once_and_stands_in_the_table(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "mine.npy", E)
    printed = CliRunner().invoke(app, ["audit", str(tmp_path / "mine.npy"), "--json"]).stdout
    (tmp_path / "mine.json").write_text(printed, encoding="utf-8")
    for _ in range(2):
        run(tool, monkeypatch, "--add", tmp_path / "mine.json", "--source", "a|b 1.0", "--name", "mine")
    (row,) = table(tool)
    (found,) = json.loads(printed)
    assert row["summary"] == found["summary"] and row["model"] == "mine"
    import evidence

    text = evidence.BLOCKS["models"](evidence.Results(tmp_path))
    cells = text.splitlines()[-1].split(" | ")
    assert cells[:2] == ["| mine", "a\\|b 1.0"]
    assert cells[3:6] == ["–", "900 × 8", f"{geometry.mean_shift_ratio(E):.3f}"]


def test_every_row_of_a_package_is_in_the_table_and_pinned(tool: ModuleType) -> None:
    with (ROOT / "docs" / "results" / "audited.csv").open(encoding="utf-8", newline="") as file:
        found = {(row["model"], row["source"]) for row in csv.DictReader(file)}
    assert {(model.name, f"{model.package} {model.version}") for model in tool.MODELS} <= found


@pytest.mark.parametrize("arguments", [[], ["wheels", "--packages"], ["--add", "x.json"]])
def test_what_cannot_be_done_is_said(
    tool: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, *arguments)
    assert "audited_models.py: error: " in capsys.readouterr().err
