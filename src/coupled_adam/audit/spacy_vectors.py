"""Word vectors of spaCy: a pipeline, its package, or its folder ``vocab``."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coupled_adam.audit.first_bytes import check_downloaded
from coupled_adam.audit.tensor_files import Tensors, arrays_in, parsed
from coupled_adam.errors import InputError, printable, require
from coupled_adam.files import read_json
from coupled_adam.lm.words import Words

#: The files of a vocabulary: the vectors as .npy, the row of each word by its hash, the words, and the mode.
VECTORS, ROWS, STRINGS, SETTINGS = "vectors", "key2row", "strings.json", "vectors.cfg"

#: How the configuration of a pipeline says that its components take the vectors in.
TAKEN_IN = re.compile(r"include_static_vectors\s*=\s*true|StaticVectors", re.IGNORECASE)


def vocabulary_in(directory: Path) -> Path | None:
    """Return the folder with the vocabulary of a pipeline of spaCy, of its package, or the folder itself."""
    for folder in (directory, directory / "vocab", *sorted(directory.glob("*/vocab"))):
        if all((folder / name).is_file() for name in (VECTORS, STRINGS)):
            return folder
    return None


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The vectors of a pipeline."""

    tensors: Tensors
    """With the one tensor of all vectors, also of those that no word has."""
    rows: Tensor
    """The rows among these that are vectors of words, int64 (N,), ascending."""
    words: Words | None
    """The words of these rows; None in mode floret, which has no row of a word."""
    notes: list[str]
    """What was done, in sentences."""


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the words of a vocabulary, and open its vectors.

    In mode floret each row belongs to a hash, which many n-grams of characters share.

    Raises:
        InputError: a file is damaged, or there are no vectors.
        ImportError: spaCy is not installed.
    """
    tensors = arrays_in(folder / VECTORS)
    (name,) = tensors.files
    if len(shape := tensors.shape(name)) != 2 or 0 in shape:
        raise InputError(f"{folder}: a pipeline of spaCy without word vectors, as its small ones are (…_sm)")
    if _is_floret(folder):
        note = "Vectors of floret: each row is that of a hash of n-grams, not of a word, so words were left out."
        return Vocabulary(tensors, torch.arange(shape[0]), None, [note])
    row_of = _rows_of_words(folder, shape[0])
    rows = sorted(set(row_of.values()))
    if len(rows) < 2:
        raise InputError(f"{folder}: {len(rows)} vectors of words; at least 2 are needed")
    place = {row: i for i, row in enumerate(rows)}
    index = {word: place[row] for word, row in row_of.items()}
    tokens: dict[int, str] = {}
    for word, i in index.items():
        if i not in tokens:
            tokens[i] = printable(word)
    notes = [f"Its {len(index):,} words share {len(rows):,} vectors."] if len(rows) < len(index) else []
    words = Words(tokens, lambda text: [index[text]] if text in index else [], None)
    return Vocabulary(tensors, torch.tensor(rows), words, notes)


def _is_floret(folder: Path) -> bool:
    path = folder / SETTINGS
    return path.exists() and read_json(path, dict[str, Any]).get("mode") == "floret"


def _rows_of_words(folder: Path, count: int) -> dict[str, int]:
    require("spacy", "spacy")
    import srsly
    from spacy.strings import StringStore

    check_downloaded(folder / STRINGS)
    strings = read_json(folder / STRINGS, list[str])
    with parsed(folder / ROWS, "damaged, or not the rows of words"):
        # Of a map that claims to be larger than the file, msgpack takes no more than that.
        rows: dict[int, int] = srsly.msgpack_loads((folder / ROWS).read_bytes())
        if not isinstance(rows, dict) or not all(isinstance(n, int) for pair in rows.items() for n in pair):
            raise ValueError("no map of numbers")
        if rows and not 0 <= min(rows.values()) <= max(rows.values()) < count:
            raise ValueError(f"rows that are not among the {count:,}")
        store: Any = StringStore(strings)
        return {store[key]: row for key, row in rows.items() if key in store}


def reason_against_writing(directory: Path) -> str | None:
    """Return why no copy with other vectors can be written; None if one can."""
    folder = vocabulary_in(directory)
    assert folder is not None
    if _is_floret(folder):
        return "the vectors of floret are those of n-grams, of which words have several; center the vectors of words"
    pipeline = folder.parent
    if folder == directory:
        return None
    if not (pipeline / "meta.json").exists():
        return "only its vocabulary is here; download the whole pipeline (hf download NAME --local-dir DIR)"
    components = read_json(pipeline / "meta.json", dict[str, Any]).get("pipeline")
    config = pipeline / "config.cfg"
    if components and (not config.exists() or TAKEN_IN.search(config.read_text(encoding="utf-8", errors="replace"))):
        return (
            f"its components take the vectors in, so what they predict would change; write the vectors alone (pass "
            f"{folder}), and load them where you compare words (nlp.vocab.from_disk)"
        )
    return None
