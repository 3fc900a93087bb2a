"""Text to shards to batches."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from paragraphs import paragraphs

from coupled_adam.errors import InputError
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.config import Data
from coupled_adam.lm.corpus import open_corpus
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles, WikipediaSample
from coupled_adam.lm.tokenizer import END_OF_DOCUMENT

DATA = Data(vocab_size=300, sequence_length=16)


def test_the_shards_hold_the_text(text_file: Path, tmp_path: Path) -> None:
    corpus = prepare(TextFiles(text_file), DATA, tmp_path / "corpus")
    decoded = {}
    for split in ("train", "validation"):
        (shard,) = corpus.shards(split)
        text = corpus.tokenizer.decode(shard.tolist(), skip_special_tokens=False)
        decoded[split] = text.split(END_OF_DOCUMENT)[:-1]
        assert len(shard) == corpus.tokens(split)
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(text_file.read_text().split("\n\n"))
    assert 0.02 < len(decoded["validation"]) / 200 < 0.1
    assert not set(decoded["train"]) & set(decoded["validation"])


def test_the_counts_are_those_of_the_training_tokens(text_file: Path, tmp_path: Path) -> None:
    corpus = prepare(TextFiles(text_file), DATA, tmp_path / "corpus")
    (shard,) = corpus.shards("train")
    assert corpus.vocab_size == 320, "300 tokens, padded to a multiple of 64"
    assert corpus.unigram_counts.tolist() == np.bincount(shard, minlength=320).tolist()


def test_a_corpus_is_reused_until_something_changes(text_file: Path, tmp_path: Path) -> None:
    def made() -> int:
        return (tmp_path / "corpus" / "meta.json").stat().st_ino

    first = prepare(TextFiles(text_file), DATA, tmp_path / "corpus")
    inode = made()
    prepare(TextFiles(text_file), DATA, tmp_path / "corpus")
    assert made() == inode
    text_file.write_text(paragraphs(200, seed=1), encoding="utf-8")
    with pytest.raises(InputError, match=r"already contains another corpus .*its text is different or has changed"):
        prepare(TextFiles(text_file), DATA, tmp_path / "corpus")
    second = prepare(TextFiles(text_file), DATA, tmp_path / "corpus", overwrite=True)
    assert second.fingerprint != first.fingerprint
    again = prepare(TextFiles(text_file), Data(vocab_size=280, sequence_length=16), tmp_path / "corpus", overwrite=True)
    assert again.meta["tokenizer_tokens"] == 280


def test_a_folder_of_files(tmp_path: Path) -> None:
    directory = tmp_path / "texts"
    (directory / "inner").mkdir(parents=True)
    for i in range(4):
        (directory / "inner" / f"{i}.txt").write_text(paragraphs(20, seed=i), encoding="utf-8")
    (directory / "picture.png").write_bytes(b"\x89PNG\0")
    corpus = prepare(TextFiles(directory), DATA, tmp_path / "corpus")
    assert corpus.meta["documents"] == {"train": 3, "validation": 1}


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    assert TextFiles(path).documents() == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b" \n\n ", "the file is empty"),
        (b"\x7fELF\0\0", "a binary file"),
        ("naïve".encode("latin-1"), "not UTF-8"),
        (b"one word", r"too short: 1 document"),
        (b"a few words\n\nand more", r"too short: its train split has \d+ tokens, but one sequence needs 17"),
    ],
)
def test_bad_text_is_refused_and_leaves_nothing_behind(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"text.txt: {message}"):
        prepare(TextFiles(path), DATA, tmp_path / "out" / "corpus")
    assert [p.name for p in (tmp_path / "out").glob("*")] == []


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.txt or \.md files"):
        TextFiles(tmp_path).documents()


@pytest.mark.parametrize("file", ["train-00000.bin", "validation-00000.bin", "tokenizer.json", "meta.json"])
def test_a_damaged_corpus_is_refused_by_the_name_of_the_file(file: str, text_file: Path, tmp_path: Path) -> None:
    prepare(TextFiles(text_file), DATA, tmp_path / "corpus")
    path = tmp_path / "corpus" / file
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=file):
        open_corpus(tmp_path / "corpus")


def test_another_format_is_refused(text_file: Path, tmp_path: Path) -> None:
    prepare(TextFiles(text_file), DATA, tmp_path / "corpus")
    path = tmp_path / "corpus" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(InputError, match=r"meta\.json: format 99"):
        open_corpus(tmp_path / "corpus")


@pytest.mark.long
def test_the_wikipedia_sample_is_prose() -> None:
    articles = WikipediaSample().documents()
    text = "\n".join(articles)
    assert 100 <= len(articles) <= 107
    assert 2.3e6 < len(text) < 2.8e6
    assert not any(sign in text for sign in ("[[", "]]", "{{", "''", "\n=", "\n*", "\n|", "<ref"))
    assert any(article.startswith("Anarchism") for article in articles)


def shards(*sizes: int) -> list[np.ndarray]:
    """Token ids that count on from one shard to the next."""
    edges = np.cumsum([0, *sizes])
    return [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(edges)]


def test_one_epoch_holds_every_sequence_once() -> None:
    batches = Batches(shards(41, 33), sequence_length=8, batch_size=3, seed=1)
    assert len(batches) == 5 + 4
    inputs, targets = (torch.cat(parts) for parts in zip(*(batches.batch(i) for i in range(3)), strict=True))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert sorted(inputs[:, 0].tolist()) == [0, 8, 16, 24, 32, 41, 49, 57, 65]
    assert torch.equal(targets[:, -1], inputs[:, 0] + 8), "no sequence crosses from one shard to the next"


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, two = (Batches(shards(1000), 8, 4, seed=1) for _ in range(2))
    for step in range(100):
        one.batch(step)
    assert torch.equal(one.batch(77)[0], two.batch(77)[0])
    assert not torch.equal(one.batch(0)[0], one.batch(31)[0]), "the next epoch has another order"
    assert not torch.equal(one.batch(0)[0], Batches(shards(1000), 8, 4, seed=2).batch(0)[0])


@pytest.mark.parametrize("replacement", [False, True])
def test_too_few_tokens_are_refused(replacement: bool) -> None:
    with pytest.raises(InputError, match="8 tokens are too few for one sequence of 8"):
        Batches(shards(8), 8, 1, seed=0, replacement=replacement)


def test_with_replacement_every_start_in_every_shard_is_equally_likely() -> None:
    batches = Batches(shards(41, 8, 33), sequence_length=8, batch_size=50, seed=1, replacement=True)
    inputs, targets = (torch.cat(parts) for parts in zip(*(batches.batch(i) for i in range(200)), strict=True))
    starts, counts = inputs[:, 0].unique(return_counts=True)
    assert starts.tolist() == [*range(41 - 8), *range(49, 49 + 33 - 8)], "the second shard is too short for any"
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8)) and torch.equal(targets, inputs + 1)
    expected = 10_000 / len(starts)
    chi_squared = float((counts - expected).square().sum() / expected)
    assert abs(chi_squared - (len(starts) - 1)) < 4 * (2 * len(starts)) ** 0.5
    assert len({tuple(batches.batch(i)[0][:, 0].tolist()) for i in range(50)}) == 50, "no step repeats another"


def test_with_replacement_a_batch_depends_on_seed_and_step_alone() -> None:
    one, two = (Batches(shards(1000), 8, 4, seed=1, replacement=True) for _ in range(2))
    for step in range(100):
        one.batch(step)
    assert torch.equal(one.batch(77)[0], two.batch(77)[0])
    assert not torch.equal(one.batch(0)[0], Batches(shards(1000), 8, 4, seed=2, replacement=True).batch(0)[0])


@pytest.mark.parametrize("replacement", [False, True])
def test_a_token_outside_the_vocabulary_is_named(replacement: bool) -> None:
    batches = Batches(shards(9), 8, 1, seed=0, vocab_size=8, replacement=replacement)
    with pytest.raises(InputError, match="shard 0: token ID 8 after position 0, but the vocabulary has 8"):
        batches.batch(0)
