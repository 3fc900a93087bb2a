"""Where text comes from: documents, and a fingerprint that changes when they do."""

import bz2
import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import Protocol

from coupled_adam.errors import InputError

#: Part of the fingerprint: raise it when the cleaning changes what comes out of the same file.
CLEANING_VERSION = 1

TEXT_SUFFIXES = (".txt", ".md")


class Source(Protocol):
    """A collection of documents."""

    @property
    def name(self) -> str:
        """What to call it in messages and reports."""

    def fingerprint(self) -> str:
        """Hexadecimal digest of all that determines :meth:`documents`."""

    def documents(self) -> list[str]:
        """The documents, paragraphs separated by newlines. Raises InputError where there is none to be had."""


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
        """The prose of each article: no headings, lists, tables or captions."""
        from io import BytesIO

        from gensim.corpora.wikicorpus import extract_pages, filter_wiki

        with bz2.open(BytesIO(self._dump())) as dump:
            articles = [_prose(filter_wiki(text)) for _, text, _ in extract_pages(dump, ("0",))]
        return [article for article in articles if article]


def _prose(text: str) -> str:
    """The paragraphs of an article that gensim has freed of its markup, one a line."""
    paragraphs = []
    for line in text.splitlines():
        paragraph = re.sub(r"'{2,}", "", line).strip()  # '' and ''' are italics and bold
        paragraph = re.sub(r"\(\s*[,;]?\s*\)", "", paragraph)  # what is left of a removed pronunciation
        paragraph = re.sub(r"\s+", " ", paragraph)
        # Headings, lists, tables and captions begin with a sign of their own, or are short, or end without a full stop.
        if len(paragraph) >= 60 and paragraph[0] not in "=*#:;|!+{}" and paragraph.endswith((".", "!", "?", '"', ")")):
            paragraphs.append(paragraph)
    return "\n".join(paragraphs)


class TextFiles:
    """A UTF-8 text file, whose blank-line separated paragraphs are the documents, or a folder, whose files are."""

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
                    raise InputError(f"{self.path}: no {' or '.join(TEXT_SUFFIXES)} files in this folder")
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
        """The files of a folder, or the paragraphs of a file (its lines, if there is but one paragraph)."""
        texts = [text for _, text in self._read()]
        if len(texts) > 1:
            return [text.strip() for text in texts if text.strip()]
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", texts[0]) if p.strip()]
        return paragraphs if len(paragraphs) > 1 else [line for line in texts[0].splitlines() if line.strip()]


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
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
