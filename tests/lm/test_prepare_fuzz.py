"""Damaged inputs of coupled-adam prepare end in a corpus or in an InputError of one line, never in anything else."""

import bz2
import gzip
import json
import lzma
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paragraphs import paragraphs
from test_prepare import tokenizer_folder
from test_prepare_places import interrupted
from test_prepare_tokenizers import save, unigram, word_level, word_piece

from coupled_adam.errors import InputError
from coupled_adam.lm.config import Data
from coupled_adam.lm.corpus import open_corpus
from coupled_adam.lm.encoding import Encoder
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles, source_of
from coupled_adam.lm.tokenizer import load_tokenizer, size_of

#: Damaged files per format.
TRIES = 300

DOCUMENTS = [f"{text} é" for text in paragraphs(12).split("\n\n")]
DATA = Data(vocab_size=300, sequence_length=16)


def damaged(content: bytes, tries: int = TRIES) -> Iterator[bytes]:
    """The content with flipped bits, other bytes, insertions, deletions, zeroed ranges, repetitions and cut ends."""
    rng = random.Random(0)
    for _ in range(tries):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            a = rng.randrange(len(changed) or 1)
            b = min(a + rng.choice((1, 2, 8, 64)), len(changed))
            match rng.randrange(8):
                case 0 | 1 if changed:
                    changed[a] ^= 1 << rng.randrange(8)
                case 2 | 3 if changed:
                    changed[a] = rng.choice(b'0"{}[]\\,:-\x00\xff9e')
                case 4:
                    changed[a:a] = rng.randbytes(b - a)
                case 5:
                    del changed[a:b]
                case 6:
                    changed[a:b] = bytes(b - a)
                case _:
                    changed[b:b] = changed[a:b]
        if rng.random() < 0.1:
            del changed[rng.randrange(len(changed) + 1) :]
        yield bytes(changed)


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS}), sink)
    return bytes(sink.getvalue())


TEXT = "\n\n".join(DOCUMENTS).encode()
LINES = "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS).encode()
FORMATS: dict[str, Callable[[], bytes]] = {
    "x.txt": lambda: TEXT,
    "x.txt.gz": lambda: gzip.compress(TEXT),
    "x.utf16.txt": lambda: TEXT.decode().encode("utf-16"),
    "x.jsonl": lambda: LINES,
    "x.jsonl.gz": lambda: gzip.compress(LINES),
    "x.jsonl.bz2": lambda: bz2.compress(LINES),
    "x.jsonl.xz": lambda: lzma.compress(LINES),
    "x.jsonl.zst": lambda: pa.compress(LINES, "zstd", asbytes=True),
    "x.json": lambda: json.dumps([{"text": d} for d in DOCUMENTS], indent=1).encode(),
    "x.csv": lambda: ("id,text\n" + "".join(f'{i},"{d}"\n' for i, d in enumerate(DOCUMENTS))).encode(),
    "x.tsv": lambda: ("id\ttext\n" + "".join(f"{i}\t{d}\n" for i, d in enumerate(DOCUMENTS))).encode(),
    "x.parquet": parquet,
}


def outcome(attempt: Callable[[], object]) -> bool:
    """Whether it came to an end; False if it was refused in one line."""
    try:
        attempt()
    except InputError as error:
        assert "\n" not in str(error) and str(error)
        return False
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_sources(name: str, tmp_path: Path) -> None:
    path, refused = tmp_path / name, 0
    tries = TRIES if name.count(".") == 1 else TRIES // 3  # the rest is in the formats that are wrapped
    for content in damaged(FORMATS[name](), tries):
        path.write_bytes(content)

        def attempt() -> None:
            source = source_of(str(path))
            source.fingerprint()
            for text in source.documents():
                assert text.encode() and text.strip()

        refused += not outcome(attempt)
    assert refused > 10


@pytest.mark.parametrize("name", FORMATS)
def test_whole_preparations(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    for content in damaged(FORMATS[name](), 8):
        (tmp_path / name).write_bytes(content)
        outcome(lambda: prepare(source_of(str(tmp_path / name)), DATA, tmp_path / "corpus", overwrite=True))
        assert {path.name for path in tmp_path.iterdir()} <= {name, "corpus"}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word_level", "word_piece"])
def test_tokenizers(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "tokenizer"
    if kind == "bpe":
        tokenizer_folder(directory, 300)
    else:
        save({"unigram": unigram, "word_level": word_level, "word_piece": word_piece}[kind]([]), directory)
    path = directory / "tokenizer.json"
    content = json.dumps(json.loads(path.read_text())).encode()
    for changed in damaged(content, TRIES // 4):
        path.write_bytes(changed)

        def attempt() -> None:
            tokenizer, end = load_tokenizer(str(directory))
            tokens, ends, _ = Encoder(tokenizer, end, "x").encode(DOCUMENTS, np.dtype("<u4"))
            assert len(ends) == len(DOCUMENTS) and tokens.max() < size_of(tokenizer)
            assert np.array_equal(np.flatnonzero(tokens == end) + 1, ends)

        outcome(attempt)


def test_descriptions_of_corpora(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(TEXT)
    meta = prepare(TextFiles(tmp_path / "x.txt"), DATA, tmp_path / "corpus").meta
    path = tmp_path / "corpus" / "meta.json"
    for changed in damaged(path.read_bytes()):
        path.write_bytes(changed)
        for attempt in (
            lambda: open_corpus(tmp_path / "corpus"),
            lambda: prepare(TextFiles(tmp_path / "x.txt"), DATA, tmp_path / "corpus", overwrite=True),
        ):
            if outcome(attempt):
                assert open_corpus(tmp_path / "corpus").meta == meta


def test_records_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_bytes(TEXT)
    whole = prepare(TextFiles(tmp_path / "x.txt"), DATA, tmp_path / "whole")
    aside = interrupted(tmp_path / "x.txt", tmp_path / "corpus", monkeypatch)
    shutil.copytree(aside, tmp_path / "kept")
    for name in ("progress.json", "tokenizer.json"):
        for changed in damaged((tmp_path / "kept" / name).read_bytes(), TRIES // 2):
            (aside / name).write_bytes(changed)
            if outcome(lambda: prepare(TextFiles(tmp_path / "x.txt"), DATA, tmp_path / "corpus")):
                assert open_corpus(tmp_path / "corpus").meta == whole.meta
                shutil.rmtree(tmp_path / "corpus")
                shutil.copytree(tmp_path / "kept", aside)
        shutil.copy(tmp_path / "kept" / name, aside / name)
