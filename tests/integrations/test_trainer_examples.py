"""The examples for trainers, as a user starts them, on a tiny model and made-up text."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp2_jobs import llama
from in_process import command, program
from paragraphs import paragraphs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coupled_adam import geometry

EXAMPLES = Path(__file__).parents[2] / "examples"
FINETUNE = EXAMPLES / "finetune_trainer.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of 67 tokens, the characters of the text among them."""
    path = tmp_path_factory.mktemp("model")
    words = ["<end>", "<unk>", *sorted(set(paragraphs(20)))][:67]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<end>", unk_token="<unk>").save_pretrained(path)
    llama().save_pretrained(path)
    return path


def figures(printed: str) -> dict[str, tuple[float, float]]:
    rows = re.findall(r"^(\w.*?) +(\S+) +(\S+)$", printed.split("before     after\n")[1], re.MULTILINE)
    return {name: (float(before), float(after)) for name, before, after in rows}


@pytest.mark.parametrize("optimizer", ["coupled_adam", "adamw"])
def test_a_model_is_trained_on_and_its_embeddings_are_measured(folder, text_file, tmp_path, optimizer) -> None:
    small = ["--steps", "8", "--length", "16", "--evaluated", "8", "--lr", "1e-2", "--output", tmp_path / "tuned"]
    result = program(FINETUNE, "--model", folder, "--text", text_file, "--optimizer", optimizer, *small)
    assert result.returncode == 0, result.stderr
    found = figures(result.stdout)
    before, after = found["loss on other text"]
    assert after < before - 0.1
    tuned = type(llama()).from_pretrained(tmp_path / "tuned").lm_head.weight.detach()
    pair = found["mean shift ratio (0: centered)"]
    assert pair[0] == pytest.approx(geometry.mean_shift_ratio(llama().lm_head.weight.detach()), abs=1e-3)
    assert pair[1] == pytest.approx(geometry.mean_shift_ratio(tuned), abs=1e-3)
    assert ("coupled over the vocabulary: lm_head.weight (67, 16)" in result.stderr) == (optimizer == "coupled_adam")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/model"], "--model no/model: no such directory or file"),
        (["--steps", "0"], "--steps 0: it must be 1 or more"),
        (["--model", "MODEL", "--text", "no.txt"], "no.txt: no such file"),
        (["--model", "MODEL", "--steps", "100000"], "12,800,512 are wanted; fewer --steps"),
        (["--model", "TEXT"], "--model .*text.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, text_file, arguments, message) -> None:
    given = [{"MODEL": folder, "TEXT": text_file}.get(x, x) for x in arguments]
    result = program(FINETUNE, *(given if "--text" in given else [*given, "--text", text_file]), "--length", "32")
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert re.search(rf"^finetune_trainer.py: .*{message}", result.stderr.splitlines()[-1])


def test_nanogpt_keeps_its_loop_and_its_mean_stays() -> None:
    torch.set_num_threads(1)
    result = program(EXAMPLES / "nanogpt.py", "--steps", "100")
    assert result.returncode == 0, result.stderr
    assert "coupled over the vocabulary: transformer.wte.weight (256, 32)" in result.stdout
    found = re.findall(r"^(.*): loss (\S+), mean shift ratio (\S+)$", result.stdout, re.MULTILINE)
    (adamw, loss, shift), (coupled, coupled_loss, coupled_shift) = found
    assert (adamw, coupled) == ("AdamW", "Coupled Adam")
    assert float(coupled_shift) < float(shift) / 4 and float(coupled_loss) < float(loss) + 0.1


def test_nanogpt_explains_itself() -> None:
    result = program(EXAMPLES / "nanogpt.py", "--help")
    assert result.returncode == 0 and "replace ``configure_optimizers``" in result.stdout
    assert "loss" not in result.stdout
    result = program(EXAMPLES / "nanogpt.py", "--steps", "0")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        2,
        "nanogpt.py: error: --steps 0: it must be 1 or more",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nodata"], "local_task.py: nodata.*"),
        (["nodata", "--words", "8"], "local_task.py: error: --words 8: it must be 9 or more"),
        (["nodata", "--questions", "0"], "local_task.py: error: --questions 0: it must be 1 or more"),
        (
            ["CORPUS", "--questions", "3"],
            "local_task.py: .*the text makes 0 questions; fewer --questions, or more text",
        ),
        (["CORPUS", "--out", "CORPUS/meta.json/no"], "local_task.py: .*"),
    ],
)
def test_local_task_ends_with_one_line(tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus"
    if any("CORPUS" in x for x in arguments):
        text = tmp_path / "text.txt"
        text.write_text("\n".join(" ".join(map(str, range(i, i + 20))) for i in range(400)), "utf-8")  # no words
        made = command("prepare", text, "--vocab-size", "300", "--out", corpus)
        assert made.returncode == 0, made.stderr
    result = program(EXAMPLES / "local_task.py", *(x.replace("CORPUS", str(corpus)) for x in arguments))
    assert result.returncode == 2, result.stdout
    assert re.fullmatch(message, result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr


def test_without_their_extras_examples_are_one_line() -> None:
    code = """
import runpy, sys
for program, missing in (("local_task", "tokenizers"), ("finetune_trainer", "accelerate")):
    sys.modules[missing] = None
    try:
        runpy.run_path(f"{sys.argv[1]}/{program}.py", run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""
    result = subprocess.run([sys.executable, "-c", code, EXAMPLES], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["2", "2"], result.stderr
    first, second = (line for line in result.stderr.splitlines() if ".py: " in line)
    assert re.fullmatch(r"local_task.py: tokenizers not installed[:;] .*install .*", first)
    assert second == "finetune_trainer.py: accelerate not installed: pip install accelerate"
