"""The notebook: in the repository without outputs, and each of its cells runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from paragraphs import paragraphs

NOTEBOOK = Path(__file__).parents[1] / "examples" / "audit_and_demo.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_stored_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []
    assert NOTEBOOK.stat().st_size < 20_000


def test_its_links_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.long
def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, with a text and a number of steps that take seconds."""
    (tmp_path / "text.txt").write_text(paragraphs(1500), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in CODE:
        if "STEPS =" in code:
            code, changed = re.subn(r"^STEPS = \d+", "STEPS = 12", code, flags=re.MULTILINE)
            code, also = re.subn(r"^TEXT = None", 'TEXT = Path("text.txt")', code, flags=re.MULTILINE)
            assert (changed, also) == (1, 1)
        exec(compile(code, "a cell of the notebook", "exec"), names)
    printed = capsys.readouterr().out
    shifts = {name: run["figures"]["mean_shift_ratio"] for name, run in names["results"]["runs"].items()}
    assert shifts["coupled_adam"] < 0.1 < shifts["adamw"]
    assert [matrix.measured.mean_shift_ratio for matrix in names["audited"]] == pytest.approx(list(shifts.values()))
    for value in shifts.values():
        assert printed.count(f"{value:.3f}") >= 3, "in the cell after the training, in the audit's summary and table"
    assert len(names["maps"]) == 2
    assert names["before"] > 0.3 and abs(names["after"]) < 0.01 and "mean cosine of two rows: 0." in printed
