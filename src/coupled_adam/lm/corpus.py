"""Text to token shards on disk.

A corpus folder holds ``tokenizer.json`` (of the library ``tokenizers``), the shards ``train-00000.bin`` …,
``validation-00000.bin`` … (token ids, little-endian uint16, or uint32 for more than 65,536 tokens, documents one after
the other, each closed by the end-of-document token), ``unigram_counts.npy`` (int64, how often each token occurs in the
training shards) and ``meta.json``. While it is made it is called ``.NAME.partial`` and holds ``progress.json``.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from coupled_adam.errors import InputError, require
from coupled_adam.files import move_into_place, write_json, written_whole
from coupled_adam.lm.config import Data, Experiment
from coupled_adam.lm.progress import say
from coupled_adam.lm.sources import Source, WikipediaSample

FORMAT = 2
END_OF_DOCUMENT = "<|endoftext|>"
VALIDATION_SHARE = 0.05
"""Of a source in memory."""
STREAM_VALIDATION_SHARE = 0.005
"""Of a stream, which is large."""
SHARD_TOKENS = 100_000_000
SAVE_TOKENS = 10_000_000
"""Tokens after which progress is saved."""
BATCH_DOCUMENTS = 1_000
"""Documents that are encoded at a time, on all cores."""
TOKENIZER_CHARACTERS = 200_000_000
"""Of a stream, on which a BPE is trained."""

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


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
        files = [s["file"] for s in self.meta["shards"][split]]
        return [np.memmap(self.folder / name, dtype=self.meta["dtype"], mode="r") for name in files]

    def tokens(self, split: str) -> int:
        """Number of tokens in ``"train"`` or ``"validation"``."""
        return sum(s["tokens"] for s in self.meta["shards"][split])

    def token_of(self, word: str) -> int | None:
        """The token that stands for a word within a text, with its leading space; None if it takes several."""
        ids = self.tokenizer.encode(" " + word, add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 else None

    def text_of(self, token: int) -> str:
        """What a token stands for; empty for the rows that pad the vocabulary."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


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
    """Write the tokens of ``source`` to ``folder``, and open it. Reuses what is there and unchanged; goes on with what
    an interrupted call has left.

    Raises:
        InputError: the text is missing, unreadable, or too short for a single training sequence; the tokenizer cannot
            be had; or another process prepares the same folder.
    """
    settings = [FORMAT, config.tokenizer, config.vocabulary, VALIDATION_SHARE, STREAM_VALIDATION_SHARE, SHARD_TOKENS]
    fingerprint = hashlib.sha256(f"{source.fingerprint()} {settings}".encode()).hexdigest()
    if (folder / "meta.json").exists() and (corpus := open_corpus(folder)).fingerprint == fingerprint:
        return corpus
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            _write(source, config, folder, fingerprint)
    except Timeout:
        raise InputError(f"{folder}: another process is preparing it; wait for it, or choose another") from None
    return open_corpus(folder)


def _write(source: Source, config: Data, folder: Path, fingerprint: str) -> None:
    aside = folder.with_name(f".{folder.name}.partial")
    if (aside / "progress.json").exists():
        progress = json.loads((aside / "progress.json").read_text(encoding="utf-8"))
        if progress["fingerprint"] != fingerprint:
            shutil.rmtree(aside)
    elif aside.exists():
        shutil.rmtree(aside)
    try:
        aside.mkdir(exist_ok=True)
        tokenizer, end = _tokenizer(source, config, aside / "tokenizer.json")
        shards = Shards(aside, fingerprint, tokenizer, end)
        shards.fill(_labelled(source), source.name)
        for split in ("train", "validation"):
            if shards.tokens(split) <= config.sequence_length:
                raise InputError(
                    f"{source.name}: too short: its {split} part has {shards.tokens(split):,} tokens, "
                    f"and one sequence takes {config.sequence_length + 1:,}"
                )
        shards.finish(source.name)
    except InputError:
        if not (aside / "progress.json").exists():  # else the work goes on from there, once a network is back, say
            shutil.rmtree(aside)
        raise
    move_into_place(aside, folder)


class Shards:
    """Files of tokens that grow, with a record of how far they are that survives an interruption."""

    def __init__(self, folder: Path, fingerprint: str, tokenizer: Tokenizer, end: int) -> None:
        self.folder, self.tokenizer, self.end = folder, tokenizer, end
        self.dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4")
        self.counts = np.zeros(_padded(tokenizer.get_vocab_size()), dtype=np.int64)
        self.record: dict[str, Any] = {
            "fingerprint": fingerprint,
            "documents": {"train": 0, "validation": 0},
            "characters": {"train": 0, "validation": 0},
            "shards": {"train": [], "validation": []},
        }
        if (folder / "progress.json").exists():
            self.record = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            self.counts = np.load(folder / f"counts-{sum(self.record['documents'].values())}.npy")
            # What was written after the record was: the ends of files, and files that it does not know.
            sizes = {
                s["file"]: s["tokens"] * self.dtype.itemsize for s in itertools.chain(*self.record["shards"].values())
            }
            for path in folder.glob("*.bin"):
                if path.name in sizes:
                    os.truncate(path, sizes[path.name])
                else:
                    path.unlink()
        self._unsaved = 0

    def tokens(self, split: str) -> int:
        """Tokens written so far."""
        return sum(shard["tokens"] for shard in self.record["shards"][split])

    def fill(self, labelled: Iterable[tuple[str, str]], name: str) -> None:
        """Encode and append (split, document) pairs; the first ones, which are there already, are passed over."""
        done = sum(self.record["documents"].values())
        if done:
            say(f"{name}: goes on after {done:,} documents")
        rest, shown = itertools.islice(labelled, done, None), time.monotonic()
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
        with (self.folder / shards[-1]["file"]).open("ab") as file:
            tokens.tofile(file)
            file.flush()
            os.fsync(file.fileno())  # the record must not know of more than the disk
        shards[-1]["tokens"] += len(tokens)
        self._unsaved += len(tokens)
        if split == "train":
            self.counts += np.bincount(tokens, minlength=len(self.counts))

    def _save(self) -> None:
        documents = sum(self.record["documents"].values())
        np.save(self.folder / f"counts-{documents}.npy", self.counts)
        write_json(self.folder / "progress.json", self.record)
        for old in self.folder.glob("counts-*.npy"):
            if old.stem != f"counts-{documents}":
                old.unlink()
        self._unsaved = 0

    def finish(self, source: str) -> None:
        """Write what makes the folder a corpus."""
        np.save(self.folder / "unigram_counts.npy", self.counts)
        meta = {
            "format": FORMAT,
            "source": source,
            "dtype": self.dtype.str,
            "vocabulary_size": len(self.counts),
            "tokenizer_tokens": self.tokenizer.get_vocab_size(),
            "end_of_document": self.end,
            "tokenizer_sha256": hashlib.sha256((self.folder / "tokenizer.json").read_bytes()).hexdigest(),
            **self.record,
        }
        write_json(self.folder / "meta.json", meta)
        for left in (self.folder / "progress.json", *self.folder.glob("counts-*.npy")):
            left.unlink(missing_ok=True)


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared corpus. Raises InputError naming the file that is missing, truncated or of another format."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise InputError(f"{path}: format {meta['format']}, this version reads format {FORMAT}; delete the folder")
        expected = {
            s["file"]: s["tokens"] * np.dtype(meta["dtype"]).itemsize
            for split in meta["shards"].values()
            for s in split
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


def _labelled(source: Source) -> Iterator[tuple[str, str]]:
    """Every document with its split, in the order of the source."""
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
    """Which documents are for validation: about a twentieth of the characters."""
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


def _tokenizer(source: Source, config: Data, path: Path) -> tuple[Tokenizer, int]:
    """The tokenizer that the settings name, trained on the text or one that exists, and its end-of-document token.

    Also written to ``path``; one that was trained on the text is read from there when the work goes on.
    """
    end = END_OF_DOCUMENT
    if config.tokenizer != "bpe":
        tokenizer, end = _load_tokenizer(config.tokenizer)
    elif path.exists():
        tokenizer = Tokenizer.from_file(str(path))
        return tokenizer, _id(tokenizer, end)
    else:
        texts = (text for split, text in _labelled(source) if split == "train")
        tokenizer = _train_tokenizer(_first(texts, TOKENIZER_CHARACTERS), config.vocabulary)
    with written_whole(path) as aside:
        tokenizer.save(str(aside))
    return tokenizer, _id(tokenizer, end)


def _id(tokenizer: Tokenizer, token: str) -> int:
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, f"{token} is no token of its own tokenizer"
    return found


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _load_tokenizer(name: str) -> tuple[Tokenizer, str]:
    """A tokenizer of transformers, by the name or the folder of a model, and its end-of-text token."""
    require("lm", "transformers")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of every kind; a hub out of reach among them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{name}: no tokenizer to be had ({reason}); give the folder of one, or bpe") from None
    tokenizer: Tokenizer | None = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None or loaded.eos_token is None:
        raise InputError(f"{name}: this tokenizer has no fast form or no end-of-text token; choose another, or bpe")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, loaded.eos_token


def _train_tokenizer(documents: Iterator[str], vocabulary: int) -> Tokenizer:
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


def _padded(size: int) -> int:
    """The next multiple of 64: matrix products are fastest there."""
    return -(-size // 64) * 64
