"""A prepared corpus: token shards on disk.

Its directory holds ``tokenizer.json`` (of the library ``tokenizers``), the shards ``train-00000.bin`` …,
``validation-00000.bin`` … (token IDs, little-endian uint16, or uint32 for IDs above 65,535, documents one after the
other, each closed by the end-of-document token), ``unigram_counts.npy`` (int64, how often each token occurs in the
training shards) and ``meta.json``, with the checksum of every file and of itself.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from typing_extensions import TypedDict

from coupled_adam.errors import InputError
from coupled_adam.files import MANIFEST, read_json, read_sealed, verify
from coupled_adam.lm.words import Words, words_of

FORMAT = 4

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
"""Token IDs, (n,), of the smallest dtype that fits the vocabulary."""


class Shard(TypedDict):
    """A file of token IDs."""

    file: str
    tokens: int


class Counts(TypedDict):
    """A number for each split."""

    train: int
    validation: int


class ShardLists(TypedDict):
    """The files of each split."""

    train: list[Shard]
    validation: list[Shard]


class Settings(TypedDict):
    """All that determines the tokens of a corpus. None stands for what is not known, or makes no difference."""

    format: int
    text: str
    """Digest of the text, or of the names, sizes and times of large files."""
    revision: str | None
    """Commit of a dataset of the Hugging Face hub."""
    tokenizer: str
    tokenizer_sha256: str | None
    """Of the JSON of a tokenizer that was not trained on the text."""
    vocab_size: int | None
    """Of one that was."""
    held_out: NotRequired[float]
    """Share of the text that is for validation, where it was asked for."""


class Record(TypedDict):
    """What has been written, of a finished corpus and of one in the making."""

    kind: Literal["corpus"]
    format: int
    source: str
    settings: Settings
    versions: dict[str, str]
    """Of the libraries that made it."""
    tokenizer_sha256: str
    """Of the JSON of the tokenizer, trained or not."""
    tokenizer_tokens: int
    """Its highest ID and one."""
    end_of_document: int
    documents: Counts
    characters: Counts
    shards: ShardLists


class Meta(Record):
    """Content of ``meta.json``."""

    fingerprint: str
    dtype: Literal["<u2", "<u4"]
    vocab_size: int
    checksums: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened with ``open_corpus``."""

    directory: Path
    """Where it is."""
    meta: Meta
    """The content of its ``meta.json``: text, settings, counts, shards and checksums."""

    @property
    def fingerprint(self) -> str:
        """Digest of the text and of the settings."""
        return self.meta["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the number of tokens, padded to a multiple of 64."""
        return self.meta["vocab_size"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards. It encodes the names of special tokens as it encodes any text."""
        tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def words(self) -> Words:
        """Single words of the vocabulary, and the text of its tokens."""
        return words_of(self.tokenizer)

    @cached_property
    def unigram_counts(self) -> NDArray[np.int64]:
        """Occurrences of each token in the training text, (vocab_size,)."""
        counts: NDArray[np.int64] = np.load(self.directory / "unigram_counts.npy")
        return counts

    def shards(self, split: Literal["train", "validation"]) -> list[Tokens]:
        """Map the token IDs of ``"train"`` or ``"validation"`` into memory."""
        files = [s["file"] for s in self.meta["shards"][split]]
        return [np.memmap(self.directory / name, dtype=self.meta["dtype"], mode="r") for name in files]

    def tokens(self, split: Literal["train", "validation"]) -> int:
        """Number of tokens in ``"train"`` or ``"validation"``."""
        return sum(s["tokens"] for s in self.meta["shards"][split])

    @property
    def documents(self) -> int:
        """Number of documents in both splits."""
        return self.meta["documents"]["train"] + self.meta["documents"]["validation"]

    def summary(self) -> str:
        """Return what it is, for messages."""
        tokens = f"{self.tokens('train'):,} training tokens, vocabulary {self.meta['tokenizer_tokens']:,}"
        return f"{self.meta['source']}, {tokens}"


def open_corpus(directory: Path) -> Corpus:
    """Open a prepared corpus. Its files are verified when they are first seen, or have changed since.

    Raises:
        InputError: a file is missing, damaged or of another format; the message names it.
    """
    corpus = read_meta(directory)
    verify(directory, corpus.meta["checksums"], _remedy(directory), remember=True)
    return corpus


def read_meta(directory: Path) -> Corpus:
    """Open a prepared corpus, but verify ``meta.json`` alone. Raises InputError as ``open_corpus``."""
    path, remedy = directory / "meta.json", _remedy(directory)
    if not path.exists():
        raise InputError(f"{path}: not found; the directory contains no prepared corpus")
    content = read_json(path, dict[str, Any], remedy)
    if not {"format", "fingerprint", "shards"} <= content.keys():
        raise InputError(f"{path}: does not belong to a prepared corpus; choose another directory")
    if content["format"] != FORMAT:
        older = isinstance(content["format"], int) and content["format"] < FORMAT
        runs = ", and finish the runs that use it with the version that made it" if older else ""
        raise InputError(f"{path}: format {content['format']}, but this version reads format {FORMAT}; {remedy}{runs}")
    meta = read_sealed(path, Meta, remedy)
    files = {shard["file"] for split in ("train", "validation") for shard in meta["shards"][split]}
    if meta["fingerprint"] != fingerprint_of(meta["settings"]) or not files <= meta["checksums"].keys():
        raise InputError(f"{path}: damaged (inconsistent); {remedy}")
    return Corpus(directory, meta)


def fingerprint_of(settings: Settings) -> str:
    """Return the identity of a corpus: a digest of all that determines it."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _remedy(directory: Path) -> str:
    # Without the list of its files it may be of an earlier version, or somebody else's.
    made_here = (directory / MANIFEST).exists()
    return f"delete {directory} to prepare it again" if made_here else "prepare it again, in another directory"
