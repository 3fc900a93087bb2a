"""Words as single tokens, and tokens as text, for tokenizers of every kind."""

from collections.abc import Callable, Mapping

from tokenizers import Tokenizer, decoders

#: How vocabularies write the space before a word: byte-level BPE and SentencePiece. WordPiece does not write it.
BYTE_LEVEL, SENTENCE_PIECE = "Ġ", "▁"

#: How those of CLIP and the first GPT write the end of a word.
END_OF_WORD = "</w>"

#: A vocabulary that writes the space so has more such tokens than this share; others may have a few by chance.
MARKED_SHARE = 0.01


class Words:
    """Which words of a vocabulary are single tokens.

    Args:
        tokens: the text of each token, by its ID, as the vocabulary writes it.
        encode: returns the IDs of a text, without special tokens.
        unknown: the ID of the token for whatever is not in the vocabulary.
    """

    def __init__(self, tokens: Mapping[int, str], encode: Callable[[str], list[int]], unknown: int | None) -> None:
        self.tokens, self.encode, self.unknown, self.marker = tokens, encode, unknown, space_marker(tokens)
        ends = sum(token.endswith(END_OF_WORD) for token in tokens.values())
        self.end_of_word = END_OF_WORD if ends > MARKED_SHARE * len(tokens) else ""

    def token_of(self, word: str) -> int | None:
        """Return the token that stands for a word within a text; None if it takes several, or is unknown."""
        # With its space first. A tokenizer that adds a space itself would now have two of them; it gets the bare word,
        # and what comes out counts only if it is the beginning of a word again, not the rest of a longer one.
        for text in (" " + word, word):
            try:
                ids = self.encode(text)
            except Exception:  # the library raises a bare one for a word that is not in a vocabulary without unknown
                continue
            if len(ids) != 1 or ids[0] == self.unknown:
                continue
            token = self.tokens.get(ids[0], "")
            if token.startswith(self.marker) and token != self.marker:  # the space alone: what followed was dropped
                return ids[0]
        return None

    def bare_token_of(self, word: str) -> int | None:
        """Return the token of a word with no space put before it; None if it takes several, or is unknown.

        With a byte-level vocabulary that is another row than ``token_of``'s: the word at the start of a text.
        """
        try:
            ids = self.encode(word)
        except Exception:  # as in token_of
            return None
        return ids[0] if len(ids) == 1 and ids[0] != self.unknown else None

    def text_of(self, row: int) -> str:
        """Return the text of a token, its space as a space; ``row 123`` for a row without a token."""
        token = self.tokens.get(row)
        if token is None:
            return f"row {row}"
        if self.marker == BYTE_LEVEL:
            text: str = decoders.ByteLevel().decode([token])
            return token if "\ufffd" in text else text  # a part of a character
        return token.replace(SENTENCE_PIECE, " ").removesuffix(self.end_of_word)


def space_marker(tokens: Mapping[int, str]) -> str:
    """Return how a vocabulary writes the space before a word; empty if it does not."""
    for marker in (BYTE_LEVEL, SENTENCE_PIECE):
        if sum(token.startswith(marker) for token in tokens.values()) > MARKED_SHARE * len(tokens):
            return marker
    return ""


def words_of(tokenizer: Tokenizer) -> Words:
    """Return the words of a tokenizer of the library ``tokenizers``."""
    tokenizer.no_truncation()
    tokenizer.no_padding()  # files of sentence encoders ask for 128 tokens whatever the text
    unknown = getattr(tokenizer.model, "unk_token", None)
    return Words(
        {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()},
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        None if unknown is None else tokenizer.token_to_id(unknown),
    )
