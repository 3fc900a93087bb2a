"""A suite: what is planned, and that it goes on, whatever happens to single runs."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coupled_adam import experiments, reproduce
from coupled_adam.cli import app
from coupled_adam.errors import InputError
from coupled_adam.lm import train as loop
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles


def test_the_plan_is_the_families_times_the_seeds(tmp_path: Path) -> None:
    runs = reproduce.plan("mini", [], [], tmp_path)
    first = 8 * 3 + 10 + 6 + 2 + 2 * 3  # n = 0 of the scaled family is a run of the small one
    sweeps = 6 * 6 + 6 * 5 + 3 * 4 * 2 + 3 * 2  # they share the runs that are their controls
    study = 2 * 10 + 2 * 4 + 2 * 4 + 2  # noise, one rate for all, health; what is tuned is no plan
    assert len(runs) == first + sweeps + study
    assert len({run.directory for run in runs}) == len(runs)
    assert len(reproduce.plan("mini", ["scaled"], [], tmp_path)) == 11
    assert {run.experiment.run.seed for run in reproduce.plan("mini", ["sgd"], [4, 5], tmp_path)} == {4, 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["maxi"], "maxi: unknown suite"),
        (["mini", "--only", "smal"], "smal: unknown family; choose from small, scaled, sgd, llama, long"),
        (["mini", "--seeds", "1,x"], "write integers"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["reproduce", *arguments])
    assert isinstance(result.exception, InputError) and message in str(result.exception)


@pytest.fixture
def tiny_suite(tiny, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experiments of one family, on a few sentences; the second one of them diverges with seed 2."""

    def load(name: str, seed: int) -> loop.Experiment:
        lr = 1e30 if (name, seed) == ("V", 2) else 1e-3
        values = {"run__name": f"{name}-s{seed}", "run__seed": seed, "schedule__lr": lr, "train__max_grad_norm": 1e9}
        values["optimizer__embedding__name"] = "adamw" if name == "A" else "coupled_adam"
        values["evaluation__every"] = 1 if lr > 1 else 8
        return tiny.with_values(**values)

    monkeypatch.setattr(experiments, "load", load)
    monkeypatch.setattr(experiments, "families", lambda suite: {"small": {"seeds": [1, 2], "experiments": ["A", "V"]}})
    monkeypatch.setattr(reproduce, "source_of", lambda name: TextFiles(text_file))


def test_a_failing_run_is_named_and_the_others_go_on(
    tiny_suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(experiment, *others):
        if experiment.run.name == "V-s2":
            raise OSError("No space left on device")
        return loop.train(experiment, *others)

    monkeypatch.setattr(reproduce, "train", full)
    result = CliRunner().invoke(app, ["reproduce", "mini", "--out", str(tmp_path)])
    assert result.exit_code == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["failed"] == {"V-s2": "No space left on device"} and found["diverged"] == []
    assert {row["name"]: row["runs"] for row in found["experiments"]} == {"A": 2, "V": 1}
    assert (tmp_path / "report.html").exists()
    table = list(csv.DictReader((tmp_path / "aggregate.csv").open()))
    assert [row["name"] for row in table] == ["A-s1", "A-s2", "V-s1"]
    finals = [MetricsLog(tmp_path / f"A-s{seed}" / "metrics.jsonl").read()[-1] for seed in (1, 2)]
    loss = found["experiments"][0]["figures"]["validation_loss"]
    assert loss["mean"] == pytest.approx(sum(f["validation_loss"] for f in finals) / 2)
    assert [float(row["test_loss"]) for row in table[:2]] == pytest.approx([f["validation_loss"] for f in finals])
    assert loss["deviation"] == pytest.approx(abs(finals[0]["validation_loss"] - finals[1]["validation_loss"]) / 2**0.5)


def test_a_run_that_diverges_is_a_result_and_not_trained_again(
    tiny_suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["reproduce", "mini", "--seeds", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "Diverged: V-s2" in result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["diverged"] == ["V-s2"] and found["failed"] == {}
    table = {row["name"]: row for row in csv.DictReader((tmp_path / "aggregate.csv").open())}
    assert {name: row["diverged"] for name, row in table.items()} == {"A-s2": "false", "V-s2": "true"}
    assert table["V-s2"]["test_loss"] == "" and float(table["V-s2"]["initial_loss"]) > 5
    reason = json.loads((tmp_path / "V-s2" / "diverged.json").read_text())["reason"]
    assert reason.startswith("validation loss nan"), "found before a step that would have told"
    monkeypatch.setattr(reproduce, "train", lambda *args: pytest.fail("trained again"))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert json.loads((tmp_path / "results.json").read_text()) == found
    (tmp_path / "V-s2" / "diverged.json").unlink()
    monkeypatch.setattr(reproduce, "train", loop.train)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert json.loads((tmp_path / "results.json").read_text()) == found, "the same again"


def test_what_is_finished_is_not_trained_again(tiny_suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reproduce.reproduce("mini", ["small"], [1], tmp_path)
    assert first["failed"] == {} and len(first["experiments"]) == 2
    monkeypatch.setattr(reproduce, "train", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(reproduce, "prepare", prepare)
    assert reproduce.reproduce("mini", ["small"], [1], tmp_path) == first
    two = {"small": {"seeds": [1], "experiments": ["A", "V"]}, "sgd": {"seeds": [1], "experiments": ["A"]}}
    monkeypatch.setattr(experiments, "families", lambda suite: two)
    assert reproduce.reproduce("mini", ["sgd"], [], tmp_path) == first, "over all that is there, not the family alone"
