"""fastokens gives the tokens of tokenizers, or is not used; processes give the corpus of one, or a clear error."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import fastokens
import numpy as np
import pytest
from paragraphs import paragraphs
from test_prepare import tokenizer_folder
from test_prepare_tokenizers import KINDS, byte_level, save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from coupled_adam.errors import InputError
from coupled_adam.lm import encoding, held_out, workers
from coupled_adam.lm import prepare as module
from coupled_adam.lm.config import Data
from coupled_adam.lm.encoding import Encoder, FastEncoder
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import source_of

DOCUMENTS = paragraphs(400).split("\n\n")
U4 = np.dtype("<u4")

#: How GPT-4 divides a text into words.
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS = "abcxyzABC019 \n\t\r'.,<|>_-\0éß中😀\u0301İ\u00a0\u200b\u2028"
NAMES = ["</s>", "<|im_start|>", "<think>"]
STRANGE = [
    *("", " ", "\n", "it's we'll IT'S I'LL", "  x  \n\n  y ", "a" * 3_000, "\n" * 3_000, " " * 3_000 + "a"),
    *NAMES,
    *(f"a{name}b {name} {name}{name}" for name in NAMES),
]


def trained(pre: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A byte-level BPE of 600 tokens, some of them special, and one that is added but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*DOCUMENTS, "été İstanbul 中文 naïve 12,345 <|>", *NAMES], trainer)
    tokenizer.add_special_tokens(NAMES[:2])
    tokenizer.add_tokens([AddedToken(NAMES[2], special=False)])
    return tokenizer


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BYTE_LEVEL: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "with a space before": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt4": lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT4), "isolated"), LEVEL])),
    "normalized": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()),
    "no merges": lambda: byte_level(NAMES[1:2]),
}


def found(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    tokens, ends, _ = encoder.encode(texts, U4)
    return [part.tolist() for part in np.split(tokens, ends[:-1])]


@cache
def made(kind: str) -> str:
    return (BYTE_LEVEL[kind]() if kind in BYTE_LEVEL else KINDS[kind](["[MASK]"])).to_str()


def both(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Encoder, Encoder]:
    """The encoder from the first character on with fastokens, if it is used, and one without."""
    encoders = [Encoder(Tokenizer.from_str(made(kind)), 0, "a") for _ in range(2)]
    monkeypatch.setattr(encoding, "FAST_AFTER", 0)
    encoders[0].encode(["a"], U4)
    encoders[1]._characters = None  # fastokens has been tried
    return encoders[0], encoders[1]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_fastokens_gives_the_tokens_of_tokenizers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = both(kind, monkeypatch)
    assert fast.is_fast and not slow.is_fast
    rng = random.Random(0)
    made_up = ["".join(rng.choices(LETTERS, k=rng.randint(1, 90))) for _ in range(2_000)]
    for texts in (DOCUMENTS, STRANGE, made_up):
        assert found(fast, texts) == found(slow, texts)
    assert fast.is_fast


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gpt2", "gpt4"])
def test_fastokens_knows_the_characters_of_unicode(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = both(kind, monkeypatch)
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    characters = [c for c in every if unicodedata.category(c) not in ("Cs", "Co", "Cn")]
    characters = characters[:9_000] + characters[9_000::20]  # of ideographs and syllables, a part
    texts = ["".join(f"{c}1{c} {c}.{c}a" for c in characters[i : i + 100]) for i in range(0, len(characters), 100)]
    assert found(fast, texts) == found(slow, texts)
    assert fast.is_fast


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_level"])
def test_what_fastokens_does_not_support_is_encoded_all_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = both(kind, monkeypatch)
    assert not fast.is_fast and found(fast, DOCUMENTS) == found(slow, DOCUMENTS)


def test_fastokens_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    fast, slow = both("gpt2", monkeypatch)
    assert not fast.is_fast and found(fast, DOCUMENTS) == found(slow, DOCUMENTS)


class Wrong:
    """A fastokens that makes mistakes: other tokens for texts in which ``mistakes`` finds something, or an error."""

    def __init__(self, tokenizer: Tokenizer, mistakes: Callable[[str], bool], fails: bool = False) -> None:
        self.right = fastokens.Tokenizer.from_json_str(tokenizer.to_str())
        self.mistakes, self.fails = mistakes, fails

    def encode_batch_flat(self, texts: list[str], **options: bool) -> tuple[bytes, bytes]:
        if self.fails and any(map(self.mistakes, texts)):
            raise RuntimeError("a library's error")
        return self.right.encode_batch_flat(["?" + t if self.mistakes(t) else t for t in texts], **options)


@pytest.mark.parametrize("fails", [False, True])
def test_one_character_that_it_encodes_otherwise_is_enough_not_to_use_it(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = both("gpt2", monkeypatch)
    fast._fast = FastEncoder(fast.tokenizer, Wrong(fast.tokenizer, lambda text: "é" in text, fails))
    assert found(fast, DOCUMENTS) == found(slow, DOCUMENTS) and fast.is_fast
    texts = [*DOCUMENTS, "après cela, l'été"]
    assert found(fast, texts) == found(slow, texts) and not fast.is_fast


def test_a_text_that_it_encodes_otherwise_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = both("gpt2", monkeypatch)
    fast._fast = FastEncoder(fast.tokenizer, Wrong(fast.tokenizer, lambda text: "lake lake" in text))
    with pytest.raises(InputError, match=r"'a lake lake' …\): pip uninstall fastokens.*--overwrite"):
        fast.encode(["a lake lake"], U4)


def test_long_batches_are_encoded_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sliced = (Encoder(KINDS["word_piece"]([]), 1, "a") for _ in range(2))
    expected = found(whole, DOCUMENTS)
    monkeypatch.setattr(encoding, "SLICE_CHARACTERS", 1_000)
    assert found(sliced, DOCUMENTS) == expected


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table that is read as a stream, as large ones are."""
    monkeypatch.setattr(held_out, "IN_MEMORY", 1_000)
    monkeypatch.setattr(held_out, "STREAM_VALIDATION_SHARE", 0.1)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return path


def at_once(patch: pytest.MonkeyPatch, processes: int = 2) -> list[workers.Process]:
    """Makes small work be done by processes; returns those that are started."""
    started: list[workers.Process] = []

    class Listed(workers.Process):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            started.append(self)

    patch.setattr(workers, "Process", Listed)
    patch.setattr(workers, "PROCESSES_AFTER", 0.0)
    patch.setattr(workers, "cores", lambda: processes)
    patch.setattr(module, "BATCH_DOCUMENTS", 25)
    return started


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name[0] != "."}


@pytest.mark.parametrize("kind", ["bpe", "word_level"])
def test_processes_make_the_same_files(
    kind: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = kind if kind == "bpe" else save(KINDS[kind](["a"]), tmp_path / "tokenizer")
    data = Data(tokenizer=name, vocab_size=300, sequence_length=16)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 25)
    monkeypatch.setattr(module, "SHARD_TOKENS", 5_000)
    prepare(source_of(str(table)), data, tmp_path / "one")
    alone = capsys.readouterr().err
    started = at_once(monkeypatch, 3)
    prepare(source_of(str(table)), data, tmp_path / "many")
    assert len(started) == 3 and all(process._process.poll() is not None for process in started)
    assert content(tmp_path / "one") == content(tmp_path / "many") and len(content(tmp_path / "one")) > 5
    assert capsys.readouterr().err == alone
    assert ("special tokens that appear in the text" in alone) == (kind == "word_level")


def test_little_text_is_not_worth_a_process(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = at_once(monkeypatch)
    monkeypatch.setattr(workers, "PROCESSES_AFTER", 2.0)
    prepare(source_of(str(table)), Data(vocab_size=300, sequence_length=16), tmp_path / "corpus")
    assert not started


def test_a_process_that_is_killed_is_an_error_and_its_work_is_done_again(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(tokenizer=str(tokenizer_folder(tmp_path / "tokenizer", 320)), vocab_size=320, sequence_length=16)
    monkeypatch.setattr(module, "SAVE_TOKENS", 2_000)
    with monkeypatch.context() as patch:
        started, killed, add = at_once(patch), list[int](), module.Shards._add

        def kills(self: module.Shards, *batch: object) -> None:
            add(self, *batch)
            if len(started) == 2 and not killed and sum(self.record["documents"].values()) >= 100:
                killed.append(started[1]._process.pid)
                os.kill(killed[0], signal.SIGKILL)

        patch.setattr(module.Shards, "_add", kills)
        with pytest.raises(InputError, match=r"process \d+, which encoded text, ended by signal 9; .* to resume"):
            prepare(source_of(str(table)), data, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    assert all(process._process.poll() is not None for process in started)
    said: list[str] = []
    monkeypatch.setattr(module, "say", said.append)
    prepare(source_of(str(table)), data, tmp_path / "corpus")
    prepare(source_of(str(table)), data, tmp_path / "whole")
    assert any("resuming after" in line for line in said)
    assert content(tmp_path / "corpus") == content(tmp_path / "whole")


def test_what_a_process_cannot_encode_is_the_same_line(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(models.Unigram([("</s>", 0.0), *((c, -1.0) for c in "abcdefghijklmnopqrstuvwxyz. ")]))
    data = Data(tokenizer=save(tokenizer, tmp_path / "tokenizer"), vocab_size=300, sequence_length=16)
    with table.open("a", encoding="utf-8") as file:
        file.write('{"text": "naïve"}\n')
    lines = []
    for processes in (1, 2):
        at_once(monkeypatch, processes)
        with pytest.raises(InputError, match="cannot encode the text") as error:
            prepare(source_of(str(table)), data, tmp_path / "corpus")
        lines.append(str(error.value))
    assert lines[0] == lines[1] and not list(tmp_path.glob("*corpus*"))


#: Prepares a table with two processes, slowly; says which they are.
SLOWLY = """
import sys, time
from pathlib import Path
from coupled_adam.lm import held_out, prepare as module, workers
from coupled_adam.lm.config import Data
from coupled_adam.lm.sources import source_of

workers.PROCESSES_AFTER, workers.cores, module.BATCH_DOCUMENTS, held_out.IN_MEMORY = 0.0, lambda: 2, 5, 1_000
add, start = module.Shards._add, workers.Encoders.start

def slowly(self, *batch):
    time.sleep(0.2)
    add(self, *batch)

def starts(self, count):
    start(self, count)
    print(*(process._process.pid for process in self._processes), flush=True)

module.Shards._add, workers.Encoders.start = slowly, starts
module.prepare(source_of(sys.argv[1]), Data(vocab_size=300, sequence_length=16), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(number: int, table: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOWLY, str(table), str(tmp_path / "corpus")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout is not None
    children = list(map(int, run.stdout.readline().split()))
    assert len(children) == 2
    os.killpg(run.pid, number)  # as a terminal does
    _, errors = run.communicate(timeout=20)
    assert run.returncode == -number and errors.count("Traceback") == (number == signal.SIGINT)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.05)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"RAYON_NUM_THREADS": "1"}, 1),
        ({"RAYON_NUM_THREADS": "0"}, None),
        ({"RAYON_NUM_THREADS": "100000"}, None),
        ({"TOKENIZERS_PARALLELISM": "false"}, 1),
        ({"TOKENIZERS_PARALLELISM": "true"}, None),
    ],
)
def test_so_many_cores_as_tokenizers_uses(
    variables: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert workers.cores() == (expected or len(os.sched_getaffinity(0)))
