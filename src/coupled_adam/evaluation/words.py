"""Words as single tokens, for tokenizers of every kind."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

from coupled_adam.errors import InputError

#: How vocabularies write the space before a word: byte-level BPE and SentencePiece. WordPiece does not write it.
BYTE_LEVEL, SENTENCE_PIECE = "Ġ", "▁"

#: A vocabulary that writes the space so has more such tokens than this share; others may have a few by chance.
MARKED_SHARE = 0.01

#: Files of a tokenizer that transformers can put together.
TOKENIZER_FILES = ("tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


class Words:
    """A vocabulary, as far as single words are concerned.

    Args:
        tokens: the text of each token, by its id, as the vocabulary writes it.
        encode: the ids of a text, without special tokens.
        unknown: the id of the token for whatever is not in the vocabulary.
    """

    def __init__(self, tokens: Mapping[int, str], encode: Callable[[str], list[int]], unknown: int | None) -> None:
        self.tokens, self.encode, self.unknown, self.marker = tokens, encode, unknown, space_marker(tokens)

    def token_of(self, word: str) -> int | None:
        """The token that stands for a word within a text; None if it takes several, or is unknown."""
        # With its space first. A tokenizer that adds a space itself would now have two of them; it gets the bare word,
        # and what comes out counts only if it is the beginning of a word again, not the rest of a longer one.
        for text in (" " + word, word):
            ids = self.encode(text)
            if len(ids) != 1 or ids[0] == self.unknown:
                continue
            token = self.tokens.get(ids[0], "")
            if token.startswith(self.marker) and token != self.marker:  # the space alone: what followed was dropped
                return ids[0]
        return None

    def label(self, row: int) -> str:
        """The text of a token, its space as a space; ``row 123`` where the embedding has more rows than tokens."""
        token = self.tokens.get(row)
        if token is None:
            return f"row {row}"
        if self.marker == BYTE_LEVEL:
            text: str = decoders.ByteLevel().decode([token])
            return token if "\ufffd" in text else text  # a part of a character
        return token.replace(SENTENCE_PIECE, " ")


def space_marker(tokens: Mapping[int, str]) -> str:
    """How a vocabulary writes the space before a word; empty if it does not."""
    for marker in (BYTE_LEVEL, SENTENCE_PIECE):
        if sum(token.startswith(marker) for token in tokens.values()) > MARKED_SHARE * len(tokens):
            return marker
    return ""


def words_of(tokenizer: Tokenizer) -> Words:
    """The words of a tokenizer of the library ``tokenizers``."""
    tokenizer.no_truncation()
    tokenizer.no_padding()  # files of sentence encoders ask for 128 tokens whatever the text
    unknown = getattr(tokenizer.model, "unk_token", None)
    return Words(
        {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()},
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        None if unknown is None else tokenizer.token_to_id(unknown),
    )


def words_in(folder: Path) -> Words | None:
    """The words of the tokenizer in the folder of a model; None if there is none, or none that works here.

    Raises:
        InputError: tokenizer.json is damaged.
    """
    path = folder / "tokenizer.json"
    if path.exists():  # read by itself, it takes a tenth of the time that transformers takes
        try:
            return words_of(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{path}: damaged, or no tokenizer ({str(error)[:120]})") from None
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # of every kind: code of the model's own, a package that is not here; the figures do without
        return None
    return Words(
        {number: token for token, number in loaded.get_vocab().items()},
        functools.partial(loaded.encode, add_special_tokens=False),
        loaded.unk_token_id,
    )


def words_of_gguf(metadata: Mapping[str, Any]) -> Words | None:
    """The words of the vocabulary in a GGUF file; None if it has none.

    Words are looked up in the list of tokens instead of being encoded. For SmolLM2 the two agree on every word of the
    benchmarks, and the tokenizer takes eight seconds to be made from the file.
    """
    listed = metadata.get("tokenizer.ggml.tokens")
    if not listed:
        return None
    tokens = dict(enumerate(listed))
    ids = {token: number for number, token in tokens.items()}
    marker, lower = space_marker(tokens), metadata.get("tokenizer.ggml.model") == "bert"
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def encode(text: str) -> list[int]:
        text = text.lower() if lower else text  # as llama.cpp does for WordPiece
        if marker == BYTE_LEVEL:
            ((token, _),) = alphabet.pre_tokenize_str(text)
        else:
            token = text.replace(" ", marker)
        return [ids[token]] if token in ids else []

    return Words(tokens, encode, metadata.get("tokenizer.ggml.unknown_token_id"))
