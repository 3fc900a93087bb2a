"""Text to token shards on disk, what ``coupled-adam prepare`` does.

While a corpus is being made its directory is called ``.NAME.partial`` and holds ``progress.json``; an interrupted call
resumes from there.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from coupled_adam.errors import InputError
from coupled_adam.files import (
    MANIFEST,
    check_replaceable,
    checksums,
    full_disk_named,
    make_directory,
    output_path,
    put_in_place,
    read_sealed,
    write_array,
    write_sealed,
)
from coupled_adam.lm.config import Data, Experiment
from coupled_adam.lm.corpus import (
    FORMAT,
    Corpus,
    Meta,
    Record,
    Settings,
    Tokens,
    fingerprint_of,
    open_corpus,
    read_meta,
)
from coupled_adam.lm.encoding import Encoded, Encoder
from coupled_adam.lm.held_out import Split, labeled
from coupled_adam.lm.sources import PACKAGED, Dataset, Source
from coupled_adam.lm.tokenizer import (
    END_OF_DOCUMENT,
    digest_of,
    load_tokenizer,
    read_tokenizer,
    size_of,
    train_bpe,
    write_tokenizer,
)
from coupled_adam.lm.workers import Encoders
from coupled_adam.progress import progress_bar, say

__all__ = ["prepare"]

SPLITS: tuple[Split, ...] = get_args(Split)
KIND = "corpus"
"""What its directory is said to be, where it would be replaced."""
SHARD_TOKENS = 100_000_000
SAVE_TOKENS = 10_000_000
"""Tokens after which progress is saved."""
BATCH_DOCUMENTS = 1_000
"""Documents that are encoded at a time."""
BATCH_CHARACTERS = 4_000_000
"""The same, where documents are long."""

#: Names of all that an unfinished corpus holds.
OURS = re.compile(
    r"(progress|meta|tokenizer|\.verified|\.coupled-adam)\.json|unigram_counts\.npy|(train|validation)-\d{5,}\.bin"
    r"|\..+\.\d+\.tmp"
)


def corpus_for(experiment: Experiment, directory: Path | None) -> Corpus:
    """Open the corpus in ``directory``, if the experiment can train on it; without one, prepare text of a package.

    Raises:
        InputError: the experiment needs other text, or the corpus has more tokens than the model.
    """
    data = experiment.data
    if directory is None:
        if data.source not in PACKAGED or data.tokenizer != "bpe":
            share = "" if data.held_out is None else f"--held-out {data.held_out:g} "
            raise InputError(
                f"{experiment.run.name} trains on {data.source}: prepare it (coupled-adam prepare {data.source} "
                f"--tokenizer {data.tokenizer} {share}--out DIR), then pass --data DIR"
            )
        return prepare(PACKAGED[data.source](), data, Path("data") / f"{data.source}-bpe-{data.vocab_size}")
    corpus = open_corpus(directory)
    tokens = corpus.meta["tokenizer_tokens"]
    if corpus.vocab_size > data.padded_vocab_size:
        raise InputError(
            f"{directory}: made with a tokenizer of {tokens:,} tokens, but "
            f"{experiment.run.name} has data.vocab_size = {data.vocab_size:,}; prepare it with the experiment's "
            "tokenizer, or change data.vocab_size"
        )
    if tokens != data.vocab_size:
        say(f"{directory}: {tokens:,} tokens, which replaces data.vocab_size = {data.vocab_size:,}")
    if (held := corpus.meta["settings"].get("held_out")) != data.held_out:
        say(f"{directory}: {_share(held)} is held out, which replaces data.held_out, {_share(data.held_out)}")
    return corpus


def resolved(experiment: Experiment, corpus: Corpus) -> Experiment:
    """Return the experiment with the tokenizer, the vocabulary size and the held-out share of ``corpus``."""
    settings, size = corpus.meta["settings"], corpus.meta["tokenizer_tokens"]
    return experiment.with_values(
        data__tokenizer=settings["tokenizer"], data__vocab_size=size, data__held_out=settings.get("held_out")
    )


def prepare(source: Source, config: Data, directory: Path, overwrite: bool = False) -> Corpus:
    """Tokenize the text of ``source`` into ``directory``, and open the corpus.

    An existing corpus of the same text and settings is reused, and an interrupted call is resumed.

    Args:
        source: of the text.
        config: tokenizer and vocabulary. Both the training and the validation text must be at least ``sequence_length``
            tokens long.
        directory: of the corpus. It must not be, contain or lie in what is read.
        overwrite: replace a corpus of another text or with other settings, finished or not. Nothing else is ever
            replaced.

    Returns:
        The corpus.

    Raises:
        InputError: the text is missing, unreadable, or too short for a single training sequence; the tokenizer is not
            available; ``directory`` holds something else; or another process is preparing the same directory.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: not a directory; choose another place")
    tokenizer = Path(config.tokenizer)
    named = config.tokenizer != "bpe" and tokenizer.exists()
    directory = output_path(directory, *getattr(source, "paths", ()), *([tokenizer] if named else []))
    standing, unfinished = _standing(directory), _unfinished(_aside(directory))
    if standing is None and directory == Path.cwd():
        raise InputError(f"{directory}: the current directory; choose a new one, for instance {directory / 'corpus'}")
    there = standing.meta if standing else unfinished
    loaded, settings = _settings(source, config, there["settings"] if there else None)
    if standing and not _differences(standing.meta["settings"], settings):
        try:
            return open_corpus(directory)
        except InputError:
            if not overwrite:
                raise
    _check_place(directory, settings, overwrite)
    with full_disk_named(directory):
        make_directory(directory.parent)
    with _locked(directory):
        _write(source, config, settings, loaded, directory, overwrite)
    return open_corpus(directory)


def _standing(directory: Path) -> Corpus | None:
    """Return the corpus in that place. Raises InputError if there is one that cannot be read, or something else."""
    if not (directory / "meta.json").is_file():
        check_replaceable(directory, KIND)
        return None
    try:
        return read_meta(directory)
    except InputError:
        if (directory / MANIFEST).exists():  # else the message about what was found is better
            check_replaceable(directory, KIND)
        raise


def _check_place(directory: Path, settings: Settings, overwrite: bool) -> None:
    """Raise InputError if something is in the place of the corpus that must stay."""
    standing = _standing(directory)
    if standing is None:
        return
    if not overwrite and (changed := _differences(standing.meta["settings"], settings)):
        raise InputError(
            f"{directory}: already contains another corpus ({standing.summary()}; {', '.join(changed)}); choose "
            "another place, or replace it with coupled-adam prepare --overwrite"
        )
    check_replaceable(directory, KIND)


def _settings(source: Source, config: Data, there: Settings | None) -> tuple[tuple[Tokenizer, int] | None, Settings]:
    """Return the tokenizer and its end-of-document token, unless it is to be trained, and what determines the corpus.

    A tokenizer that cannot be had, because there is no network, is taken to be the one of the corpus that is ``there``.
    """
    trained, loaded, digest = config.tokenizer == "bpe", None, None
    if not trained:
        try:
            loaded = load_tokenizer(config.tokenizer)
            digest = digest_of(loaded[0])
        except InputError as error:
            if there is None or there["tokenizer"] != config.tokenizer:
                raise
            digest = there["tokenizer_sha256"]
            say(f"{error}; assuming that the existing corpus was made with it")
    settings: Settings = {
        "format": FORMAT,
        "text": source.fingerprint(),
        "revision": source.newest_revision() if isinstance(source, Dataset) else None,
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": digest,
        "vocab_size": config.vocab_size if trained else None,
    }
    if config.held_out is not None:  # else it is the corpus that was made before there was a choice
        settings["held_out"] = config.held_out
    return loaded, settings


def _differences(there: Settings, wanted: Settings) -> list[str]:
    """Say in what settings differ. A revision that is not known, because there is no network, counts as equal."""
    found = []
    if there["format"] != wanted["format"]:
        found.append(f"its format is {there['format']}")
    if there["text"] != wanted["text"]:
        found.append("its text is different or has changed")
    if wanted["revision"] and there["revision"] != wanted["revision"]:
        found.append(f"its revision is {there['revision']}, now {wanted['revision']}")
    known = there["tokenizer_sha256"] and wanted["tokenizer_sha256"]
    if known and there["tokenizer_sha256"] == wanted["tokenizer_sha256"]:
        pass  # whatever it is called
    elif there["tokenizer"] != wanted["tokenizer"]:
        found.append(f"its tokenizer is {there['tokenizer']}, not {wanted['tokenizer']}")
    elif known:
        found.append(f"the tokenizer {wanted['tokenizer']} has changed")
    elif there["vocab_size"] != wanted["vocab_size"]:
        found.append(f"its vocabulary size is {there['vocab_size']:,}, not {wanted['vocab_size']:,}")
    if there.get("held_out") != wanted.get("held_out"):
        found.append(f"its held-out share is {_share(there.get('held_out'))}, not {_share(wanted.get('held_out'))}")
    return found


def _share(held_out: float | None) -> str:
    return "the default share" if held_out is None else f"{held_out:g}"


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes from preparing the same directory."""
    path = directory.with_name(f".{directory.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        with full_disk_named(directory):
            lock.acquire()
    except Timeout:
        raise InputError(f"{directory}: another process is preparing it; wait for it, or choose another") from None
    try:
        yield
    finally:
        # While it is held: who has opened it meanwhile finds that it is gone, and makes another.
        if path.is_file() and not path.stat().st_size:
            path.unlink()
        lock.release()


def _write(
    source: Source,
    config: Data,
    settings: Settings,
    loaded: tuple[Tokenizer, int] | None,
    directory: Path,
    overwrite: bool,
) -> None:
    aside = _aside(directory)
    record = _unfinished(aside)
    if record:
        if not overwrite and settings["revision"] != record["settings"]["revision"]:
            settings = {**settings, "revision": record["settings"]["revision"]}
            say(f"{source.name}: continuing with revision {settings['revision']}, with which it was started")
        if changed := _differences(record["settings"], settings):
            if not overwrite:
                raise InputError(
                    f"{aside}: contains another corpus, unfinished after {_documents(record):,} documents "
                    f"({', '.join(changed)}); finish it, choose another place, or replace it with coupled-adam "
                    "prepare --overwrite"
                )
            record = None
    if record is None:
        _remove(aside)
    if isinstance(source, Dataset):
        source.revision = settings["revision"]
    try:
        if record is None:
            record, tokenizer = _begun(aside, source, config, settings, loaded)
        else:
            tokenizer = read_tokenizer(aside / "tokenizer.json")
            if digest_of(tokenizer) != record["tokenizer_sha256"]:
                raise InputError(f"{aside / 'tokenizer.json'}: damaged; delete {aside} to start again")
            write_tokenizer(tokenizer, aside / "tokenizer.json")  # the same one may have been written in another way
        shards = Shards(aside, record, tokenizer)
        shards.fill(labeled(source, config.held_out), source.name, source.share)
        for split in SPLITS:
            if shards.tokens(split) <= config.sequence_length:
                raise InputError(
                    f"{source.name}: too short: its {split} split has {shards.tokens(split):,} tokens, but one "
                    f"sequence needs {config.sequence_length + 1:,}; add text, or choose a smaller --sequence-length"
                )
        shards.finish()
    except InputError:
        # What was saved stays: the next call resumes from there, once a network is back, say.
        if (found := _unfinished(aside)) is None or not _documents(found):
            _remove(aside)
        raise
    _check_place(directory, settings, overwrite)
    with full_disk_named(directory):
        (aside / "progress.json").unlink()
        put_in_place(aside, directory, KIND)


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


def _unfinished(aside: Path) -> Record | None:
    """Return what an interrupted call has left; None if there is nothing to resume from.

    Raises:
        InputError: something is there that no such call has made.
    """
    if not os.path.lexists(aside):
        return None
    if aside.is_symlink() or not aside.is_dir():
        raise InputError(f"{aside}: in the way of the unfinished corpus; move it away")
    names = sorted(entry.name for entry in aside.iterdir())
    if foreign := [name for name in names if not OURS.fullmatch(name)]:
        raise InputError(f"{aside}: holds {foreign[0]}, which is not part of an unfinished corpus; move it away")
    # The second, if a call died just before the finished corpus was moved to its place.
    described = [name for name in ("progress.json", "meta.json") if name in names]
    if not described:
        if any(not name.startswith(".") for name in names):
            raise InputError(f"{aside}: not an unfinished corpus (no progress.json); move it away, or delete it")
        return None
    remedy = f"delete {aside} to start again"
    record = read_sealed(aside / described[0], Record, remedy)
    if record["format"] != FORMAT:
        raise InputError(f"{aside}: started by another version of coupled-adam; {remedy}")
    return record if _documents(record) else None


def _remove(aside: Path) -> None:
    """Remove an unfinished corpus: what ``_unfinished`` has found to be one, and no more."""
    if not aside.exists():
        return
    for entry in list(aside.iterdir()):
        if OURS.fullmatch(entry.name):
            entry.unlink()
    aside.rmdir()


def _begun(
    aside: Path, source: Source, config: Data, settings: Settings, loaded: tuple[Tokenizer, int] | None
) -> tuple[Record, Tokenizer]:
    """Return the record of an empty corpus and its tokenizer, after writing both to ``aside``."""
    if config.tokenizer == "bpe":
        documents = labeled(source, config.held_out)
        tokenizer = train_bpe((text for split, text in documents if split == "train"), config.vocab_size, source.share)
        end: int | None = tokenizer.token_to_id(END_OF_DOCUMENT)
        assert end is not None, "the trainer was given it"
        if size_of(tokenizer) < config.vocab_size:
            say(
                f"{source.name}: its vocabulary has {size_of(tokenizer):,} tokens; the text is too short for "
                f"{config.vocab_size:,}"
            )
    else:
        tokenizer, end = loaded or load_tokenizer(config.tokenizer)
    record: Record = {
        "kind": "corpus",
        "format": FORMAT,
        "source": source.name,
        "settings": settings,
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "datasets", "pyarrow")},
        "tokenizer_sha256": digest_of(tokenizer),
        "tokenizer_tokens": size_of(tokenizer),
        "end_of_document": end,
        "documents": {"train": 0, "validation": 0},
        "characters": {"train": 0, "validation": 0},
        "shards": {"train": [], "validation": []},
    }
    with full_disk_named(aside):
        aside.mkdir(exist_ok=True)
    write_sealed(aside / "progress.json", record)
    write_tokenizer(tokenizer, aside / "tokenizer.json")
    return record, tokenizer


def _documents(record: Record) -> int:
    return record["documents"]["train"] + record["documents"]["validation"]


class Shards:
    """Files of tokens that grow, with a record of their progress that survives an interruption."""

    def __init__(self, directory: Path, record: Record, tokenizer: Tokenizer) -> None:
        self.directory, self.record = directory, record
        self.encoder = Encoder(tokenizer, record["end_of_document"], record["settings"]["tokenizer"])
        self.dtype = np.dtype("<u2" if record["tokenizer_tokens"] <= 2**16 else "<u4")
        self.counts = np.zeros(_padded(record["tokenizer_tokens"]), dtype=np.int64)
        self._unsaved = 0
        self._unsynced = set[Path]()
        self._resume()

    def _resume(self) -> None:
        """Cut off what was written after the record was: the ends of files, and files that it does not know."""
        sizes = {s["file"]: s["tokens"] for split in SPLITS for s in self.record["shards"][split]}
        for path in self.directory.glob("*.bin"):
            if path.name not in sizes:
                path.unlink()
        for name, tokens in sizes.items():
            path, size = self.directory / name, tokens * self.dtype.itemsize
            if not path.is_file() or path.stat().st_size < size:
                raise InputError(f"{path}: damaged or missing; delete {self.directory} to start again")
            os.truncate(path, size)
            if name.startswith("train"):
                found = np.bincount(np.memmap(path, self.dtype, "r"), minlength=len(self.counts))
                if len(found) > len(self.counts):
                    raise InputError(
                        f"{path}: damaged (token {len(found) - 1:,}); delete {self.directory} to start again"
                    )
                self.counts += found

    def tokens(self, split: Split) -> int:
        """Count the tokens written so far."""
        return sum(shard["tokens"] for shard in self.record["shards"][split])

    def fill(self, documents: Iterable[tuple[Split, str]], name: str, share: Callable[[int], float | None]) -> None:
        """Encode and append (split, document) pairs; the first ones, which are there already, are skipped.

        ``share`` says how much of the text is done when so many characters of it are.
        """
        done = _documents(self.record)
        if done:
            say(f"{name}: resuming after {done:,} documents")
        removed = 0
        with (
            progress_bar(name, 0, 100, unit="%", passing=True) as show,
            Encoders(self.encoder, self.directory / "tokenizer.json", self.dtype) as encoders,
        ):
            for batch, encoded in encoders.encode(_batches(itertools.islice(documents, done, None)), _texts):
                removed += encoded.removed
                self._add(batch, encoded)
                part = share(self.record["characters"]["train"] + self.record["characters"]["validation"])
                counted = f"{_documents(self.record):,} documents, {self.tokens('train'):,} tokens"
                show(None if part is None else int(100 * part), counted)
                encoders.progressed(part)
        if removed:
            say(
                f"{name}: {removed:,} special tokens that appear in the text were left out: "
                f"{self.encoder.name} cannot encode them in any other way"
            )

    def _add(self, batch: list[tuple[Split, str]], encoded: Encoded) -> None:
        """Append a batch to the shards of its splits, and save if it is time."""
        held_out = np.array([split == "validation" for split, _ in batch])
        lengths = np.diff(encoded.ends, prepend=0)
        for split in SPLITS:
            own = held_out if split == "validation" else ~held_out
            if own.any():
                self.record["documents"][split] += int(own.sum())
                self.record["characters"][split] += sum(len(text) for s, text in batch if s == split)
                self._append(split, encoded.tokens if own.all() else encoded.tokens[np.repeat(own, lengths)])
        if self._unsaved >= SAVE_TOKENS:
            self._save()

    def _append(self, split: Split, tokens: Tokens) -> None:
        shards = self.record["shards"][split]
        if not shards or shards[-1]["tokens"] >= SHARD_TOKENS:
            shards.append({"file": f"{split}-{len(shards):05d}.bin", "tokens": 0})
        path = self.directory / shards[-1]["file"]
        with full_disk_named(path), path.open("ab") as file:
            file.write(tokens.tobytes())
        self._unsynced.add(path)
        shards[-1]["tokens"] += len(tokens)
        self._unsaved += len(tokens)
        if split == "train":
            self.counts += np.bincount(tokens, minlength=len(self.counts))

    def _save(self) -> None:
        for path in sorted(self._unsynced):  # the record must not know of more than the disk
            with full_disk_named(path), path.open("rb+") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()
        write_sealed(self.directory / "progress.json", self.record)
        self._unsaved = 0

    def finish(self) -> None:
        """Write what makes the directory a corpus."""
        counts = self.directory / "unigram_counts.npy"
        with full_disk_named(counts):
            write_array(counts, self.counts)
        kept = [self.directory / "tokenizer.json", counts, *sorted(self.directory.glob("*.bin"))]
        meta: Meta = {
            **self.record,
            "fingerprint": fingerprint_of(self.record["settings"]),
            "dtype": "<u2" if self.dtype.itemsize == 2 else "<u4",
            "vocab_size": len(self.counts),
            "checksums": checksums(self.directory, kept, remember=True),
        }
        self._save()
        write_sealed(self.directory / "meta.json", meta)


def _batches(documents: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    batch, characters = list[tuple[Split, str]](), 0
    for split, text in documents:
        batch.append((split, text))
        characters += len(text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _texts(batch: list[tuple[Split, str]]) -> list[str]:
    return [text for _, text in batch]


def _padded(size: int) -> int:
    """Round up to a multiple of 64: matrix products are fastest there."""
    return -(-size // 64) * 64
