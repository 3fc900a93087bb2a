"""Every file of a run, damaged in three hundred ways, is what it was or named: never another run, never a traceback."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_experiment
from paragraphs import paragraphs

from coupled_adam import files
from coupled_adam.errors import InputError
from coupled_adam.evaluation.stages import evaluate, read_stage
from coupled_adam.lm.checkpoint import verify_checkpoint
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.run import read_environment, read_experiment
from coupled_adam.lm.sources import TextFiles
from coupled_adam.lm.train import train

CHECKPOINT = "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "text.txt").write_text(paragraphs(200), encoding="utf-8")
    experiment = tiny_experiment().with_values(train__steps=4)
    corpus = prepare(TextFiles(directory / "text.txt"), experiment.data, directory / "corpus")
    train(experiment, corpus, directory / "run", lambda model, last: {"validation_loss": 5.0})
    evaluate(directory / "run", only=("validation", "embeddings"))
    return directory / "run"


def mutations(content: bytes, count: int = 300) -> Iterator[bytes]:
    """Flipped bits, other bytes, truncations, insertions, ranges of zeros, twice the same."""
    rng = random.Random(0)
    for i in range(count):
        damaged, at = bytearray(content), rng.randrange(len(content))
        length = rng.randint(1, 64)
        match i % 6:
            case 0:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged[at] = rng.randrange(256)
            case 2:
                del damaged[at:]
            case 3:
                damaged[at:at] = rng.randbytes(length)
            case 4:
                damaged[at : at + length] = bytes(len(damaged[at : at + length]))
            case _:
                damaged[at:at] = damaged[at : at + length]
        yield bytes(damaged)


def settings(run: Path) -> Any:
    return read_experiment(run).model_dump(exclude={"tracking"})  # the trackers are no part of what a run is


READERS: dict[str, Callable[[Path], Any]] = {
    f"{CHECKPOINT}/state.json": lambda run: verify_checkpoint(run / CHECKPOINT),
    f"{CHECKPOINT}/dcp/.metadata": lambda run: verify_checkpoint(run / CHECKPOINT),
    f"{CHECKPOINT}/dcp/__0_0.distcp": lambda run: verify_checkpoint(run / CHECKPOINT),
    "environment.json": read_environment,
    "experiment.toml": settings,
    "evaluation/validation.json": lambda run: read_stage(run, "validation"),
    "evaluation/embeddings.json": lambda run: read_stage(run, "embeddings"),
}


@pytest.mark.parametrize("name", list(READERS))
def test_a_damaged_file_is_named_or_says_what_it_said(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    read, file = READERS[name], run / name
    whole, content, refused = read(run), file.read_bytes(), 0
    for damaged in mutations(content):
        monkeypatch.setattr(files, "_intact", {})  # as in a new process
        file.write_bytes(damaged)
        try:
            assert read(run) == whole, damaged
        except InputError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 150


def test_a_damaged_log_is_named_or_holds_steps_and_numbers(finished: Path, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for damaged in mutations((finished / "metrics.jsonl").read_bytes()):
        log.path.write_bytes(damaged)
        try:
            found = log.read()
        except InputError as error:
            assert str(log.path) in str(error) and "\n" not in str(error)
            continue
        steps = [line["step"] for line in found]
        assert steps == sorted(set(steps)) and all(isinstance(step, int) for step in steps)
        assert all(isinstance(value, int | float) for line in found for value in line.values())


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "[]",
        "null",
        "true",
        '"x"',
        '{"loss": 1}',
        '{"step": "x"}',
        '{"step": 1.5}',
        '{"step": -1}',
        '{"step": true}',
    ]
    + [f'{{"step": 9, "loss": {value}}}' for value in ("NaN", "Infinity", '"<b>"', "[1]", "{}", "true", "1e999")]
    + ["[" * 100_000, "\x00", "{"],
)
def test_a_line_of_another_kind_is_named(line: str, finished: Path, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_bytes((finished / "metrics.jsonl").read_bytes() + line.encode() + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 6: damaged \(.*\); delete that line"):
        log.read()


def test_empty_lines_and_a_torn_last_one_are_skipped(finished: Path, tmp_path: Path) -> None:
    log, whole = MetricsLog(tmp_path / "metrics.jsonl"), MetricsLog(finished / "metrics.jsonl").read()
    content = (finished / "metrics.jsonl").read_bytes()
    for torn in (b"\n" + content, content + b"\n  \n", content.replace(b"\n", b"\r\n\r\n"), content + b'{"step": 5'):
        log.path.write_bytes(torn)
        assert log.read() == whole
    log.path.write_bytes(content + b"\x00" * 100)  # after a power cut
    assert log.read() == whole
    log.path.write_bytes(content + b'{"step": 5, "na\xff\xfeme": 1}\n')
    with pytest.raises(InputError, match=r"line 6: damaged \(Invalid JSON: .*unicode"):
        log.read()
