"""The verdict: the words fit the metrics, the ranges are those that are named, and the advice fits the matrix."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coupled_adam import geometry
from coupled_adam.audit.advice import SECTION, advice
from coupled_adam.audit.embedding_files import Embeddings, Kind, Origin
from coupled_adam.audit.verdict import CRITERIA, ISOTROPY, SHIFT, Finding, findings, ranges, summary

CLOUD = 0.2 * np.random.default_rng(0).standard_normal((3000, 16))
STRETCHED = CLOUD * np.array([10.0, *[1.0] * 15])
COUNTS = np.arange(1, 3001)
RATED = geometry.Benchmark("rated", tuple((f"{i}", f"{i + 1}", float(CLOUD[i] @ CLOUD[i + 1])) for i in range(40)))
DOCS = Path(__file__).parents[2] / "docs" / "audit.md"


def judged(matrix: np.ndarray) -> list[Finding]:
    return findings(geometry.measure(matrix, counts=COUNTS, token_of=int, benchmarks=[RATED]))


def test_a_shifted_matrix_is_told_from_a_centered_one() -> None:
    good, poor = judged(CLOUD), judged(CLOUD + 1)
    assert [f.level for f in good[:2]] == ["good", "good"]
    assert [f.level for f in poor[:2]] == ["poor", "poor"]
    assert poor[2].level == "note" and "the shift is the cause" in poor[2].text
    assert f"{geometry.mean_shift_ratio(CLOUD + 1):.3f}" in poor[0].text


def test_a_dominant_direction_is_not_blamed_on_the_shift() -> None:
    assert "a few other directions dominate" in findings(geometry.measure(STRETCHED - STRETCHED.mean(0)))[2].text


def test_a_high_isotropy_does_not_contradict_a_shift() -> None:
    shift, isotropy = findings(geometry.measure(0.05 * (CLOUD + 1)))
    assert (shift.level, isotropy.level) == ("poor", "good")
    assert "despite the shift" in isotropy.text and "no direction is preferred" not in isotropy.text


def test_what_is_not_known_is_not_judged() -> None:
    assert len(findings(geometry.measure(CLOUD))) == 2
    assert len(judged(CLOUD)) == 4


def test_each_range_is_said_once_and_in_no_finding() -> None:
    found = judged(CLOUD) + judged(CLOUD + 1)
    assert len(ranges(found)) == len(CRITERIA)
    assert [label for label, _ in ranges(findings(geometry.measure(CLOUD)))] == [
        "mean shift ratio ‖μ‖ʳ",
        "isotropy Iso",
    ]
    for finding in found:
        assert not any(criterion.range in finding.text or "the paper" in finding.text for criterion in CRITERIA)
    text = dict(ranges(found))
    assert (
        "up to 0.1, poor above 0.4; the paper reports 0.73–0.82 with AdamW, 0.01–0.03" in text["mean shift ratio ‖μ‖ʳ"]
    )
    assert "from 0.8, poor below 0.4; the paper reports 0.1–0.28 with AdamW, 0.83–0.97" in text["isotropy Iso"]


def test_the_levels_change_at_the_bounds() -> None:
    for criterion, better in ((SHIFT, -1e-9), (ISOTROPY, 1e-9)):
        values = [bound + sign * better for bound in (criterion.good, criterion.poor) for sign in (1, -1)]
        judged = [replace(criterion, value=lambda m, v=v: v).judge(geometry.measure(CLOUD)) for v in values]
        assert [each.level for each in judged] == ["good", "fair", "fair", "poor"]


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (CLOUD, ["Centered", "isotropic"]),
        (CLOUD + 1, ["Strongly shifted", "anisotropic", "the shift is the cause"]),
        (CLOUD + 0.05, ["Shifted off", "evenly spread"]),
        (0.05 * (CLOUD + 1), ["Strongly shifted", "evenly spread"]),
        (STRETCHED, ["Centered", "anisotropic", "a few other directions"]),
        (np.where(np.arange(16) == 3, 0, CLOUD), ["Centered", "rank 15 of 16"]),
        (1e-6 * CLOUD, ["Centered", "too short"]),
        (np.zeros((9, 4)), ["All 9 rows are zeros"]),
        (np.ones((9, 4)), ["All 9 rows are the same"]),
    ],
)
def test_the_summary_is_one_line(matrix: np.ndarray, said: list[str]) -> None:
    text = summary(geometry.measure(matrix))
    assert "\n" not in text and text.endswith((".", "?")) and all(words in text for words in said), text


def advised(matrix: np.ndarray, kind: str, origin: Kind = "safetensors", **values: object) -> tuple[str, str]:
    tensor = torch.tensor(matrix)
    found = Embeddings("m", Origin(origin, DOCS.parent, "head.weight", {}, None), tensor, **values)
    given = advice(found, kind, geometry.measure(matrix))
    return given.case, given.text


CASES = [
    (CLOUD + 1, "tied", "safetensors", {"tied": True}, "Tied models", "as it is"),
    (CLOUD + 1, "output", "safetensors", {"tied": False, "output": torch.ones(2, 2)}, "Untied models", "--center COPY"),
    (CLOUD + 1, "output", "gguf", {"tied": False, "output": torch.ones(2, 2)}, "Untied models", "GGUF"),
    (CLOUD + 1, "input", "safetensors", {"tied": False}, "Features", "subtract their mean first"),
    (CLOUD + 1, "embedding", "safetensors", {"tied": False}, "Features", "subtract their mean first"),
    (CLOUD + 1, "embedding", "numpy", {}, "Retrieval", "from queries too"),
    (CLOUD + 1, "tied", "run", {"tied": True}, "Training", "Coupled Adam"),
    (CLOUD, "tied", "run", {"tied": True}, "Nothing to correct", "as they are"),
    (STRETCHED, "tied", "safetensors", {"tied": True}, "Features", "All-but-the-Top"),
    (STRETCHED + 1, "tied", "safetensors", {"tied": True}, "Tied models", "All-but-the-Top"),
    (np.ones((9, 4)), "tied", "safetensors", {"tied": True}, "Nothing to judge", "--tensor"),
    (np.ones((9, 4)), "embedding", "numpy", {}, "Nothing to judge", "how the array was made"),
    (CLOUD[:40] + 0.02, "embedding", "numpy", {}, "Nothing to judge", "Audit more rows"),
]


@pytest.mark.parametrize(("matrix", "kind", "origin", "values", "case", "said"), CASES)
def test_the_advice_fits_the_matrix_and_its_case_is_documented(
    matrix: np.ndarray, kind: str, origin: Kind, values: dict[str, object], case: str, said: str
) -> None:
    found, text = advised(matrix, kind, origin, **values)
    assert found == case and said in text
    section = DOCS.read_text("utf-8").partition(f"## {SECTION}\n")[2].partition("\n## ")[0]
    assert f"### {case}\n" in section
