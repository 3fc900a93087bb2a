"""Word vectors in the formats of word2vec, GloVe, fastText and gensim, read and written by gensim."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeGuard, get_args

from coupled_adam.audit import gensim_files
from coupled_adam.errors import InputError, one_line, printable
from coupled_adam.lm.words import Words

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

WordFormat = Literal["word2vec text", "word2vec binary", "GloVe", "fastText", "gensim"]

#: What stands at the beginning of a model of fastText.
FASTTEXT = b"\xba\x16\x4f\x2f"

#: "rows columns" is the first line of word2vec's files; "word 0.1 -0.2 …" is any line of its text files and GloVe's.
WORD2VEC_HEADER = re.compile(rb"(\d{1,12}) (\d{1,6}) ?\r?\n")
WORD_AND_NUMBERS = re.compile(rb"\S+( -?\d+(\.\d+)?([eE][-+]?\d+)?){2,} ?(\r?\n|$)")


def word_format_of(head: bytes) -> WordFormat | None:
    """Return which of the formats a file is in by how it begins; None if in none of them."""
    if head.startswith(FASTTEXT):
        return "fastText"
    if gensim_files.class_in(head) is not None:
        return "gensim"
    if header := WORD2VEC_HEADER.match(head):
        return "word2vec text" if WORD_AND_NUMBERS.match(head, header.end()) else "word2vec binary"
    return "GloVe" if WORD_AND_NUMBERS.match(head) else None


def is_word_format(kind: str | None) -> TypeGuard[WordFormat]:
    return kind in get_args(WordFormat)


def read_vectors(path: Path, kind: WordFormat) -> "tuple[KeyedVectors, int]":
    """Read the words of a file and their vectors, as stored; and how many it says to have.

    Words that are no UTF-8, as word2vec cuts long ones anywhere, are read with U+FFFD for what is not. Of a word that
    occurs twice the first vector counts.

    Raises:
        InputError: the file is damaged.
    """
    from gensim.models import KeyedVectors
    from gensim.models.fasttext import load_facebook_vectors

    said = _check_size(path, kind)
    try:
        if kind == "fastText":
            found = load_facebook_vectors(str(path))
        elif kind == "gensim":
            found = gensim_files.load(path)
        else:
            binary, no_header = kind == "word2vec binary", kind == "GloVe"
            found = KeyedVectors.load_word2vec_format(
                str(path), binary=binary, no_header=no_header, unicode_errors="replace"
            )
    except (MemoryError, InputError):
        raise
    except NotImplementedError as error:  # classifiers, whose rows are not trained as word vectors
        raise InputError(f"{path}: {one_line(error)}") from None
    except Exception as error:  # the parsers raise whatever comes: struct.error, EOFError, ValueError, AssertionError
        raise InputError(f"{path}: damaged, or not in the format of {kind} ({one_line(error, 120)})") from None
    unique = len(found.key_to_index)
    if unique < 2:
        raise InputError(f"{path}: only {unique} words; at least 2 are needed")
    if unique < len(found):  # gensim leaves rows of zeros at the end for words that it has seen before
        said = len(found) if said is None else said
        kept = KeyedVectors(found.vector_size)
        kept.add_vectors(list(found.key_to_index), found.vectors[:unique])
        found = kept
    return found, unique if said is None else said


def _check_size(path: Path, kind: WordFormat) -> int | None:
    """Return the number of words in the header of a word2vec file, if the file can hold so many."""
    if kind not in ("word2vec text", "word2vec binary"):
        return None
    with path.open("rb") as file:
        words, width = map(int, file.readline().split())
    least = words * (2 * width + 1 if kind == "word2vec text" else 4 * width + 2)  # "w 0 0\n"; "w ", then float32
    if least > (size := path.stat().st_size) + 1:
        raise InputError(f"{path}: damaged: {words:,} words × {width:,} take {least:,} bytes, but it has {size:,}")
    return words


def words_of_vectors(vectors: "KeyedVectors") -> Words:
    """Return the words of the rows, each one token."""
    index: dict[str, int] = vectors.key_to_index
    tokens = {i: printable(word) for word, i in index.items()}
    return Words(tokens, lambda text: [index[text]] if text in index else [], None)


def write_vectors(vectors: "KeyedVectors", path: Path, kind: WordFormat) -> None:
    """Write words and vectors in the format of the file they come from, in its order."""
    if kind == "gensim":
        gensim_files.save(vectors, path)
        return
    vectors.save_word2vec_format(str(path), binary=kind == "word2vec binary", write_header=kind != "GloVe")
