"""Text to token shards on disk, what ``coupled-adam prepare`` does.

While a corpus is being made its directory is called ``.NAME.partial`` and holds ``progress.json``; an interrupted call
resumes from there.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from coupled_adam.errors import InputError
from coupled_adam.files import checksums, make_directory, output_path, put_in_place, read_json, write_json
from coupled_adam.lm.config import Data, Experiment
from coupled_adam.lm.corpus import FORMAT, Corpus, Tokens, open_corpus
from coupled_adam.lm.sources import PACKAGED, Source
from coupled_adam.lm.tokenizer import tokenizer_for
from coupled_adam.progress import say

VALIDATION_SHARE = 0.05
"""Of a source in memory."""
STREAM_VALIDATION_SHARE = 0.005
"""Of a stream, which is large."""
KIND = "corpus"
"""What its directory is said to be, where it would be replaced."""
SHARD_TOKENS = 100_000_000
SAVE_TOKENS = 10_000_000
"""Tokens after which progress is saved."""
BATCH_DOCUMENTS = 1_000
"""Documents that are encoded at a time, on all cores."""


def corpus_for(experiment: Experiment, directory: Path | None) -> Corpus:
    """Open the corpus in ``directory``, if the experiment can train on it; without one, prepare text of a package.

    Raises:
        InputError: the experiment needs other text, or the corpus has more tokens than the model.
    """
    data = experiment.data
    if directory is None:
        if data.source not in PACKAGED or data.tokenizer != "bpe":
            raise InputError(
                f"{experiment.run.name} trains on {data.source}: prepare it (coupled-adam prepare {data.source} "
                f"--tokenizer {data.tokenizer} --out DIR), then give --data DIR"
            )
        return prepare(PACKAGED[data.source](), data, Path("data") / f"{data.source}-bpe-{data.vocab_size}")
    corpus = open_corpus(directory)
    if corpus.vocab_size > data.padded_vocab_size:
        raise InputError(
            f"{directory}: made with a tokenizer of {corpus.meta['tokenizer_tokens']:,} tokens, but "
            f"{experiment.run.name} has data.vocab_size = {data.vocab_size:,}; prepare it with the experiment's "
            "tokenizer, or change data.vocab_size"
        )
    return corpus


def prepare(source: Source, config: Data, directory: Path) -> Corpus:
    """Write the tokens of ``source`` to ``directory``, and open it.

    A corpus that is there and unchanged is reused; what an interrupted call has left is resumed.

    Raises:
        InputError: the text is missing, unreadable, or too short for a single training sequence; the tokenizer is not
            available; or another process is preparing the same directory.
    """
    directory = output_path(directory)
    settings = [FORMAT, config.tokenizer, config.vocab_size, VALIDATION_SHARE, STREAM_VALIDATION_SHARE, SHARD_TOKENS]
    fingerprint = hashlib.sha256(f"{source.fingerprint()} {settings}".encode()).hexdigest()
    if (directory / "meta.json").exists() and (corpus := open_corpus(directory)).fingerprint == fingerprint:
        return corpus
    make_directory(directory.parent)
    try:
        with FileLock(directory.with_name(f".{directory.name}.lock"), timeout=0):
            _write(source, config, directory, fingerprint)
    except Timeout:
        raise InputError(f"{directory}: another process is preparing it; wait for it, or choose another") from None
    return open_corpus(directory)


def _write(source: Source, config: Data, directory: Path, fingerprint: str) -> None:
    aside = directory.with_name(f".{directory.name}.partial")
    progress = aside / "progress.json"
    if aside.exists() and not (progress.exists() and _fingerprint(progress) == fingerprint):
        shutil.rmtree(aside)
    try:
        aside.mkdir(exist_ok=True)
        tokenizer, end = tokenizer_for(config, lambda: _train_texts(source), aside / "tokenizer.json")
        shards = Shards(aside, fingerprint, tokenizer, end)
        shards.fill(_labeled(source), source.name)
        for split in ("train", "validation"):
            if shards.tokens(split) <= config.sequence_length:
                raise InputError(
                    f"{source.name}: too short: its {split} part has {shards.tokens(split):,} tokens, "
                    f"and one sequence takes {config.sequence_length + 1:,}"
                )
        shards.finish(source.name)
    except InputError:
        if not progress.exists():  # else the next call resumes from there, once a network is back, say
            shutil.rmtree(aside)
        raise
    put_in_place(aside, directory, KIND)


def _fingerprint(progress: Path) -> str | None:
    try:
        return str(read_json(progress, dict[str, Any])["fingerprint"])
    except (InputError, KeyError):
        return None


class Shards:
    """Files of tokens that grow, with a record of their progress that survives an interruption."""

    def __init__(self, directory: Path, fingerprint: str, tokenizer: Tokenizer, end: int) -> None:
        self.directory, self.tokenizer, self.end = directory, tokenizer, end
        self.dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4")
        self.counts = np.zeros(_padded(tokenizer.get_vocab_size()), dtype=np.int64)
        self.record: dict[str, Any] = {
            "fingerprint": fingerprint,
            "documents": {"train": 0, "validation": 0},
            "characters": {"train": 0, "validation": 0},
            "shards": {"train": [], "validation": []},
        }
        if (directory / "progress.json").exists():
            self.record = json.loads((directory / "progress.json").read_text(encoding="utf-8"))
            self.counts = np.load(directory / f"counts-{sum(self.record['documents'].values())}.npy")
            # What was written after the record was: the ends of files, and files that it does not know.
            sizes = {
                s["file"]: s["tokens"] * self.dtype.itemsize for s in itertools.chain(*self.record["shards"].values())
            }
            for path in directory.glob("*.bin"):
                if path.name in sizes:
                    os.truncate(path, sizes[path.name])
                else:
                    path.unlink()
        self._unsaved = 0

    def tokens(self, split: str) -> int:
        """Count the tokens written so far."""
        return sum(shard["tokens"] for shard in self.record["shards"][split])

    def fill(self, labeled: Iterable[tuple[str, str]], name: str) -> None:
        """Encode and append (split, document) pairs; the first ones, which are there already, are skipped."""
        done = sum(self.record["documents"].values())
        if done:
            say(f"{name}: resuming after {done:,} documents")
        rest, shown = itertools.islice(labeled, done, None), time.monotonic()
        while batch := list(itertools.islice(rest, BATCH_DOCUMENTS)):
            encodings = self.tokenizer.encode_batch([text for _, text in batch], add_special_tokens=False)
            for split in ("train", "validation"):
                own = [(text, e.ids) for (s, text), e in zip(batch, encodings, strict=True) if s == split]
                self.record["documents"][split] += len(own)
                self.record["characters"][split] += sum(len(text) for text, _ in own)
                if own:
                    self._append(split, np.concatenate([np.array([*ids, self.end], self.dtype) for _, ids in own]))
            if self._unsaved >= SAVE_TOKENS:
                self._save()
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                say(f"{name}: {sum(self.record['documents'].values()):,} documents, {self.tokens('train'):,} tokens")

    def _append(self, split: str, tokens: Tokens) -> None:
        shards = self.record["shards"][split]
        if not shards or shards[-1]["tokens"] >= SHARD_TOKENS:
            shards.append({"file": f"{split}-{len(shards):05d}.bin", "tokens": 0})
        with (self.directory / shards[-1]["file"]).open("ab") as file:
            tokens.tofile(file)
            file.flush()
            os.fsync(file.fileno())  # the record must not know of more than the disk
        shards[-1]["tokens"] += len(tokens)
        self._unsaved += len(tokens)
        if split == "train":
            self.counts += np.bincount(tokens, minlength=len(self.counts))

    def _save(self) -> None:
        documents = sum(self.record["documents"].values())
        np.save(self.directory / f"counts-{documents}.npy", self.counts)
        write_json(self.directory / "progress.json", self.record)
        for old in self.directory.glob("counts-*.npy"):
            if old.stem != f"counts-{documents}":
                old.unlink()
        self._unsaved = 0

    def finish(self, source: str) -> None:
        """Write what makes the directory a corpus."""
        np.save(self.directory / "unigram_counts.npy", self.counts)
        kept = [self.directory / "tokenizer.json", self.directory / "unigram_counts.npy"]
        kept += sorted(self.directory.glob("*.bin"))
        meta = {
            "format": FORMAT,
            "source": source,
            "dtype": self.dtype.str,
            "vocab_size": len(self.counts),
            "tokenizer_tokens": self.tokenizer.get_vocab_size(),
            "end_of_document": self.end,
            **self.record,
            "checksums": checksums(self.directory, kept, remember=True),
        }
        write_json(self.directory / "meta.json", meta)
        for left in (self.directory / "progress.json", *self.directory.glob("counts-*.npy")):
            left.unlink(missing_ok=True)


def _train_texts(source: Source) -> Iterator[str]:
    return (text for split, text in _labeled(source) if split == "train")


def _labeled(source: Source) -> Iterator[tuple[str, str]]:
    """Yield (split, document) pairs in the order of the source."""
    documents = source.documents()
    if isinstance(documents, list):
        held_out = _held_out(documents, source.name)
        yield from (("validation" if i in held_out else "train", text) for i, text in enumerate(documents))
        return
    for i, text in enumerate(documents):
        # Of a stream the first documents cannot know how many will follow: a hash of the position decides, and the
        # second document is always held out.
        share = int.from_bytes(hashlib.sha256(str(i).encode()).digest()[:8], "big") / 2**64
        yield ("validation" if share < STREAM_VALIDATION_SHARE or i == 1 else "train"), text


def _held_out(documents: list[str], name: str) -> set[int]:
    """Choose the documents for validation: about a twentieth of the characters."""
    if len(documents) < 2:
        raise InputError(f"{name}: too short: {len(documents)} document(s), one to train and one to validate needed")
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    wanted, held_out, characters = VALIDATION_SHARE * sum(map(len, documents)), set[int](), 0
    for i in order[:-1]:
        if characters >= wanted:
            break
        held_out.add(i)
        characters += len(documents[i])
    return held_out


def _padded(size: int) -> int:
    """Round up to a multiple of 64: matrix products are fastest there."""
    return -(-size // 64) * 64
