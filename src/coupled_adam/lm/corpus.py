"""Text to token shards on disk.

A corpus folder holds ``tokenizer.json`` (of the library ``tokenizers``), the shards ``train-00000.bin`` …,
``validation-00000.bin`` … (token ids, little-endian uint16, documents one after the other, each closed by
``<|endoftext|>``), ``unigram_counts.npy`` (int64, how often each token occurs in the training shards) and
``meta.json``.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from coupled_adam.errors import InputError
from coupled_adam.files import write_json, written_whole
from coupled_adam.lm.config import Data, Experiment
from coupled_adam.lm.sources import Source, WikipediaSample

FORMAT = 1
DTYPE = "<u2"
END_OF_DOCUMENT = "<|endoftext|>"
VALIDATION_SHARE = 0.05
SHARD_TOKENS = 100_000_000

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened with :func:`open_corpus`."""

    folder: Path
    meta: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Digest of the text and the settings that made the corpus."""
        return str(self.meta["fingerprint"])

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding: the tokens, padded to a multiple of 64."""
        return int(self.meta["vocabulary_size"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def unigram_counts(self) -> NDArray[np.int64]:
        """Occurrences of each token in the training text, (vocabulary_size,)."""
        counts: NDArray[np.int64] = np.load(self.folder / "unigram_counts.npy")
        return counts

    def shards(self, split: str) -> list[Tokens]:
        """The memory-mapped token ids of ``"train"`` or ``"validation"``."""
        return [np.memmap(self.folder / s["file"], dtype=DTYPE, mode="r") for s in self.meta["shards"][split]]

    def tokens(self, split: str) -> int:
        """Number of tokens in ``"train"`` or ``"validation"``."""
        return sum(s["tokens"] for s in self.meta["shards"][split])

    def token_of(self, word: str) -> int | None:
        """The token that stands for a word within a text, with its leading space; None if it takes several."""
        ids = self.tokenizer.encode(" " + word, add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 else None


def corpus_for(experiment: Experiment, folder: Path | None) -> Corpus:
    """The corpus in ``folder``, if the experiment can be trained on it. Without one: the Wikipedia sample, prepared.

    Raises:
        InputError: the experiment needs other text, or the corpus has more tokens than the model.
    """
    data = experiment.data
    if folder is None:
        if (data.source, data.tokenizer) != ("wikipedia-sample", "bpe"):
            raise InputError(
                f"{experiment.run.name} trains on {data.source}: prepare it (coupled-adam prepare {data.source} "
                f"--tokenizer {data.tokenizer} --out DIR), then give --data DIR"
            )
        return prepare(WikipediaSample(), data, Path("data") / f"wikipedia-sample-bpe-{data.vocabulary}")
    corpus = open_corpus(folder)
    if corpus.vocabulary_size > data.padded_vocabulary:
        raise InputError(
            f"{folder}: made with a tokenizer of {corpus.meta['tokenizer_tokens']:,} tokens, and {experiment.run.name} "
            f"has data.vocabulary = {data.vocabulary:,}; prepare it with the experiment's tokenizer, or change that"
        )
    return corpus


def prepare(source: Source, config: Data, folder: Path) -> Corpus:
    """Train a tokenizer on ``source``, write its tokens to ``folder``, and open it. Reuses what is there and unchanged.

    Raises:
        InputError: the text is missing, unreadable, or too short for a single training sequence.
    """
    settings = [FORMAT, config.vocabulary, VALIDATION_SHARE, SHARD_TOKENS]
    fingerprint = hashlib.sha256(f"{source.fingerprint()} {settings}".encode()).hexdigest()
    if (folder / "meta.json").exists() and (corpus := open_corpus(folder)).fingerprint == fingerprint:
        return corpus
    train, validation = _split(source)
    tokenizer = _train_tokenizer(train, config.vocabulary)
    with written_whole(folder) as aside:
        aside.mkdir()
        tokenizer.save(str(aside / "tokenizer.json"))
        shards = {}
        counts = np.zeros(_padded(tokenizer.get_vocab_size()), dtype=np.int64)
        for split, documents in (("train", train), ("validation", validation)):
            tokens = _encode(tokenizer, documents)
            if len(tokens) <= config.sequence_length:
                raise InputError(
                    f"{source.name}: too short: its {split} part has {len(tokens):,} tokens, "
                    f"and one sequence takes {config.sequence_length + 1:,}"
                )
            shards[split] = _write_shards(tokens, split, aside)
            if split == "train":
                counts += np.bincount(tokens, minlength=len(counts))
        np.save(aside / "unigram_counts.npy", counts)
        meta = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "source": source.name,
            "dtype": DTYPE,
            "vocabulary_size": len(counts),
            "tokenizer_tokens": tokenizer.get_vocab_size(),
            "tokenizer_sha256": hashlib.sha256((aside / "tokenizer.json").read_bytes()).hexdigest(),
            "documents": {"train": len(train), "validation": len(validation)},
            "characters": {"train": sum(map(len, train)), "validation": sum(map(len, validation))},
            "shards": shards,
        }
        write_json(aside / "meta.json", meta)
    return open_corpus(folder)


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared corpus. Raises InputError naming the file that is missing, truncated or of another format."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise InputError(f"{path}: format {meta['format']}, this version reads format {FORMAT}; delete the folder")
        expected = {
            s["file"]: s["tokens"] * np.dtype(DTYPE).itemsize for split in meta["shards"].values() for s in split
        }
    except FileNotFoundError:
        raise InputError(f"{path}: not found; the folder holds no prepared corpus") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete the folder {folder} to prepare it again") from None
    for name, size in expected.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            raise InputError(f"{folder / name}: {found:,} bytes, not {size:,}; delete the folder to prepare it again")
    if hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() != meta["tokenizer_sha256"]:
        raise InputError(f"{folder / 'tokenizer.json'}: not the tokenizer that made the shards; delete the folder")
    return Corpus(folder, meta)


def _split(source: Source) -> tuple[list[str], list[str]]:
    """Documents for training and, about a twentieth of the characters, for validation."""
    documents = source.documents()
    if len(documents) < 2:
        raise InputError(
            f"{source.name}: too short: {len(documents)} document(s), one to train and one to validate needed"
        )
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    wanted, held_out, characters = VALIDATION_SHARE * sum(map(len, documents)), set[int](), 0
    for i in order[:-1]:
        if characters >= wanted:
            break
        held_out.add(i)
        characters += len(documents[i])
    return [d for i, d in enumerate(documents) if i not in held_out], [documents[i] for i in sorted(held_out)]


def _train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: list[str]) -> Tokens:
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    encodings = tokenizer.encode_batch(documents)
    return np.concatenate([np.array([*e.ids, end], dtype=DTYPE) for e in encodings])


def _write_shards(tokens: Tokens, split: str, folder: Path) -> list[dict[str, Any]]:
    shards = []
    for i, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        part = tokens[start : start + SHARD_TOKENS]
        name = f"{split}-{i:05d}.bin"
        part.tofile(folder / name)
        shards.append({"file": name, "tokens": len(part)})
    return shards


def _padded(size: int) -> int:
    """The next multiple of 64: matrix products are fastest there."""
    return -(-size // 64) * 64
