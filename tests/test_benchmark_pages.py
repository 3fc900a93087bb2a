"""The tables of docs/benchmarks.md are what the files in docs/results/benchmarks say, and nothing there is typed."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import harness
import pytest
from in_process import program
from test_evidence import prose

ROOT = Path(__file__).parents[1]
ALL = ROOT / "benchmarks" / "all.py"
FILES = sorted((ROOT / "docs" / "results" / "benchmarks").glob("*.json"))
MACHINE = {"processor": "A chip", "cpus": 4, "python": "3.13.0", "torch": "2.99.0"}


@pytest.fixture(scope="module")
def made() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import evidence_benchmarks

        yield evidence_benchmarks
    finally:
        sys.path.remove(str(ROOT / "tools"))


def run(figures: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A file with figures."""
    given = {"program": "p", "complete": True, "machine": MACHINE, "arguments": {"rounds": 2}, "figures": figures}
    return given | changes


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_small_and_its_medians_are_those_of_its_pairs(path: Path) -> None:
    found = json.loads(path.read_text("utf-8"))
    assert path.stat().st_size < 60_000 and path.read_text("utf-8") == harness.written(found)
    assert found["machine"]["processor"] and "torch" in found["machine"]
    for name, figures in found["figures"].items():
        if "pairs" in figures:
            pairs = harness.Pairs([tuple(pair) for pair in figures["pairs"]])
            assert figures["ratio"] == pytest.approx(pairs.ratio, rel=1e-3), name
            assert [figures["ours"], figures["theirs"]] == pytest.approx([pairs.ours, pairs.theirs], rel=1e-3), name


def test_every_file_stands_on_a_page(made: ModuleType) -> None:
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))
    shown = set(re.findall("<!-- evidence: benchmark-(.*?) -->", text))
    assert set(made.names(ROOT / "docs" / "results")) == shown != set()


#: A time, a size or a rate as programs measure it, or a ratio.
MEASURED = re.compile(
    r"\d(?:[\d.,–]*\d)?\s(?:ms|µs|s|GB/s|MB/s|[MG]iB|MB|tokens/s)(?!\w)|(?<![\d.])\d+\.\d+(?![\d.])|\d%"
)

#: Of the bound that is explained, no measurement.
SAID = {"0%"}


def test_no_measured_figure_is_typed_into_the_page() -> None:
    text = prose((ROOT / "docs" / "benchmarks.md").read_text("utf-8"))
    assert {match[0] for match in MEASURED.finditer(text)} - SAID == set()


def test_such_figures_would_be_found() -> None:
    found = MEASURED.findall(
        "takes 12 ms instead of 1,017 ms, at 26–33 GB/s; 147 MiB, 1.01, 0.5% and 5 % of 9,100 tokens/s"
    )
    assert found == ["12 ms", "1,017 ms", "26–33 GB/s", "147 MiB", "1.01", "0.5", "9,100 tokens/s"]
    assert MEASURED.findall("50,304 × 768, V = 8,192 in 64 blocks, 24/28, two seconds, GPT-2 124M") == []


@pytest.mark.parametrize(
    ("unit", "figure", "shown"),
    [
        ("s", 0.0168, "16.8 ms"),
        ("s", 1.5, "1.50 s"),
        ("s", 0.1234, "123 ms"),
        ("ms", 0.25, "0.25 ms"),
        ("bytes", 147.375 * 2**20, "147.4 MiB"),
        ("tokens/s", 6892.3, "6,892 tokens/s"),
    ],
)
def test_figures_have_their_units(made: ModuleType, unit: str, figure: float, shown: str) -> None:
    pairs = harness.Pairs([(figure, 2 * figure)])
    (_, _, row) = rows(made.table(run({"a ÷ b": pairs.figures(unit)})))
    assert row[:5] == ["a ÷ b", shown, row[2], "0.50", "0.50–0.50"]


@pytest.mark.parametrize(
    ("ratio", "wanted", "met"),
    [
        (0.7, {"target": 0.7}, True),
        (0.704, {"target": 0.7}, True),  # shown as 0.70
        (0.71, {"target": 0.7}, False),
        (1.25, {"target": 1.25, "at_least": True}, True),
        (1.24, {"target": 1.25, "at_least": True}, False),
    ],
)
def test_a_target_is_met_or_missed(made: ModuleType, ratio: float, wanted: dict[str, Any], met: bool) -> None:
    text = made.table(run({"a ÷ b": harness.Pairs([(ratio, 1.0)]).figures(**wanted)}))
    sign = "≥" if "at_least" in wanted else "≤"
    assert f"{sign} {wanted['target']:g} |" in text
    assert ("The target is met." in text) is met
    assert (f"Targets met: 0 of 1. Missed: a ÷ b ({ratio:.2f}; {sign} {wanted['target']:g})." in text) is not met


def test_a_step_is_held_against_the_bandwidth(made: ModuleType) -> None:
    further = {"moves": [24e6, 28e6], "bandwidth": {"copy": 8e9, "in_place": 12e9, "read": 10e9}}
    pairs = harness.Pairs([(0.004, 0.0035)])
    text = made.table(run({"a ÷ b": pairs.figures() | further, "c ÷ d": pairs.figures()}))
    assert [row[-2:] for row in rows(text)[2:]] == [["24 MB / 28 MB", "50% / 67%"], ["", ""]]
    assert "a copy moves 8 GB/s, a product in place moves 12 GB/s, a sum reads 10 GB/s." in text


def test_whatever_a_program_writes_has_a_place(made: ModuleType) -> None:
    sent = {"collectives": ["1 allreduce", "nothing"], "sent": [1032, 0]}
    figures = {
        "alone": [0.2, 0.1, 0.3],
        "beside": [0.4, 0.4, 0.4],
        "a ÷ b": harness.Pairs([(1.0, 2.0)]).figures() | sent,
        "bytes": {"unit": "bytes", "ours": 2**20, "theirs": 2**21, "ratio": 0.5, "target": 0.51},
        "a ÷ peer": {"absent": "not installed (No module named 'peer')"},
    }
    text = made.table(run(figures, complete=False))
    assert text.startswith("A chip, 4 CPUs; Python 3.13.0, torch 2.99.0 (rounds 2); interrupted:\n\n| work |")
    assert "| alone | 200 ms | 100 ms–300 ms | 1.00 |" in text and "| beside | 400 ms | 400 ms–400 ms | 2.00 |" in text
    assert (
        "| 1 allreduce / nothing | 1,032 / 0 |" in text and "| bytes | 1.0 MiB | 2.0 MiB | 0.50 |  | ≤ 0.51 |" in text
    )
    assert text.endswith("Not measured: a ÷ peer: not installed (No module named 'peer').")


def test_machines_follow_each_other(made: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for name, cpus in (("one", 1), ("two", 64)):
        content = run({made.WHOLE_STEP: harness.Pairs([(cpus, 64.0)]).figures()}, machine=MACHINE | {"cpus": cpus})
        (tmp_path / "benchmarks" / f"optimizer_step.{name}.json").write_text(harness.written(content), "utf-8")
    results = made.Results(tmp_path)
    text = made.tables(results, "optimizer_step")
    assert text.index("1 CPU;") < text.index("64 CPUs;") and text.count("| --- |") == 2
    assert made.clipped_step(results) == "0.016 to 1.00"
    with pytest.raises(made.NotYet, match=r"there is no benchmarks/training\.\*\.json"):
        made.runs(results, "training")


@pytest.fixture
def small_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in place of the benchmarks: one that measures, one that fails."""
    good = "import harness\na = harness.parser('p').parse_args()\nwith harness.results(a) as r: r.add('x', [1.0])\n"
    (tmp_path / "good.py").write_text(good, "utf-8")
    (tmp_path / "bad.py").write_text(good.replace("r.add('x', [1.0])", "raise SystemExit(3)"), "utf-8")
    source = ALL.read_text("utf-8")
    start, end = source.index("RUNS: dict"), source.index("ON_GPUS =")
    copy = tmp_path / "all.py"
    copy.write_text(source[:start] + "RUNS = {'good': ['good.py'], 'bad': ['bad.py']}\n" + source[end:], "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(ALL.parent))
    return copy


@pytest.mark.long
def test_a_run_that_fails_keeps_no_other_from_running(small_runs: Path, tmp_path: Path) -> None:
    into = ["--out", str(tmp_path / "made"), "--machine", "m"]
    first = program(small_runs, "bad", "good", *into)
    assert first.returncode == 1
    completes = {p.name: json.loads(p.read_text())["complete"] for p in (tmp_path / "made").iterdir()}
    assert completes == {"good.m.json": True, "bad.m.json": False}
    again = program(small_runs, "--missing", *into)
    assert "== good: left out, good.m.json is there" in again.stdout and "== bad: left out" not in again.stdout


@pytest.mark.parametrize(("arguments", "told"), [(["x"], "no run x; there are opt"), (["--machine", "a/b"], "'a/b'")])
def test_bad_arguments_are_named(arguments: list[str], told: str) -> None:
    result = program(ALL, *arguments)
    assert result.returncode == 2 and told in result.stderr
