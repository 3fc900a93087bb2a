"""The programs that measure what a page says in passing give what is committed, and measure nothing twice."""

import csv
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from coupled_adam.lm.batches import Batches
from coupled_adam.lm.config import Model
from coupled_adam.lm.model import build_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def tool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A program of tools/."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield import_module(request.param)
    for name in (request.param, "short_runs", "tables"):
        sys.modules.pop(name, None)


def lines_of(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("tool", ["toy_drift"], indirect=True)
def test_the_toy_drifts_as_committed(tool: ModuleType) -> None:
    (line,) = [line for line in lines_of("toy-drift.csv") if line["seed"] == "1"]
    assert {**tool.shares(1), "seed": 1} == pytest.approx({key: float(value) for key, value in line.items()}, rel=0.05)


@pytest.mark.parametrize("tool", ["eight_bit_error"], indirect=True)
def test_the_error_of_eight_bits_is_as_committed(tool: ModuleType) -> None:
    (line,) = [line for line in lines_of("eight-bit-error.csv") if (line["beta1"], line["seed"]) == ("0.9", "1")]
    assert tool.error(0.9, 1) == pytest.approx(float(line["error"]), rel=0.02)


@pytest.mark.parametrize("tool", ["finetuning"], indirect=True)
@pytest.mark.parametrize("best", range(5))
@pytest.mark.parametrize("start", range(5))
def test_the_best_of_a_valley_is_found_from_anywhere(tool: ModuleType, best: int, start: int) -> None:
    values = [10.0**i for i in range(5)]
    assert tool.downhill(values, values[start], lambda value: abs(values.index(value) - best)) == values[best]


@pytest.mark.parametrize("tool", ["short_runs"], indirect=True)
def test_a_line_is_measured_once(tool: ModuleType, tmp_path: Path) -> None:
    measured = []

    def measure() -> dict[str, float]:
        measured.append(1)
        return {"loss": 5.25}

    for _ in range(2):  # the second time from the file
        table = tool.Table(tmp_path / "table.csv", ("arm", "lr"))
        for lr in (0.001, 3e-5):
            assert float(table.line("adamw", lr, measure=measure)["loss"]) == 5.25
    assert len(measured) == 2
    assert (tmp_path / "table.csv").read_text() == "arm,lr,loss\nadamw,0.001,5.25\nadamw,3e-05,5.25\n"


@pytest.mark.parametrize("tool", ["short_runs"], indirect=True)
@pytest.mark.parametrize("name", ["adamw", "coupled_adam"])
def test_training_lowers_the_loss_and_repeats(tool: ModuleType, name: str) -> None:
    shards = [torch.arange(600).remainder(17).numpy().astype("uint16")]
    batches = Batches(shards, 8, 4, 1, 17)
    losses = []
    for _ in range(2):
        model = build_model(Model(n_layers=1, n_heads=1, hidden_size=8), 17, 8, 1)
        before = tool.loss_of(model, batches, range(4))
        tool.train(model, batches, tool.optimizer_of(name, model, 1e-2, 3.0, 0.1), 40, 4)
        losses.append(tool.loss_of(model, batches, range(4)))
    assert losses[0] == losses[1] < before - 0.5


def test_the_audit_that_the_readme_shows_is_the_committed_one() -> None:
    (line,) = [line for line in lines_of("audited.csv") if line["model"].startswith("SmolLM2")]
    page = (ROOT / "README.md").read_text("utf-8")
    shown = " ".join(page.split("SmolLM2-135M-Instruct.Q4_1.gguf: ", 1)[1].split("\n\nOnly")[0].split())
    assert shown.startswith(line["summary"])
    figures = {
        "mean shift ratio ‖μ‖ʳ": "mean_shift_ratio",
        "isotropy Iso": "isotropy",
        "mean cosine": "mean_cosine",
        "isotropy, centered": "isotropy_centered",
    }
    for label, name in figures.items():
        assert f"{label} {float(line[name]):.3f}" in shown


def test_the_summary_that_the_audit_page_shows_is_the_committed_one() -> None:
    (line,) = [line for line in lines_of("audited.csv") if line["model"] == "all-MiniLM-L6-v2"]
    assert f"    all-MiniLM-L6-v2: {line['summary']}\n" in (ROOT / "docs" / "audit.md").read_text("utf-8")
