"""What the command line prints and how it ends, whatever stands in names, in any encoding."""

import ast
import contextlib
import errno
import json
import re
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer.main
from in_process import called, command

from coupled_adam import __main__, progress, terminal
from coupled_adam.cli import app
from coupled_adam.errors import DivergedError, InputError, Interrupted, printable

SOURCE = Path(__main__.__file__).parent

#: Names that a file, a tensor or a token may have.
NAMES = {
    "escape": "a\x1b[31mb\x1b]0;title\x07",
    "C1": "a\x9b31mb",
    "markup": "a[red]b[link=x]c",
    "emoji": "a:smile:b",
    "line": "a\nb\r\nc",
    "separator": "a\u2028b",
    "direction": "a\u202egnp.exe",
    "surrogate": "a\udcffb",
    "delete": "a\x7fb\tc",
    "letters": "größe ‖μ‖ʳ 日本語",
}
ENCODINGS = ["ascii", "cp1252", "utf-8", "utf-16"]


def printed(function: Callable[[], object], encoding: str) -> str:
    """What ``function`` writes to a file of that encoding, by standard output and error together."""
    result = called(lambda: (terminal.survive_encoding(), function()), encoding=encoding)
    assert result.returncode == 0
    return result.stdout + result.stderr


WAYS: dict[str, Callable[[str], object]] = {
    "line": terminal.print_line,
    "error": terminal.print_error,
    "table": lambda name: terminal.print_table([("", "left"), (name, "right")], [(name, "1")], name),
    "styled": lambda name: terminal.print_styled((name, "bold"), (name, "red")),
    "progress": lambda name: (progress.show_log(), progress.say(name), progress.warn(name)),
    "input": lambda name: __main__._failed(InputError(f"{name}: bad")),
    "system": lambda name: __main__._failed(OSError(errno.ENOENT, "No such file", name)),
    "import": lambda name: __main__._failed(ImportError(name)),
    "warning": lambda name: terminal.print_error(__main__._warning(name, UserWarning, name, 3).rstrip("\n")),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("way", WAYS)
def test_a_name_is_shown_and_not_carried_out(way: str, encoding: str) -> None:
    for kind, name in NAMES.items():
        text = printed(lambda name=name: WAYS[way](name), encoding)
        left = {c for c in text if c != "\n" and unicodedata.category(c)[0] in "CZ"} - {" "}
        assert not left, (kind, left)
        if kind in ("markup", "emoji"):
            assert name in text.replace("\n", "")
        if encoding in ("ascii", "cp1252") and kind != "letters":
            assert text.isascii()


def test_one_place_prints() -> None:
    """Else a name would reach the terminal as it is."""
    printing = [
        path.name
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert set(printing) == {"terminal.py"}


def test_what_is_printable_stays() -> None:
    text = "größe ‖μ‖ʳ 日本語 é́ 🙂 [x] \\x1b"
    assert printable(text) == text
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"


@pytest.fixture(scope="module")
def oddly_named(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A matrix under each of the names."""
    directory = tmp_path_factory.mktemp("odd")
    paths = []
    for name in NAMES.values():
        with contextlib.suppress(OSError, UnicodeEncodeError):  # some file systems do not take every name
            np.save(directory / f"{name}.npy", 1 + np.random.default_rng(0).normal(size=(60, 4)))
            paths.append(directory / f"{name}.npy")
    return paths


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_files_of_any_name_are_audited(oddly_named: list[Path], encoding: str, tmp_path: Path) -> None:
    result = command("audit", *oddly_named, "--html", tmp_path / "a.html", encoding=encoding)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", result.stdout + result.stderr)
    assert "a[red]b[link=x]c.npy" in result.stdout
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "a\\udcffb.npy" in page or not any("\udcff" in path.name for path in oddly_named)
    found = json.loads(command("audit", *oddly_named, "--json", encoding=encoding).stdout)
    assert [matrix["model"] for matrix in found] == [path.name for path in oddly_named]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_experiments_are_listed_in_any_encoding(encoding: str) -> None:
    assert "exp35V" in command("experiments", encoding=encoding).stdout
    assert json.loads(command("experiments", "exp35V", "--json", encoding=encoding).stdout)["estimate"]


@pytest.mark.parametrize("columns", [None, 60, 80, 200])
def test_a_piped_table_is_as_wide_as_it_is_told(columns: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    cells = [("a long label of a figure", *["0.123456789"] * 12)]
    lines = printed(lambda: terminal.print_table([("name", "left")] * 13, cells), "utf-8").splitlines()
    width = max(map(len, lines))
    assert width <= (columns or terminal.WIDE)
    assert columns in (None, 200) or width > columns - 20
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_piped_sentence_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = "most of an average embedding is a shift that all tokens share " * 8
    assert printed(lambda: terminal.print_styled((text, "green")), "utf-8") == text.rstrip() + "\n"


def test_a_verdict_has_no_colors_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = printed(lambda: terminal.print_styled(("poor", "red"), ("  0.497 (below 0.1) http://x 'y'", "")), "utf-8")
    assert text == "\x1b[31mpoor\x1b[0m  0.497 (below 0.1) http://x 'y'\n"


def rendered(*arguments: str) -> str:
    """Help in one line."""
    return " ".join(command(*arguments, "--help").stdout.split())


@pytest.mark.parametrize("name", typer.main.get_command(app).commands)
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_help_says_every_default(name: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = re.sub(r"- (?=\w)", "-", rendered(name))
    for option in typer.main.get_command(app).commands[name].params:
        assert not option.help or " ".join(option.help.split()) in text.replace("- ", "-"), option.name
        if option.default not in (None, False, "", []) and not option.required:
            assert f"[default: {option.default}" in text, option.name


def test_the_help_lists_what_there_is_to_choose_from() -> None:
    from coupled_adam import experiments
    from coupled_adam.evaluation.stages import STAGES
    from coupled_adam.lm.estimate import PEAK_FLOPS

    assert f"A family: {', '.join(experiments.families())}." in rendered("reproduce")
    assert f"A stage: {', '.join(STAGES)}." in rendered("evaluate")
    assert f"GPU for the estimated hours: {', '.join(PEAK_FLOPS)}." in rendered("experiments")


ENDS = {
    "input": (InputError("x: bad"), 2, "coupled-adam: x: bad"),
    "extra": (ImportError("x not installed"), 2, "coupled-adam: x not installed"),
    "module": (
        ModuleNotFoundError("No module named 'xxhash'", name="xxhash"),
        2,
        "coupled-adam: xxhash not installed; in a clone of the repository: pip install '.[demo]'",
    ),
    "absent": (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2, "x: no such file or directory"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "x"), 2, "x: read-only file system"),
    "full": (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "x: no space left on device"),
    "no path": (OSError("one\n two"), 1, "coupled-adam: one two"),
    "diverged": (DivergedError("step 3: loss nan"), 1, "coupled-adam: step 3: loss nan"),
    "memory": (
        MemoryError("Unable to allocate 6.00 GiB"),
        1,
        "coupled-adam: out of memory (Unable to allocate 6.00 GiB)",
    ),
    "torch's memory": (RuntimeError("DefaultCPUAllocator: can't allocate"), 1, "out of memory (DefaultCPUAllocator: "),
    "depth": (RecursionError("maximum recursion depth exceeded"), 1, "coupled-adam: the input is nested too deeply"),
    "stopped": (Interrupted("saved at 3", signal.SIGTERM), 143, "saved at 3. Rerun the same command to resume."),
    "Ctrl-C": (KeyboardInterrupt(), 130, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_end_is_one_line_and_a_status(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, status, line = ENDS[end]

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("coupled_adam.demo.run_demo", fail)
    result = command("demo")
    assert result.returncode == status and result.stdout == ""
    assert result.stderr.count("\n") == (line != "") and line in result.stderr


@pytest.mark.parametrize(
    "error",
    [TypeError("a bug"), RuntimeError("a bug"), ImportError("cannot import name", name="coupled_adam.lm.train")],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("coupled_adam.demo.run_demo", fail)
    with pytest.raises(type(error)):
        command("demo")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bogus"], "No such command 'bogus'; see "),
        (["audit"], "Missing argument 'models'; see "),
        (["audit", "x", "--bogus\x1b[1m"], "No such option: --bogus\\x1b[1m"),
        (["demo", "--steps", "x\ny"], "'--steps': "),
        (["demo", "--steps", "0"], "'--steps': "),
        (["demo", "--steps", "-7"], "(got '-7'); see "),
        (["demo", "--seed=x y"], "(got 'x y'); see "),
        (["prepare", "x", "--held-out", "0.9", "--out", "y"], "(got '0.9'); see "),
        (["prepare", "x"], "Missing option '--out'; see "),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], line: str) -> None:
    result = command(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("coupled-adam: ") and result.stderr.count("\n") == 1
    assert line.lower() in result.stderr.lower()


WRITES = {
    "demo": ["demo", "--steps", "1", "--out"],
    "prepare": ["prepare", "TEXT", "--out"],
    "report": ["report", "RUNS", "--out"],
    "audit": ["audit", "ARRAY", "--html"],
}


@pytest.mark.parametrize("target", ["/proc/x", "FILE/x", "LONG"])
@pytest.mark.parametrize("name", WRITES)
def test_a_path_that_cannot_be_written_is_a_bad_input(name: str, target: str, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    np.save(tmp_path / "array.npy", 1 + np.random.default_rng(0).normal(size=(60, 4)))
    (tmp_path / "runs").mkdir()
    paths = {"TEXT": text_file, "RUNS": tmp_path / "runs", "ARRAY": tmp_path / "array.npy"}
    path = {"FILE/x": str(tmp_path / "file" / "x"), "LONG": str(tmp_path / ("n" * 300))}.get(target, target)
    result = command(*(paths.get(argument, argument) for argument in WRITES[name]), path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("coupled-adam: ") and "[Errno" not in result.stderr


#: A program that is interrupted at once, and again while it ends, in the middle of an import and elsewhere.
INTERRUPTED = """
import os, signal, sys, types, contextlib
from coupled_adam.__main__ import main
class Import:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            {action}
sys.meta_path.insert(0, Import())
def once(): os.kill(os.getpid(), signal.SIGINT)
def swallowed():
    try: once()
    except KeyboardInterrupt: raise ImportError("broken")
def warned():
    import warnings; warnings.warn("a\\nb\\x1b[1m")
def twice():
    try: once()
    finally: once()
sys.argv = ["coupled-adam", "experiments"]
main()
"""


@pytest.mark.parametrize("module", ["coupled_adam.cli", "coupled_adam.experiments"])
@pytest.mark.parametrize("action", ["once()", "swallowed()", "twice()"])
def test_ctrl_c_is_silent_at_any_time(module: str, action: str) -> None:
    code = INTERRUPTED.format(module=module, action=action)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    assert (result.returncode, result.stderr) == (130, "")


def test_a_warning_is_one_line() -> None:
    code = INTERRUPTED.format(module="coupled_adam.cli", action="warned()").replace('"experiments"', '"bogus"')
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    warning, usage = result.stderr.splitlines()
    assert warning.endswith(": UserWarning: a b\\x1b[1m") and usage.startswith("coupled-adam: No such command")


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As of a job in the background of a script."""
    code = INTERRUPTED.format(module="coupled_adam.cli", action="once()")
    code = code.replace('"experiments"]', '"--help"]').replace(
        "main()\n", "signal.signal(signal.SIGINT, signal.SIG_IGN); main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    assert (result.returncode, result.stderr) == (0, "") and "Commands:" in result.stdout


@pytest.mark.parametrize("shut", ["pipe", "full"])
def test_output_that_nobody_takes_is_no_traceback(shut: str) -> None:
    target = Path("/dev/full").open("w") if shut == "full" else None  # noqa: SIM115
    with target or contextlib.nullcontext():
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(0.3); from coupled_adam.__main__ import main; main()"],
            stdout=target or subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        if process.stdout:
            process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 1
    assert "Traceback" not in error and "Exception" not in error
    assert error == ("" if shut == "pipe" else "coupled-adam: no space left on device\n")
