"""The programs in benchmarks/: what they share, and that each can write its figures as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import harness
import pytest

PROGRAMS = sorted(Path(harness.__file__).parent.glob("*.py"))


def test_sides_take_turns_and_a_slow_spell_hits_both() -> None:
    calls: list[str] = []
    times = iter([1.0, 2.0, 2.0, 1.0, 30.0, 60.0, 2.0, 1.0])

    def clock(step: harness.Step) -> float:
        step()
        return next(times)

    found = harness.in_pairs(lambda: calls.append("ours"), lambda: calls.append("theirs"), 2, clock)
    assert calls == ["ours", "theirs", "ours", "theirs"] + ["ours", "theirs", "theirs", "ours"] * 2
    assert found.pairs == [(1.0, 2.0), (1.0, 2.0), (30.0, 60.0), (1.0, 2.0)]
    assert (found.ratio, found.middle_half, found.ours, found.theirs) == (0.5, (0.5, 0.5), 1.0, 2.0)
    times = iter(range(6))
    assert harness.in_turn({"a": lambda: None, "b": lambda: None}, 3, clock) == {"a": [0, 3, 4], "b": [1, 2, 5]}


def test_figures_are_written_with_the_machine_and_the_arguments_also_if_interrupted(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = harness.parser("what", rounds=7).parse_args(["--json", str(file)])
    with pytest.raises(KeyboardInterrupt), harness.results(arguments) as results:
        results.add("a step", harness.Pairs([(1.0, 2.0)]).figures())
        raise KeyboardInterrupt
    found = json.loads(file.read_text())
    assert found["figures"]["a step"]["ratio"] == 0.5 and found["arguments"]["rounds"] == 7
    assert found["machine"]["torch"] and found["machine"]["processor"]


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.stem not in ("harness", "all")], ids=lambda p: p.stem)
def test_every_program_measures_through_the_harness(program: Path) -> None:
    source = program.read_text("utf-8")
    assert "import harness" in source and "[--json FILE]" in source
    assert "harness.parser(__doc__" in source and "harness.results(" in source
    assert "perf_counter" not in source


@pytest.mark.long
def test_a_program_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    program = next(p for p in PROGRAMS if p.stem == "embedding_metrics")
    command = [sys.executable, program, "--vocabulary", "50", "--width", "4", "--rounds", "2", "--live", "--json", file]
    subprocess.run(command, check=True, capture_output=True)
    figures = json.loads(file.read_text())["figures"]
    assert {"health", "drift, AdamW", "step, Coupled Adam"} <= figures.keys()
    assert all(len(seconds) == 2 for seconds in figures.values())
