"""Completion of the command line in a real shell's terms, and how fast: without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from coupled_adam import completion, experiments
from coupled_adam.cli import app
from coupled_adam.experiments import load

#: Completes a line as the script of bash asks for it, and says what it imported that takes long.
PROGRAM = """
import sys
from coupled_adam.__main__ import main
try:
    main()
finally:
    print(*{"torch", "numpy", "transformers", "rich"} & set(sys.modules), file=sys.stderr)
"""


def completed(line: str, directory: Path) -> list[str]:
    """What is offered for the last word of the line, which may be empty."""
    words = f"coupled-adam {line}"
    environment = {
        **os.environ,
        "_COUPLED_ADAM_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, encoding="utf-8", env=environment, cwd=directory
    )
    assert (result.returncode, result.stderr) == (0, "\n"), "what takes long is not imported"
    return result.stdout.split()


LINES = {
    "": sorted(typer.main.get_command(app).commands),
    "train exp12": ["exp12A", "exp12V"],
    "train my": ["my.toml", "mydir"],
    "train mydir/": ["mydir/inner.toml"],
    "train nothing/": [],
    "train exp12V train.st": ["train.steps=50000"],
    "train my.toml train.st": ["train.steps=7"],
    "train mydir/run train.st": ["train.steps=9"],
    "train bogus train.st": [],
    "reproduce mini --only what-": ["what-tied", "what-untied"],
    "evaluate x --only ": list(completion.STAGES),
    "experiments exp35V --gpu ": list(completion.GPUS),
    "evaluate my": [],  # the shell then completes files
    "prepare wikipedia-l": ["wikipedia-leads"],
    "audit --qu": ["--quiet"],
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_completed(line: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('[run]\nname = "x"\n[train]\nsteps = 7\n', encoding="utf-8")
    (tmp_path / "mydir" / "run").mkdir(parents=True)
    (tmp_path / "mydir" / "run" / "experiment.toml").write_text(
        '[run]\nname = "x"\n[train]\nsteps = 9\n', encoding="utf-8"
    )
    (tmp_path / "mydir" / "inner.toml").touch()
    (tmp_path / "my.txt").touch()
    expected = ["mydir/inner.toml", "mydir/run"] if line == "train mydir/" else LINES[line]
    assert sorted(completed(line, tmp_path)) == sorted(expected)


def test_every_name_is_completed_from_its_beginning() -> None:
    assert set(completion.experiment("mini-")) == {name for name in experiments.names() if name.startswith("mini-")}
    assert "exp12V" in completion.experiment("") and len(completion.experiment("")) < 100
    assert completion.family("") == list(experiments.families())


@pytest.mark.parametrize("name", ["exp35V", "demo", "oec-57M-mu-centering-1e-1", "mini-muon-split-sgd-x10"])
def test_a_setting_that_is_completed_is_the_one_of_the_experiment(name: str) -> None:
    found = load(name)
    assert found.overridden([f"{key}={value}" for key, value in found.settings().items()]) == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("start", [["-m", "coupled_adam"], ["-c", "from coupled_adam.__main__ import main; main()"]])
def test_the_script_names_the_program_however_it_was_started(start: list[str], shell: str) -> None:
    result = subprocess.run(
        [sys.executable, *start, "--show-completion", shell],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert f"_COUPLED_ADAM_COMPLETE=complete_{shell}" in result.stdout and "python" not in result.stdout


def test_what_is_completed_is_what_the_commands_know() -> None:
    from coupled_adam.evaluation import stages
    from coupled_adam.lm.estimate import PEAK_FLOPS

    assert completion.STAGES == stages.STAGES and set(completion.GPUS) == set(PEAK_FLOPS)
