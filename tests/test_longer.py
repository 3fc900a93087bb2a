"""A run that is trained longer, by the command line; and what a report, a card, the demo and a suite make of it."""

import json
from pathlib import Path

import pytest
from conftest import tiny_experiment
from in_process import command
from paragraphs import paragraphs

from coupled_adam import demo, experiments, reproduce
from coupled_adam.errors import InputError
from coupled_adam.evaluation.during_training import evaluator
from coupled_adam.lm import train as loop
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles
from coupled_adam.report.aggregate import groups, read_runs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, ``runs/tiny``, of ``tiny.toml``, and its corpus."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(paragraphs(200), encoding="utf-8")
    Path("tiny.toml").write_text(tiny_experiment().to_toml(), encoding="utf-8")
    assert (
        command(
            "prepare", *["text.txt", "--vocab-size", "300", "--sequence-length", "16", "--out", "corpus"]
        ).returncode
        == 0
    )
    assert command("train", *["tiny.toml", "--data", "corpus"]).returncode == 0
    return tmp_path


@pytest.mark.parametrize(
    "asked", ["runs/tiny", "./runs/tiny/", "tiny.toml --data corpus", "tiny.toml --data corpus -q"]
)
def test_a_larger_number_of_steps_goes_on(asked: str, place: Path) -> None:
    longer = command("train", *asked.split(), "train.steps=30")
    assert longer.returncode == 0 and longer.stdout.startswith("runs/tiny: step 30: ")
    assert "The result differs from that of a run of 30 steps from the start" in longer.stderr
    again = command("train", *asked.split(), "train.steps=30")
    assert again.returncode == 0 and again.stdout == longer.stdout and "differs from that of" not in again.stderr
    before = command("train", *asked.split(), "train.steps=24")
    assert before.returncode == 2 and "set train.steps=30, or choose another directory" in before.stderr
    card = command("evaluate", "runs/tiny", "--only", "validation", "--only", "embeddings", "--only", "export")
    assert card.returncode == 0
    told = Path("runs/tiny/model/README.md").read_text("utf-8")
    assert "(step 30 of 30; up to step 24 as a run of 24 steps)" in told


@pytest.mark.parametrize("asked", ["runs/tiny", "runs/tiny/"])
def test_a_directory_resumes_its_run(asked: str, place: Path) -> None:
    assert "already finished with 24 steps" in command("train", asked).stderr
    for name, message in {
        "runs/no": "runs/no: no such directory",
        "corpus": "corpus: not a run: it has no experiment.toml",
        "./runs": "./runs: not a run: it has no experiment.toml",
        "nothing": "nothing: no experiment of that name; the nearest is",
    }.items():
        refused = command("train", name)
        assert refused.returncode == 2 and refused.stderr.startswith(f"coupled-adam: {message}")
    Path("corpus").rename("moved")
    lost = command("train", asked, "train.steps=30")
    assert lost.returncode == 2 and lost.stderr.endswith("was not found; pass its directory with --data\n")
    assert command("train", asked, "train.steps=30", "--data", "moved").returncode == 0


def test_a_report_compares_it_with_its_like_alone(place: Path) -> None:
    tiny = tiny_experiment().with_values(train__steps=30)
    for name in ("whole", "parts"):
        for method in ("adamw", "coupled_adam"):
            run = tiny.with_values(run__name=f"{name}-{method}", optimizer__embedding__name=method)
            Path(f"{name}-{method}.toml").write_text(run.to_toml(), encoding="utf-8")
            for steps in (24, 30) if name == "parts" else (30,):
                done = command("train", f"{name}-{method}.toml", f"train.steps={steps}", "--data", "corpus")
                assert done.returncode == 0, done.stderr
            assert (
                command(
                    "evaluate", f"runs/{run.run.name}", *["--only", "validation", "--only", "embeddings"]
                ).returncode
                == 0
            )
    directories = [Path(f"runs/{name}-{method}") for name in ("whole", "parts") for method in ("adamw", "coupled_adam")]
    runs = read_runs(directories)
    assert {run.name: run.length for run in runs} == {
        "whole-adamw": "1,920",
        "whole-coupled_adam": "1,920",
        "parts-adamw": "1,920 (longer from 1,536)",
        "parts-coupled_adam": "1,920 (longer from 1,536)",
    }
    settings = {run.name: run.setting for run in runs}
    assert settings["parts-adamw"] == settings["parts-coupled_adam"] != settings["whole-adamw"]
    assert len(groups(runs)) == 4
    rows = json.loads(command("report", *directories, "--json").stdout)
    assert {row["name"]: row["longer_from"] for row in rows}["parts-adamw"] == "24"
    assert "1,920 (longer from 1,536)" in Path("report/report.html").read_text("utf-8")


def test_a_run_of_a_suite_that_was_trained_longer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(paragraphs(200), encoding="utf-8")

    def load(name: str, seed: int) -> Experiment:
        lr = 1e-3 if name == "A" else 2e-3
        return tiny_experiment().with_values(run__name=f"{name}-s{seed}", run__seed=seed, schedule__lr=lr)

    monkeypatch.setattr(experiments, "load", load)
    monkeypatch.setattr(experiments, "families", lambda suite: {"small": {"seeds": [1], "experiments": ["A", "B"]}})
    monkeypatch.setattr(reproduce, "source_of", lambda name: TextFiles(Path("text.txt")))
    assert reproduce.reproduce("mini", [], [], tmp_path / "out")["failed"] == {}
    assert command("train", tmp_path / "out" / "A-s1", "train.steps=30").returncode == 0
    results = reproduce.reproduce("mini", [], [], tmp_path / "out")
    assert list(results["failed"]) == ["A-s1"]
    assert "train.steps: 30 there, 24 requested" in results["failed"]["A-s1"]
    assert [row["name"] for row in results["experiments"]] == ["B"]


def test_the_demo_is_never_made_longer_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "load", lambda name: tiny_experiment())
    (tmp_path / "text.txt").write_text(paragraphs(200), encoding="utf-8")
    demo.run_demo(tmp_path / "demo", tmp_path / "text.txt", 24)
    with pytest.raises(InputError, match=r"train\.steps: 24 there, 30 requested"):
        demo.run_demo(tmp_path / "demo", tmp_path / "text.txt", 30)
    for method in demo.METHODS:
        assert command("train", tmp_path / "demo" / method, "train.steps=30").returncode == 0
    for steps in (24, 30):
        with pytest.raises(InputError, match=r"adamw was trained longer\); choose another directory with --out"):
            demo.run_demo(tmp_path / "demo", tmp_path / "text.txt", steps)


def test_figures_while_training_go_on(place: Path) -> None:
    """The evaluation that ended the first part stands in the curve of the whole."""
    experiment = tiny_experiment().with_values(train__steps=30)
    corpus = prepare(TextFiles(Path("text.txt")), experiment.data, Path("corpus"))
    loop.train(experiment, corpus, Path("again"), evaluator(experiment, corpus))
    longer = loop.train(
        experiment.with_values(train__steps=40), corpus, Path("again"), evaluator(experiment, corpus), longer=True
    )
    assert longer is not None
    lines = [json.loads(line) for line in Path("again/metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(41))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 8, 16, 24, 30, 32, 40]
