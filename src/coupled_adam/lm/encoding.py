"""Documents to token IDs, as the library ``tokenizers`` encodes them."""

import itertools
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

from coupled_adam.errors import InputError, one_line
from coupled_adam.lm.tokenizer import size_of

#: Characters that ``tokenizers`` encodes at a time: what it returns takes hundreds of bytes for each of them.
SLICE_CHARACTERS = 500_000

#: Characters after which fastokens is started, which takes up to half a second.
FAST_AFTER = 1_000_000

#: Characters of one document of each batch that are encoded by both libraries.
SAMPLE_CHARACTERS = 2_000


class Encoded(NamedTuple):
    """The token IDs of several documents.

    Attributes:
        tokens: of all documents, one after the other, each closed by the end-of-document token, (n,).
        ends: where each document ends, (documents,), int64.
        removed: special tokens that appear in the text and were left out.
    """

    tokens: NDArray[Any]
    ends: NDArray[np.int64]
    removed: int


class Encoder:
    """Documents to token IDs. What a document says of special tokens is text, and never becomes one of them.

    Byte-level BPE is encoded by the library fastokens where it is installed, which is many times as fast; see
    ``FastEncoder`` for how it is checked.

    Args:
        tokenizer: is changed so.
        end: the end-of-document token.
        name: of the tokenizer, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, end: int, name: str) -> None:
        self.tokenizer, self.end, self.name = tokenizer, end, name
        tokenizer.encode_special_tokens = True
        # Models whose vocabulary holds special tokens like any others (Unigram, WordLevel) find them in the text still.
        names = {n: token.content for n, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        names = {n: name for n, name in names.items() if name != _unknown(tokenizer)}
        self._special: dict[int, str] = names | {end: str(tokenizer.id_to_token(end))}
        self._is_special = np.isin(np.arange(size_of(tokenizer)), list(self._special))
        self._fast: FastEncoder | None = None
        self._characters: int | None = 0  # None once fastokens has been tried

    @property
    def is_fast(self) -> bool:
        """Whether fastokens has been found to encode the text."""
        return self._fast is not None

    def encode(self, texts: list[str], dtype: np.dtype[Any]) -> Encoded:
        """Return the IDs of documents, each closed by the end-of-document token. Raises InputError if one has none."""
        ids, ends = self._encode(texts)
        tokens = np.insert(ids, ends, self.end).astype(dtype)
        ends += np.arange(1, len(texts) + 1)
        if self._is_special[tokens].sum() == len(texts):
            return Encoded(tokens, ends, 0)
        removed, documents = 0, np.split(tokens, ends[:-1])
        for i, text in enumerate(texts):
            if self._is_special[documents[i][:-1]].any():
                kept, left_out = self._as_text(text)
                documents[i] = np.array([*kept, self.end], dtype)
                removed += left_out
        return Encoded(np.concatenate(documents), np.cumsum([len(ids) for ids in documents]), removed)

    def _encode(self, texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the IDs of all texts, one after the other, and where each text ends."""
        if self._characters is not None:
            self._characters += sum(map(len, texts))
            if self._characters >= FAST_AFTER:
                self._characters, self._fast = None, FastEncoder.of(self.tokenizer)
        if self._fast is not None:
            if (found := self._fast.encode(texts)) is not None:
                return found
            self._fast = None
        parts = [self._encode_slowly(part) for part in _slices(texts)]
        lengths = [length for _, own in parts for length in own]
        return np.concatenate([ids for ids, _ in parts]), np.cumsum(lengths, dtype=np.int64)

    def _encode_slowly(self, texts: list[str]) -> tuple[NDArray[np.uint32], list[int]]:
        """Return the IDs of all texts, and how many each text has."""
        try:
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises a bare one
            raise InputError(
                f"{self.name}: cannot encode the text ({one_line(error)}); choose another, or bpe"
            ) from None
        lengths = [len(each) for each in encoded]
        ids = itertools.chain.from_iterable(each.ids for each in encoded)
        return np.fromiter(ids, np.uint32, sum(lengths)), lengths

    def _as_text(self, text: str) -> tuple[list[int], int]:
        """Encode a text in which a model has found special tokens: their names are taken apart, or else removed.

        Returns:
            The IDs, and how many were removed.
        """
        parts = [text]
        for name in self._special.values():
            if len(name) > 1:
                parts = [piece for part in parts for piece in _apart(part, name)]
        ids = self._encode_slowly(parts)[0].tolist()
        kept = [number for number in ids if number not in self._special]
        return kept, len(ids) - len(kept)


class FastEncoder:
    """The IDs of the library ``tokenizers`` from the library fastokens, or none where they are not the same.

    Both encode every character that appears, between letters, digits, spaces and marks, before fastokens is trusted
    with it, and the beginning of a document of every batch.
    """

    def __init__(self, tokenizer: Tokenizer, fast: Any) -> None:
        self._tokenizer, self._fast = tokenizer, fast
        self._known = np.zeros(sys.maxunicode + 1, dtype=bool)
        self._batches = 0

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "FastEncoder | None":
        """Return one, if fastokens is installed and supports the tokenizer, a byte-level BPE."""
        try:
            import fastokens
        except ImportError:
            return None
        content = json.loads(tokenizer.to_str())
        # Without bytes as characters, fastokens finds special tokens in the text where a normalizer runs first.
        if not isinstance(tokenizer.model, models.BPE) or '"ByteLevel"' not in json.dumps(content["pre_tokenizer"]):
            return None
        if content["model"].get("dropout"):
            return None
        try:
            found = cls(tokenizer, fastokens.Tokenizer.from_json_str(tokenizer.to_str()))
        except Exception:  # of every kind: it does not support all parts of a tokenizer
            return None
        special = [token["content"] for token in content["added_tokens"]]
        agree = found._agree([*special, *(f"a{name}b {name} {name}" for name in special)])
        return found if agree and found._knows("".join(map(chr, range(128)))) else None

    def encode(self, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]] | None:
        """Return the IDs of all texts, one after the other, and where each text ends; None if it cannot.

        Raises:
            InputError: the libraries disagree although they agreed on every character.
        """
        if not self._knows("".join(text for text in texts if not text.isascii())):
            return None
        self._batches += 1
        sample = texts[self._batches % len(texts)][:SAMPLE_CHARACTERS]
        if not self._agree([sample]):
            raise InputError(
                f"fastokens {version('fastokens')} and tokenizers {version('tokenizers')} encode the same text "
                f"differently ({sample[:40]!r} …): pip uninstall fastokens, then prepare it again with --overwrite"
            )
        return self._ids(texts)

    def _knows(self, text: str) -> bool:
        """Whether both libraries agree on those characters of a text that have not been seen before."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        new = np.unique(codes[~self._known[codes]])
        self._known[new] = True
        return not len(new) or self._agree(
            [f"a{c}1{c} {c}{c}.{c}\n{c}  {c}'s\t{c}B{c}" for c in map(chr, new.tolist())]
        )

    def _agree(self, texts: list[str]) -> bool:
        """Whether both libraries encode texts, and in the same way."""
        try:
            expected = [each.ids for each in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
            ids, ends = self._ids(texts)
        except Exception:  # of every kind; tokenizers will say what
            return False
        found = [part.tolist() for part in np.split(ids, ends[:-1])]
        return found == expected

    def _ids(self, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids, starts = self._fast.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(starts, "<u8")[1:].astype(np.int64)


def _slices(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in groups of about ``SLICE_CHARACTERS``."""
    group, characters = list[str](), 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= SLICE_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _apart(text: str, name: str) -> Iterator[str]:
    """Yield pieces of a text none of which holds ``name``."""
    start = 0
    while (position := text.find(name, start)) >= 0:
        yield text[start : position + 1]
        start = position + 1
    yield text[start:]


def _unknown(tokenizer: Tokenizer) -> str | None:
    """Token for what is not in the vocabulary, a special one that text may well become."""
    model = json.loads(tokenizer.to_str())["model"]
    number, name = model.get("unk_id"), model.get("unk_token")
    return name if number is None else tokenizer.id_to_token(number)
