"""The tokenizer of a corpus: a byte-level BPE trained on its text, or one that exists."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from coupled_adam.errors import InputError, one_line, require
from coupled_adam.files import MANIFEST, written_whole
from coupled_adam.lm.config import LARGEST_VOCABULARY
from coupled_adam.lm.corpus import open_corpus
from coupled_adam.progress import LINE_EVERY, Update, duration, progress_bar, say, waiting

END_OF_DOCUMENT = "<|endoftext|>"

#: Characters of a stream on which a BPE is trained.
TOKENIZER_CHARACTERS = 200_000_000

#: Of them, those after which it is shown how many have been read.
SHOW_EVERY = 1_000_000


def load_tokenizer(name: str) -> tuple[Tokenizer, int]:
    """Return a tokenizer and its end-of-text token.

    Args:
        name: of a model of transformers, or its directory; or the directory of a prepared corpus.

    Raises:
        InputError: it is not available, or cannot be used.
    """
    if (Path(name) / MANIFEST).is_file() and (Path(name) / "meta.json").is_file():
        corpus = open_corpus(Path(name))
        return corpus.tokenizer, corpus.meta["end_of_document"]
    require("demo", "transformers")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of every kind; a hub out of reach among them
        raise InputError(f"{name}: no tokenizer found ({one_line(error)}); pass the directory of one, or bpe") from None
    tokenizer: Tokenizer | None = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None or loaded.eos_token is None:
        raise InputError(
            f"{name}: this tokenizer has no fast implementation or no end-of-text token; choose another, or bpe"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end: int | None = tokenizer.token_to_id(loaded.eos_token)
    if end is None:
        raise InputError(f"{name}: its end-of-text token {loaded.eos_token!r} is not in its vocabulary; choose another")
    if size_of(tokenizer) > LARGEST_VOCABULARY:
        raise InputError(
            f"{name}: its highest token ID is {size_of(tokenizer) - 1:,}, but at most {LARGEST_VOCABULARY - 1:,} is "
            "supported; choose another tokenizer, or bpe"
        )
    unknown = getattr(tokenizer.model, "unk_token", None)
    words = isinstance(tokenizer.model, (models.WordLevel, models.WordPiece))
    if words and tokenizer.token_to_id(str(unknown)) is None:
        raise InputError(
            f"{name}: it has no token for unknown words ({unknown}), so it cannot encode most text; choose another, or "
            "bpe"
        )
    model = json.loads(tokenizer.to_str())
    bytes_too = model["model"].get("byte_fallback") or "ByteLevel" in json.dumps(
        [model["pre_tokenizer"], model["normalizer"]]
    )
    if isinstance(tokenizer.model, models.BPE) and unknown is None and not bytes_too:
        say(f"{name}: drops characters that are not in its vocabulary")
    return tokenizer, end


def train_bpe(
    texts: Iterable[str], vocab_size: int, share: Callable[[int], float | None] = lambda characters: None
) -> Tokenizer:
    """Return a byte-level BPE trained on the first ``TOKENIZER_CHARACTERS`` of ``texts``.

    ``share`` says how much of the text so many characters are, in [0, 1]; None if that is not known.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    began = time.monotonic()
    with progress_bar("tokenizer", 0, 100, unit="%", passing=True) as show, ExitStack() as merging:

        def counted() -> Iterator[str]:
            yield from _first(texts, TOKENIZER_CHARACTERS, share, show)
            merging.enter_context(waiting(show, f"merging pairs into {vocab_size:,} tokens"))

        tokenizer.train_from_iterator(counted(), trainer)
    if (seconds := time.monotonic() - began) >= LINE_EVERY:
        say(f"tokenizer: trained in {duration(seconds)}")
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """Read what ``write_tokenizer`` wrote. Raises InputError if it is damaged."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare one
        raise InputError(f"{path}: damaged ({one_line(error)}); delete {path.parent} to start again") from None


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer to a file, whole or not at all."""
    with written_whole(path) as aside:
        tokenizer.save(str(aside))


def size_of(tokenizer: Tokenizer) -> int:
    """Return the rows that an embedding needs: the highest ID and one. IDs may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def digest_of(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of all that a tokenizer is."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _first(texts: Iterable[str], characters: int, share: Callable[[int], float | None], show: Update) -> Iterator[str]:
    """Yield texts of so many characters, and show how many of them have been read."""
    read = shown = 0
    for text in texts:
        yield text
        read += len(text)
        if read >= shown + SHOW_EVERY:
            shown = read
            show(int(100 * min(max(read / characters, share(read) or 0.0), 1.0)), f"{read:,} characters")
        if read >= characters:
            return
