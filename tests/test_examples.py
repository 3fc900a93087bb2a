"""The example programs as a user starts them, on the digits inside scikit-learn and on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from in_process import program

from coupled_adam.lm.config import Data
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles

PROGRAM = Path(__file__).parents[1] / "examples" / "train_mnist.py"
ON_CPU = ["--dataset", "digits", "--gpu-id", "-1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def download(*_: object, **__: object) -> None:
    print("Failed to download (trying next)")
    raise RuntimeError("Error downloading images:\nTried the first address\nTried the second")


#: What stands in for an installed package: a module that cannot be imported, a dataset that cannot be downloaded.
NOT_INSTALLED = None
NO_NETWORK = ModuleType("torchvision")
NO_NETWORK.datasets = SimpleNamespace(MNIST=download)
NO_NETWORK.transforms = SimpleNamespace(Compose=list, ToTensor=int, Normalize=lambda *_: None)

#: Arguments, environment, modules in place of installed ones, and what the message must name.
BAD_INPUTS: dict[str, tuple[list[str], dict[str, str], dict[str, ModuleType | None], list[str]]] = {
    "no such GPU": (["--gpu-id", "99"], {}, {}, ["--gpu-id", "99", "-1 is the CPU"]),
    "empty batches": (["--batch-size", "0"], {}, {}, ["--batch-size", "0", "1 or more"]),
    "negative learning rate": (["--lr", "-0.1"], {}, {}, ["--lr", "-0.1", "0 or more"]),
    "coupling factor out of range": (["--coupling-factor", "2"], {}, {}, ["--coupling-factor", "2.0", "0 to 1"]),
    "unknown dataset": (["--dataset", "cifar"], {}, {}, ["--dataset", "'cifar'", "mnist", "digits"]),
    "no torchvision": (["--gpu-id", "-1"], {}, {"torchvision": NOT_INSTALLED}, ["mnist", "pip install torchvision"]),
    "no scikit-learn": (ON_CPU, {}, {"sklearn.datasets": NOT_INSTALLED}, ["digits", "pip install scikit-learn"]),
    "no network": (
        ["--data-dir", "no/directory"],
        {},
        {"torchvision": NO_NETWORK},
        ["no/directory", "--dataset digits"],
    ),
    "a batch that processes cannot share": (
        [*ON_CPU, "--batch-size", "3"],
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {},
        ["--batch-size", "3", "2 processes"],
    ),
}


def train(*arguments: str, start: list[str] | None = None) -> str:
    if start is None:
        result = program(PROGRAM, *ON_CPU, *arguments)
    else:
        command = [sys.executable, *start, str(PROGRAM), *ON_CPU, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    return result.stdout


def epochs(printed: str, optimizer: str) -> list[tuple[float, float, float]]:
    """Training loss, test loss and accuracy in percent of every epoch."""
    pattern = rf"^{optimizer} epoch \d+: train loss (\S+), test loss (\S+), accuracy (\S+)%$"
    return [tuple(map(float, figures)) for figures in re.findall(pattern, printed, re.MULTILINE)]


def comparison(printed: str) -> dict[str, tuple[float, float]]:
    """Test loss and accuracy by optimizer, from the last lines."""
    pattern = r"^(\w+) +test loss (\S+)  accuracy (\S+)%  training \d+\.\d s$"
    last = printed.split("From the same initial weights, on the same batches:\n")[1]
    return {name: (float(loss), float(accuracy)) for name, loss, accuracy in re.findall(pattern, last, re.MULTILINE)}


@pytest.fixture(scope="module")
def by_default() -> str:
    """What a run with all defaults prints."""
    return train()


def test_moment_coupling_learns_the_digits(by_default: str) -> None:
    assert by_default.startswith("digits: 1437 training and 360 test images, on cpu\n")
    assert len(epochs(by_default, "coupled_adam")) == 10
    assert epochs(by_default, "coupled_adam")[-1][2] > 95


def test_the_run_ends_with_a_comparison_with_adam(by_default: str) -> None:
    figures = {name: epochs(by_default, name)[-1][1:] for name in ("coupled_adam", "adam")}
    assert comparison(by_default) == figures
    coupled, adam = (epochs(by_default, name)[0][0] for name in figures)
    assert coupled == pytest.approx(adam, rel=0.01) and coupled != adam, "same weights and batches, another optimizer"


@pytest.mark.long
def test_adams_learns_the_digits() -> None:
    printed = train("--optimizer", "adams")
    assert comparison(printed)["adams"][1] > 95 and comparison(printed)["adam"][1] > 95


def test_the_same_seed_prints_the_same(by_default: str) -> None:
    again = train("--epochs", "1")
    for name in ("coupled_adam", "adam"):
        assert epochs(again, name) == epochs(by_default, name)[:1]


def test_adam_is_not_compared_with_itself_and_another_seed_prints_something_else(by_default: str) -> None:
    printed = train("--optimizer", "adam", "--epochs", "1", "--seed", "7")
    assert list(comparison(printed)) == ["adam"]
    assert epochs(printed, "adam") != epochs(by_default, "adam")[:1]


@pytest.mark.long
def test_two_processes_of_torchrun_do_what_one_does(by_default: str) -> None:
    printed = train("--epochs", "1", start=TORCHRUN)
    assert printed.count("test images") == 1, "one process prints"
    for name in ("coupled_adam", "adam"):
        for two, one in zip(epochs(printed, name), epochs(by_default, name)[:1], strict=True):
            # They share the batches of the one process; only rounding and a repeated image make a difference.
            assert two[:2] == pytest.approx(one[:2], rel=0.02)
            assert two[2] == pytest.approx(one[2], abs=1)
            assert two[2] * 3.6 == pytest.approx(round(two[2] * 3.6), abs=0.02), "a part of the 360 images, each once"


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_and_exit_code_2(name: str) -> None:
    arguments, environment, modules, message = BAD_INPUTS[name]
    with mock.patch.dict(os.environ, environment), mock.patch.dict(sys.modules, modules):
        result = program(PROGRAM, *arguments)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("train_mnist.py: ")
    assert [part for part in message if part not in result.stderr] == []


def test_a_local_task_asks_for_the_word_that_follows(text_file: Path, tmp_path: Path) -> None:
    source = TextFiles(text_file)
    corpus = prepare(source, Data(vocab_size=300, sequence_length=16), tmp_path / "corpus")
    made = program(
        PROGRAM.with_name("local_task.py"), str(corpus.directory), "--out", str(tmp_path), "--questions", "50"
    )
    assert made.returncode == 0, made.stderr
    questions = [json.loads(line) for line in (tmp_path / "next_word.jsonl").read_text().splitlines()]
    documents = [" ".join(document.split()) for document in source.documents()]
    assert len(questions) == 50 and len({q["answer"] for q in questions}) == 4
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert any(d.startswith(question["context"] + question["choices"][question["answer"]]) for d in documents)
    assert str(tmp_path / "next_word.jsonl") in (tmp_path / "next_word.yaml").read_text()
