"""Nothing that a user has is removed or changed by a command that writes where the user said."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_experiment
from in_process import command
from paragraphs import paragraphs

from coupled_adam import experiments, reproduce
from coupled_adam.evaluation.stages import evaluate
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles
from coupled_adam.lm.train import train


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``text/``, a ``corpus/`` of it, a ``run/`` on that, evaluated, ``tiny.toml``, and ``model.npy``."""
    directory = tmp_path_factory.mktemp("sources")
    (directory / "text").mkdir()
    (directory / "text" / "book.txt").write_text(paragraphs(200), encoding="utf-8")
    experiment = tiny_experiment().with_values(train__steps=2, train__checkpoint_every=1)
    (directory / "tiny.toml").write_text(experiment.to_toml())
    corpus = prepare(TextFiles(directory / "text"), experiment.data, directory / "corpus")
    train(experiment, corpus, directory / "run", lambda model, last: {"validation_loss": 5.0})
    evaluate(directory / "run", only=("validation", "embeddings"))
    return directory


@pytest.fixture
def place(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, as the working directory, and experiments that take a second."""
    shutil.copytree(sources, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")

    def load(name: str, seed: int = 1) -> Experiment:
        return tiny_experiment().with_values(run__name=f"{name}-s{seed}", run__seed=seed, train__steps=2)

    monkeypatch.setattr(experiments, "load", load)
    monkeypatch.setattr(experiments, "families", lambda suite="": {"small": {"seeds": [1], "experiments": ["A"]}})
    monkeypatch.setattr(reproduce, "source_of", lambda name: TextFiles(Path("text")))
    return tmp_path / "place"


#: How each command is told to write to OUT, what it reads, and the names that it writes there ("" for OUT itself).
COMMANDS: dict[str, tuple[list[str], str, list[str]]] = {
    "prepare": (["prepare", "text", "--vocab-size", "300", "--out", "OUT"], "text", [""]),
    "train": (
        ["train", "tiny.toml", "--data", "corpus", "--out", "OUT"],
        "corpus",
        [".lock", "experiment.toml", "environment.json", "metrics.jsonl", "checkpoints"],
    ),
    "demo": (
        ["demo", "--text", "text", "--steps", "2", "--out", "OUT"],
        "text",
        [".lock", "corpus", "adamw/metrics.jsonl", "coupled_adam/checkpoints", "results.json", "report.html"],
    ),
    "reproduce": (
        ["reproduce", "mini", "--out", "OUT"],
        "text",
        ["A-s1/metrics.jsonl", "A-s1/.lock", "results.json", "aggregate.csv", "report.html"],
    ),
    "export": (["export", "run", "--out", "OUT"], "corpus", [""]),
    "report": (["report", "run", "--out", "OUT"], "run", ["aggregate.csv", "report.html"]),
    "audit": (["audit", "run", "--html", "OUT/page.html"], "run", ["page.html"]),
    "evaluate": (
        ["evaluate", "OUT", "--only", "validation", "--only", "export"],
        "corpus",
        ["model", "evaluation/validation.json", "evaluation/embeddings.json", "evaluation"],
    ),
}

Foreign = Callable[[Path], None]


def a_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a week's work")


def json_of_others(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"step": 7, "loss": 1.5, "experiments": [], "corpus": "mine", "version": "2"}\n')


def a_directory(path: Path) -> None:
    a_file(path / "step-00000001" / "state.json")
    a_file(path / "thesis.txt")


def a_link(path: Path) -> None:
    """To a file elsewhere, which would be written through or replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    a_file(Path("elsewhere/work.txt"))
    path.symlink_to(Path("elsewhere/work.txt").resolve())


def a_link_to_a_directory(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    a_directory(Path("elsewhere"))
    path.symlink_to(Path("elsewhere").resolve())


def everything(root: Path) -> dict[str, bytes | str]:
    """All that is there: the content of files, the targets of links."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def run_command(name: str, out: str) -> subprocess.CompletedProcess[str]:
    arguments, _, _ = COMMANDS[name]
    return command(*(argument.replace("OUT", out) for argument in arguments))


def nothing_lost(before: dict[str, bytes | str], place: Path, result: subprocess.CompletedProcess[str]) -> None:
    after = everything(place)
    kept = {name: after.get(name) for name in before if not name.endswith(".verified.json")}
    assert kept == {name: before[name] for name in kept}, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "foreign", [a_file, json_of_others, a_directory, a_link, a_link_to_a_directory], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    ("name", "written"), [(name, written) for name, (_, _, files) in COMMANDS.items() for written in files]
)
def test_what_has_the_name_of_an_output_stays(name: str, written: str, foreign: Foreign, place: Path) -> None:
    out = Path("run" if name == "evaluate" else "out")
    if written == "evaluation":
        shutil.rmtree(out / written)
    elif (out / written).exists() and written:
        (out / written).unlink()
    foreign(out / written)
    before = everything(place)
    result = run_command(name, str(out))
    nothing_lost(before, place, result)
    if result.returncode == 0:  # results are added beside what is there
        assert foreign in (a_directory, a_link_to_a_directory) and written == "evaluation"
        return
    last = result.stderr.strip().splitlines()[-1]
    assert (str(out) in last or "elsewhere" in last) and len(last) < 600, result.stderr
    assert sum(line.startswith("coupled-adam: ") for line in result.stderr.splitlines()) <= 1
    assert "step" not in result.stderr.replace("step-0", "") or name == "reproduce", "before any work"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "evaluate"])
@pytest.mark.parametrize("where", ["the source", "in the source", ".", "link to the source", "..", "a file"])
def test_a_source_and_what_is_around_it_stay(name: str, where: str, place: Path) -> None:
    read = COMMANDS[name][1]
    a_file(Path("file"))
    Path("link").symlink_to(Path(read).resolve())
    outs = {"the source": read, "in the source": f"{read}/new", "link to the source": "link", "a file": "file"}
    if where == "..":
        os.chdir(read)
        for path in ("text", "corpus", "run", "tiny.toml"):
            Path(path).symlink_to(place / path)
    before = everything(place)
    result = run_command(name, outs.get(where, where))
    nothing_lost(before, place, result)
    assert result.returncode in (0, 1, 2)
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if line.startswith("coupled-adam: ") or " failed: " in line]
        assert len(set(said)) == 1, result.stderr  # of a suite, the run that was refused, at once and at the end


@pytest.mark.parametrize("name", ["prepare", "export", "train", "demo", "reproduce"])
def test_the_root_of_the_file_system_is_no_output(name: str, place: Path) -> None:
    result = run_command(name, "/")
    assert (result.returncode, result.stderr) == (
        2,
        "coupled-adam: /: the root of the file system; choose another place\n",
    )


@pytest.mark.parametrize("made", ["corpus", "corpus/new", "exported", "exported/new/run"])
@pytest.mark.parametrize("name", ["train", "demo", "reproduce"])
def test_nothing_is_added_to_a_corpus_or_model(name: str, made: str, place: Path) -> None:
    assert command("export", "run", "--out", "exported").returncode == 0
    before = everything(place)
    result = run_command(name, made)
    assert result.returncode == 2 and "a corpus or model made by coupled-adam" in result.stderr
    assert everything(place) == before
    for again in ("prepare text --vocab-size 320 --overwrite --out corpus", "export run --out exported"):
        assert "was added" not in command(*again.split()).stderr


def test_checkpoints_of_a_run_that_are_a_file_are_found_before_a_step(place: Path) -> None:
    shutil.rmtree("run/checkpoints")
    a_file(Path("run/checkpoints"))
    before = everything(place)
    result = run_command("train", "run")
    assert (result.returncode, result.stderr) == (
        2,
        "coupled-adam: run/checkpoints: not a directory; move it away, or choose another place for the run\n",
    )
    nothing_lost(before, place, result)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "evaluate"])
def test_where_nothing_can_be_written_is_said_before_any_work(name: str, place: Path) -> None:
    result = run_command(name, "/proc/nowhere")
    assert result.returncode == 2
    assert "/proc/nowhere" in result.stderr and ".tmp" not in result.stderr and "step" not in result.stderr


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_same_command_again_is_welcome(name: str, place: Path) -> None:
    out = "run" if name == "evaluate" else "out"
    for _ in range(2):
        result = run_command(name, out)
        assert result.returncode == 0, result.stderr


def snapshots(monkeypatch: pytest.MonkeyPatch, root: Path, kept: Path) -> None:
    """Copies ``root`` before and after each renaming: what a process that is killed there would leave."""
    replace = Path.replace

    def copied(self: Path, target: Path) -> Path:
        shutil.copytree(root, kept / f"{len(list(kept.iterdir())):03d}", symlinks=True)
        done = replace(self, target)
        shutil.copytree(root, kept / f"{len(list(kept.iterdir())):03d}", symlinks=True)
        return done

    monkeypatch.setattr(Path, "replace", copied)


@pytest.mark.parametrize(
    "name", ["prepare", "train", "evaluate", "export", "report", pytest.param("demo", marks=pytest.mark.long)]
)
def test_a_kill_between_two_writes_locks_nobody_out(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path("run" if name == "evaluate" else "out")
    out.mkdir(exist_ok=True)
    shutil.rmtree(out / "evaluation", ignore_errors=True)
    (tmp_path / "killed").mkdir()
    with monkeypatch.context() as patched:
        snapshots(patched, place, tmp_path / "killed")
        assert run_command(name, str(out)).returncode == 0
    left = sorted((tmp_path / "killed").iterdir())
    assert len(left) >= 4
    for each in left[:: max(len(left) // 12, 1)]:
        shutil.rmtree(place)
        each.rename(place)
        os.chdir(place)
        result = run_command(name, str(out))
        assert result.returncode == 0, (each.name, result.stderr)
        assert [path for path in out.rglob("*") if path.suffix in (".tmp", ".old")] == [] or name == "report"
