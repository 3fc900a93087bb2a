"""Damage to what a run needs is noticed and named in one line; what is left is used, and a full disk loses nothing."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_of_an_older_version
from filelock import FileLock

from coupled_adam.errors import InputError
from coupled_adam.evaluation.stages import evaluate
from coupled_adam.files import VERIFIED, write_sealed
from coupled_adam.lm import train as loop
from coupled_adam.lm.checkpoint import complete_checkpoints, latest_checkpoint
from coupled_adam.lm.config import Experiment, load_experiment
from coupled_adam.lm.corpus import Corpus, open_corpus
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.run import open_run
from coupled_adam.lm.sources import TextFiles
from coupled_adam.report.aggregate import read_runs


@pytest.fixture
def corpus(text_file: Path, tiny: Experiment, tmp_path: Path) -> Corpus:
    return prepare(TextFiles(text_file), tiny.data, tmp_path / "corpus")


def no_figures(model: LanguageModel, last: bool) -> loop.Figures:
    return {}


def flip(path: Path, count: int = 4096) -> None:
    """Damage that leaves the size as it is."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + count] = bytes(byte ^ 0xFF for byte in content[middle : middle + count])
    path.write_bytes(content)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in MetricsLog(run_dir / "metrics.jsonl").read()[1:]]


def test_a_checkpoint_whose_bytes_changed_is_passed_over_for_the_one_before(
    tiny: Experiment, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    expected = losses(tmp_path / "run")
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "step-00000024"
    (data,) = (newest / "dcp").glob("*.distcp")
    flip(data)
    with pytest.raises(InputError, match=rf"{data}: damaged \(its checksum .*rerun the same command") as error:
        evaluate(tmp_path / "run", only=("validation",))
    assert "\n" not in str(error.value)
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    said = capsys.readouterr().err
    assert f"{data}: damaged" in said and "Resuming from" in said and "step-00000020" in said
    assert losses(tmp_path / "run") == expected
    assert evaluate(tmp_path / "run", only=("validation",))["validation"]["step"] == 24


def edit_sealed(path: Path, **values: object) -> None:
    """Another value under a right digest, as of another program that writes such files."""
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    write_sealed(path, content | values)


def another_digit(state: Path) -> None:
    state.write_text(state.read_text().replace('"step": 24', '"step": 14'))


def another_step(state: Path) -> None:
    edit_sealed(state, step=14)


def another_step_before_there_were_digests(state: Path) -> None:
    edit_sealed(state, step=14)
    as_of_an_older_version(state)


def another_corpus(state: Path) -> None:
    edit_sealed(state, corpus="0" * 64)


def a_later_format(state: Path) -> None:
    edit_sealed(state, format=99)


def no_checksums(state: Path) -> None:
    edit_sealed(state, checksums={"dcp/.metadata": {}})


def that_of_another_step(state: Path) -> None:
    shutil.rmtree(state.parent)
    shutil.copytree(state.parent.with_name("step-00000020"), state.parent)


@pytest.mark.parametrize(
    "damage",
    [
        another_digit,
        another_step,
        another_step_before_there_were_digests,
        another_corpus,
        a_later_format,
        no_checksums,
        that_of_another_step,
    ],
    ids=lambda f: f.__name__,
)
def test_a_state_that_is_not_that_of_its_checkpoint_is_passed_over(
    damage: Callable[[Path], None],
    tiny: Experiment,
    corpus: Corpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    expected = losses(tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "step-00000024" / "state.json"
    damage(state)
    capsys.readouterr()
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    said = capsys.readouterr().err
    assert f"{state}: " in said and "resuming from step 20 of" in said
    assert losses(tmp_path / "run") == expected
    assert json.loads(state.read_text())["step"] == 24


def test_a_checkpoint_from_before_there_were_digests_is_used(
    tiny: Experiment, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    as_of_an_older_version(tmp_path / "run" / "environment.json", "experiment")
    for path in complete_checkpoints(tmp_path / "run" / "checkpoints"):
        as_of_an_older_version(path / "state.json")
    capsys.readouterr()
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    assert capsys.readouterr().err == f"{tmp_path / 'run'}: already finished with 24 steps\n"
    assert evaluate(tmp_path / "run", only=("validation",))["validation"]["step"] == 24


def test_settings_that_changed_on_the_disk_are_no_other_run(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    file = tmp_path / "run" / "experiment.toml"
    file.write_text(tiny.with_values(schedule__lr=0.5).to_toml())
    changed = load_experiment(file)
    for attempt in (
        lambda: loop.train(changed, corpus, tmp_path / "run", no_figures),
        lambda: evaluate(tmp_path / "run", only=("validation",)),
        lambda: read_runs([tmp_path / "run"]),
    ):
        with pytest.raises(
            InputError, match=r"experiment\.toml: changed since .*schedule\.lr: 0\.001 recorded, 0\.5 now"
        ):
            attempt()


COPIES = ("step-00000024-backup", "step-00000024 (copy)", "step-24", "step-0000024", "step-000000024", "step-٠٠٠٠٠٠٢٤")


def test_only_names_of_ours_are_checkpoints(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    experiment, checkpoints = tiny.with_values(train__keep_last=1), tmp_path / "run" / "checkpoints"

    def copy(model: LanguageModel, last: bool) -> loop.Figures:
        newest = latest_checkpoint(checkpoints)
        if newest and not (checkpoints / COPIES[0]).exists():
            for name in COPIES:
                shutil.copytree(newest, checkpoints / name)
            (checkpoints / "step-00000099").write_text("notes")
            (checkpoints / "step-00000001").symlink_to(checkpoints / COPIES[0])
        return {}

    loop.train(experiment, corpus, tmp_path / "run", copy)
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted(
        [*COPIES, "step-00000001", "step-00000024", "step-00000099"]
    )
    assert latest_checkpoint(checkpoints) == checkpoints / "step-00000024"
    assert all((checkpoints / name / "state.json").exists() for name in COPIES)
    assert open_run(tmp_path / "run").step == 24


def test_a_checkpoint_that_was_moved_and_linked_is_read_and_left_where_it_is(
    tiny: Experiment, corpus: Corpus, tmp_path: Path
) -> None:
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    newest, moved = tmp_path / "run" / "checkpoints" / "step-00000024", tmp_path / "disk"
    newest.rename(moved)
    newest.symlink_to(moved)
    assert open_run(tmp_path / "run").model() is not None
    flip(next((moved / "dcp").glob("*.distcp")))
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    assert not newest.is_symlink() and (moved / "state.json").exists()


def test_a_finished_run_on_a_disk_that_cannot_be_written_to_is_loaded(
    tiny: Experiment, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.train(tiny, corpus, tmp_path / "run", no_figures)

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "run/.lock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    loaded = loop.train(tiny, corpus, tmp_path / "run", no_figures)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), loaded.parameters(), strict=True))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    for path in complete_checkpoints(tmp_path / "run" / "checkpoints")[:1]:
        flip(next((path / "dcp").glob("*.distcp")))
    with pytest.raises(InputError, match="run: cannot be written, and its last checkpoint is damaged"):
        loop.train(tiny, corpus, tmp_path / "run", no_figures)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match=r"run: cannot be written \(Read-only file system\); choose another place"):
        loop.train(tiny, corpus, tmp_path / "run", no_figures)


KILLED_WHILE_IT_SAVES = """
import os, signal, sys, torch
from pathlib import Path
from coupled_adam.lm import checkpoint
from coupled_adam.lm.parallel import World
checkpoint.swap = lambda aside, path: os.kill(os.getpid(), signal.SIGKILL)
model = torch.nn.Linear(2, 2)
checkpoint.save_checkpoint(Path(sys.argv[1]), 20, model, [torch.optim.SGD(model.parameters())], {}, World())
"""


@pytest.mark.long
def test_what_killed_processes_were_writing_is_removed_and_nothing_else(
    tiny: Experiment, corpus: Corpus, tmp_path: Path
) -> None:
    checkpoints, alive = tmp_path / "run" / "checkpoints", subprocess.Popen(["sleep", "100"])
    try:
        loop.train(tiny, corpus, tmp_path / "run", no_figures)
        killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_SAVES, checkpoints], timeout=120)
        assert killed.returncode == -signal.SIGKILL
        (left,) = [path for path in checkpoints.iterdir() if path.name.startswith(".")]
        assert (left / "state.json").exists(), "a whole checkpoint's disk space"
        process = left.name.split(".")[2]
        kept = [checkpoints / f".step-00000020.{alive.pid}.tmp", checkpoints / f".mine.{process}.tmp"]
        kept += [checkpoints / ".step-00000020.20240131.old", tmp_path / "run" / f".notes.txt.{process}.tmp"]
        gone = [left, checkpoints / f".step-00000010.{process}.old", tmp_path / "run" / f".metrics.jsonl.{process}.tmp"]
        for path in (*kept, *gone[1:]):
            path.mkdir() if path.parent == checkpoints else path.write_text("x")
        loop.train(tiny, corpus, tmp_path / "run", no_figures)
        assert [path for path in kept if not path.exists()] == [] and [path for path in gone if path.exists()] == []
    finally:
        alive.kill()
        alive.wait()


@pytest.mark.parametrize("damage", ["missing", "truncated", "state"])
def test_every_kind_of_damage_is_named(damage: str, tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    file = newest / "state.json" if damage == "state" else next((newest / "dcp").glob("*.distcp"))
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=str(file)):
        open_run(tmp_path / "run").model()
    loop.train(tiny, corpus, tmp_path / "run", no_figures)


def test_where_no_checkpoint_is_intact_the_run_stops_before_it_destroys_anything(
    tiny: Experiment, corpus: Corpus, tmp_path: Path
) -> None:
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    for path in complete_checkpoints(tmp_path / "run" / "checkpoints"):
        flip(next((path / "dcp").glob("*.distcp")))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match=r"\.distcp: damaged .*no checkpoint is left to resume from"):
        loop.train(tiny, corpus, tmp_path / "run", no_figures)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_shard_whose_bytes_changed_is_refused_and_verified_shards_are_remembered(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coupled_adam import files

    read: list[str] = []
    checksum = files._checksum
    monkeypatch.setattr(files, "_checksum", lambda path: (read.append(path.name), checksum(path))[1])
    monkeypatch.setattr(files, "_intact", {})  # as in a new process
    open_corpus(corpus.directory)
    assert read == [], "verified when they were written"
    (corpus.directory / VERIFIED).unlink()
    monkeypatch.setattr(files, "_intact", {})
    open_corpus(corpus.directory)
    assert {"train-00000.bin", "validation-00000.bin", "tokenizer.json", "unigram_counts.npy"} == set(read)
    monkeypatch.setattr(files, "_intact", {})
    open_corpus(corpus.directory)
    assert len(read) == 4, "remembered"
    flip(corpus.directory / "train-00000.bin", 2048)
    with pytest.raises(InputError, match=r"train-00000\.bin: damaged .*delete .* to prepare it again"):
        open_corpus(corpus.directory)


def test_a_damaged_environment_is_one_line(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    for content in ("{", "[]", "{}", '{"corpus": 3}', "\udcff"):
        (tmp_path / "run" / "environment.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        for attempt in (
            lambda: loop.train(tiny, corpus, tmp_path / "run", no_figures),
            lambda: evaluate(tmp_path / "run", only=("validation",)),
        ):
            with pytest.raises(InputError, match=r"environment\.json: damaged .*restore it") as error:
                attempt()
            assert "\n" not in str(error.value)


def test_an_out_that_is_a_file_is_one_line(tiny: Experiment, corpus: Corpus, text_file: Path) -> None:
    with pytest.raises(InputError, match=r"text\.txt: not a directory; choose another place"):
        loop.train(tiny, corpus, text_file, no_figures)
    with pytest.raises(InputError, match=r"text\.txt: not a directory"):
        prepare(TextFiles(text_file), tiny.data, text_file)


def test_a_disk_that_is_full_loses_nothing(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    whole = loop.train(tiny, corpus, tmp_path / "whole", no_figures)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(model: LanguageModel, last: bool) -> loop.Figures:
        if (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 16:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file may grow larger
        return {}

    try:
        with pytest.raises(
            OSError, match=r"checkpoint could not be written .*MiB needed.*rerun the same command"
        ) as error:
            loop.train(tiny, corpus, tmp_path / "run", fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and "checkpoints:" in str(error.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]
    resumed = loop.train(tiny, corpus, tmp_path / "run", no_figures)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = ({n: p.detach().numpy() for n, p in m.named_parameters()} for m in (resumed, whole))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    shutil.rmtree(tmp_path / "run")
