"""What a report reads is what was measured: other kinds of values are named, and never reach the table."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up import diverge, write_run
from typer.testing import CliRunner

from coupled_adam.cli import app
from coupled_adam.errors import InputError
from coupled_adam.evaluation.results import REMEDY, write_results
from coupled_adam.evaluation.stages import read_stage
from coupled_adam.report import aggregate

TASK = {"acc": 0.4, "acc_stderr": 0.01, "task": "race", "version": 2, "limit": None, "definition": "d", "harness": "h"}
DOWNSTREAM = {
    "acc": 0.4,
    "acc_stderr": 0.01,
    "complete": True,
    "n_tasks": 1,
    "mean_over": ["race"],
    "settings": {"model_digest": "w", "limit": None},
    "tasks": {"race": TASK},
    "failed": {"arc_easy": "no data"},
    "earlier": [TASK],
}

#: Values of another kind. Some are of the right kind somewhere: null for a figure that is not defined, say.
OTHERS: tuple[Any, ...] = (None, "<b>text</b>", [], {}, True, math.nan, [["x"]], {"x": {"y": None}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    run = write_run(directory, "exp")
    (run / "evaluation" / "downstream.json").write_text(json.dumps(DOWNSTREAM))
    (run / "environment.json").write_text(json.dumps({"corpus": "c", "packages": {"coupled-adam": "1.2.3"}}))
    diverge(write_run(directory, "gone", seed=2))
    return directory


def variants(value: Any) -> Iterator[Any]:
    """The value with one thing in it of another kind, at every place up to three levels down."""

    def places(inner: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        if path:
            yield path
        if len(path) < 3:
            keys = list(inner) if isinstance(inner, dict) else range(len(inner[:1])) if isinstance(inner, list) else ()
            for key in keys:
                yield from places(inner[key], (*path, key))

    yield from OTHERS
    for *outer, last in places(value, ()):
        for other in OTHERS:
            copy = json.loads(json.dumps(value))
            holder = copy
            for key in outer:
                holder = holder[key]
            holder[last] = other
            yield copy
        copy = json.loads(json.dumps(value))
        holder = copy
        for key in outer:
            holder = holder[key]
        del holder[last]
        yield copy


@pytest.mark.parametrize(
    "name",
    [
        "exp-s1/evaluation/validation.json",
        "exp-s1/evaluation/embeddings.json",
        "exp-s1/evaluation/downstream.json",
        "exp-s1/environment.json",
        "gone-s2/diverged.json",
    ],
)
def test_values_of_another_kind_are_named(name: str, made: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made, tmp_path / "made"))
    file, refused = directory / name, 0
    for content in variants(json.loads(file.read_text())):
        file.write_text(json.dumps(content))
        try:
            (found, *_) = sorted(aggregate.read_runs([directory]), key=lambda run: run.name)
            values, sample = aggregate.as_csv([found]).split("\n", 1)[1], found.token_sample
        except InputError as error:
            assert str(error).startswith(f"{file}: damaged (") and "\n" not in str(error)
            refused += 1
            continue
        words = () if file.name == "environment.json" else ("text",)  # the version there may be any word
        assert not any(word in values for word in (*words, "nan", "inf", "[", "{")), content
        assert sample is None or len(sample.norm) == len(sample.text) == len(sample.along)
    assert refused > 10


def test_the_command_says_it_in_one_line(made: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made, tmp_path / "made"))
    file = directory / "exp-s1" / "evaluation" / "validation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"loss": "x"}))
    result = CliRunner().invoke(app, ["report", str(directory), "--out", str(tmp_path / "out")])
    assert str(result.exception) == f"{file}: damaged (loss: should be a finite number, got 'x'); {REMEDY}"
    assert not (tmp_path / "out").exists()


def test_a_figure_that_changed_on_the_disk_is_named(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "exp-s1", tmp_path / "run"))
    file = run / "evaluation" / "validation.json"
    write_results(file, json.loads(file.read_text()))
    whole = read_stage(run, "validation")
    assert whole is not None and whole["loss"] == 6
    file.write_text(file.read_text().replace('"loss": 6.0', '"loss": 5.0'))
    with pytest.raises(InputError, match=r"validation\.json: damaged \(its checksum is not the recorded one\); delete"):
        aggregate.read_runs([run])
