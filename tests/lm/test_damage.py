"""Damage to what a run needs is noticed and named in one line; what is left is used, and a full disk loses nothing."""

import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from coupled_adam.errors import InputError
from coupled_adam.evaluation.stages import evaluate
from coupled_adam.files import VERIFIED
from coupled_adam.lm import train as loop
from coupled_adam.lm.checkpoint import complete_checkpoints, latest_checkpoint
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus, open_corpus
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.run import open_run
from coupled_adam.lm.sources import TextFiles


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
    with pytest.raises(InputError, match=rf"{data}: damaged \(its checksum .*train the run again") as error:
        evaluate(tmp_path / "run", only=("validation",))
    assert "\n" not in str(error.value)
    loop.train(tiny, corpus, tmp_path / "run", no_figures)
    said = capsys.readouterr().err
    assert f"{data}: damaged" in said and "Resuming from" in said and "step-00000020" in said
    assert losses(tmp_path / "run") == expected
    assert evaluate(tmp_path / "run", only=("validation",))["validation"]["step"] == 24


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
