"""What every command prints: results alone with --quiet, JSON alone with --json, nothing that an encoding garbles."""

import ast
import json
from pathlib import Path

import pytest
import typer.main
from conftest import tiny_experiment
from in_process import command
from paragraphs import paragraphs

from coupled_adam import __main__, progress, terminal
from coupled_adam.cli import app

SOURCE = Path(__main__.__file__).parent


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and an experiment on it."""
    directory = tmp_path_factory.mktemp("workplace")
    (directory / "text.txt").write_text(paragraphs(200), encoding="utf-8")
    (directory / "tiny.toml").write_text(tiny_experiment().to_toml(), encoding="utf-8")
    return directory


#: Commands in an order in which each has what it needs, and what they are to read or write.
COMMANDS = {
    "prepare": "text.txt --vocab-size 300 --sequence-length 16 --out corpus",
    "train": "tiny.toml --data corpus --out run",
    "train longer": "run train.steps=30",
    "evaluate": "run --only validation --only embeddings --only frequency",
    "export": "run --out model",
    "report": "run --out report",
    "audit": "model --html page.html",
    "experiments": "exp12V",
    "demo": "--text text.txt --steps 2 --out demo",
}


@pytest.mark.long
@pytest.mark.parametrize("as_json", [False, True])
def test_a_quiet_command_prints_what_it_prints_otherwise_and_no_more(
    workplace: Path, as_json: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results: dict[bool, dict[str, str]] = {}
    for quiet in (False, True):
        (place := tmp_path / str(quiet) / "place").mkdir(parents=True)
        for file in workplace.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        monkeypatch.chdir(place)
        results[quiet] = {}
        for name, arguments in COMMANDS.items():
            options = [*(["--quiet"] if quiet else []), *(["--json"] if as_json else [])]
            done = command(name.split()[0], *arguments.split(), *options)
            assert done.returncode == 0, done.stderr
            if as_json:
                json.loads(done.stdout)
                assert done.stdout.count("\n") == 1
            if quiet:
                warned = name == "train longer"
                assert done.stderr.count("\n") == warned, done.stderr
            elif name in ("train", "evaluate", "demo"):
                assert done.stderr
            results[quiet][name] = done.stdout
    for name in ("prepare", "export", "audit", "report", "experiments"):
        assert results[False][name] == results[True][name], name


@pytest.mark.parametrize("before", [[], ["-q"], ["--quiet"]])
def test_a_command_is_as_quiet_as_it_is_told(before: list[str]) -> None:
    for options, quiet in ((["-q"], True), ([], bool(before)), (["--quiet"], True), ([], bool(before))):
        assert command(*before, "experiments", "exp12V", *options).returncode == 0
        assert progress.is_quiet() == quiet


@pytest.mark.parametrize("name", typer.main.get_command(app).commands)
def test_every_command_has_the_common_options(name: str) -> None:
    options = {option for param in typer.main.get_command(app).commands[name].params for option in param.opts}
    assert {"--quiet", "-q", "--json"} <= options
    for spelled in ("-h", "--help"):
        assert "Example: " in command(name, spelled).stdout


#: Modules whose strings are for HTML, or are parts of words and files.
NOT_PRINTED = {"report", "words.py", "tables.py", "terminal.py"}


def test_what_we_print_has_a_plain_form() -> None:
    lacking: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        if NOT_PRINTED & set(path.relative_to(SOURCE).parts):
            continue
        tree = ast.parse(path.read_text("utf-8"))
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                for character in terminal.plain(node.value, "ascii"):
                    if not character.isascii():
                        lacking.setdefault(character, set()).add(path.name)
    assert lacking == {}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437"])
def test_a_table_stays_aligned_in_any_encoding(encoding: str, workplace: Path, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "a.npy", 1 + np.random.default_rng(0).normal(size=(60, 4)))
    result = command("audit", tmp_path / "a.npy", encoding=encoding)
    assert result.returncode == 0 and "\\u" not in result.stdout and "\\x" not in result.stdout
    assert "||mu||^r" in result.stdout
    heading, rule, *rows = result.stdout.split("\n\n")[1].splitlines()
    assert set(rule) == {" ", "-"}
    assert {len(line) for line in rows} == {len(heading)}, "the numbers end in one column"


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 130])
def test_the_experiments_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = command("experiments").stdout.splitlines()
    assert max(map(len, lines)) <= columns
    listed = [line.split()[0] for line in lines if line.startswith((" exp", " mini", " llama"))]
    if columns >= 60:
        assert "mini-M-300A-untied" in listed and "llama-2.6B-210B-A" in listed, "whole, in one line"
    text = "\n".join(lines)
    assert ("terminal also shows" in " ".join(text.split())) == ("steps" not in text.split("\n")[1])
