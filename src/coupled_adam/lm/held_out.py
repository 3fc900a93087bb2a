"""Which documents are held out for validation."""

import hashlib
import itertools
import random
from collections.abc import Iterator
from typing import Literal

from coupled_adam.errors import InputError
from coupled_adam.lm.sources import Source

Split = Literal["train", "validation"]

#: Of the characters of a text in memory, unless another share is asked for.
VALIDATION_SHARE = 0.05

#: Held out at least, unless that were more than half of the text: a sequence of 128 tokens.
VALIDATION_CHARACTERS = 2_000

#: Of the documents of a stream, which is large, likewise.
STREAM_VALIDATION_SHARE = 0.005

#: A stream that ends before so many characters is split like a text in memory.
IN_MEMORY = 10_000_000


def labeled(source: Source, share: float | None = None) -> Iterator[tuple[Split, str]]:
    """Yield (split, document) pairs in the order of the source; the same ones every time.

    ``share`` of the text is for validation; None: what is usual for texts of its kind.

    Raises:
        InputError: there is only one document, or none.
    """
    documents = source.documents()
    if not isinstance(documents, list):
        stream, start, characters = iter(documents), list[str](), 0
        for text in stream:
            start.append(text)
            characters += len(text)
            if characters > IN_MEMORY:
                yield from _labeled_stream(itertools.chain(start, stream), share or STREAM_VALIDATION_SHARE)
                return
        documents = start
    held_out = _held_out(documents, source.name, share or VALIDATION_SHARE)
    yield from (("validation" if i in held_out else "train", text) for i, text in enumerate(documents))


def _labeled_stream(documents: Iterator[str], share: float) -> Iterator[tuple[Split, str]]:
    for i, text in enumerate(documents):
        # The first documents cannot know how many will follow: a hash of the position decides, and the second document
        # is always held out.
        place = int.from_bytes(hashlib.sha256(str(i).encode()).digest()[:8], "big") / 2**64
        yield ("validation" if place < share or i == 1 else "train"), text


def _held_out(documents: list[str], name: str, share: float) -> set[int]:
    """Choose the documents for validation: about ``share`` of the characters."""
    if len(documents) < 2:
        raise InputError(
            f"{name}: too short: {len(documents)} document(s), but one to train on and one to validate on are "
            "needed; add text, or separate the documents of a text file by blank lines"
        )
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    total = sum(map(len, documents))
    wanted, held_out, characters = max(share * total, min(total / 2, VALIDATION_CHARACTERS)), set[int](), 0
    for i in order[:-1]:
        if characters >= wanted:
            break
        held_out.add(i)
        characters += len(documents[i])
    return held_out
