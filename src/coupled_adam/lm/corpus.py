"""A prepared corpus: token shards on disk.

Its directory holds ``tokenizer.json`` (of the library ``tokenizers``), the shards ``train-00000.bin`` …,
``validation-00000.bin`` … (token IDs, little-endian uint16, or uint32 for more than 65,536 tokens, documents one after
the other, each closed by the end-of-document token), ``unigram_counts.npy`` (int64, how often each token occurs in the
training shards) and ``meta.json``, with the checksum of every file.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from coupled_adam.errors import InputError
from coupled_adam.files import read_json, verify
from coupled_adam.lm.words import Words, words_of

FORMAT = 3

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened with ``open_corpus``."""

    directory: Path
    meta: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hash of the text and of the settings that made the corpus."""
        return str(self.meta["fingerprint"])

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the tokens, padded to a multiple of 64."""
        return int(self.meta["vocab_size"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards."""
        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    @cached_property
    def words(self) -> Words:
        """Single words of the vocabulary, and the text of its tokens."""
        return words_of(self.tokenizer)

    @cached_property
    def unigram_counts(self) -> NDArray[np.int64]:
        """Occurrences of each token in the training text, (vocab_size,)."""
        counts: NDArray[np.int64] = np.load(self.directory / "unigram_counts.npy")
        return counts

    def shards(self, split: str) -> list[Tokens]:
        """Map the token IDs of ``"train"`` or ``"validation"`` into memory."""
        files = [s["file"] for s in self.meta["shards"][split]]
        return [np.memmap(self.directory / name, dtype=self.meta["dtype"], mode="r") for name in files]

    def tokens(self, split: str) -> int:
        """Number of tokens in ``"train"`` or ``"validation"``."""
        return sum(s["tokens"] for s in self.meta["shards"][split])


def open_corpus(directory: Path) -> Corpus:
    """Open a prepared corpus. Its files are verified when they are first seen, or have changed since.

    Raises:
        InputError: a file is missing, damaged or of another format; the message names it.
    """
    path = directory / "meta.json"
    if not path.exists():
        raise InputError(f"{path}: not found; the directory holds no prepared corpus")
    remedy = f"delete {directory} to prepare it again"
    meta = read_json(path, dict[str, Any], remedy)
    if meta.get("format") != FORMAT:
        raise InputError(f"{path}: format {meta.get('format')}, this version reads format {FORMAT}; {remedy}")
    try:
        verify(directory, meta["checksums"], remedy, remember=True)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); {remedy}") from None
    return Corpus(directory, meta)
