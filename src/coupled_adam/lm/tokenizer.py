"""The tokenizer of a corpus: a byte-level BPE trained on its text, or one that exists."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from coupled_adam.errors import InputError, one_line, require
from coupled_adam.files import written_whole
from coupled_adam.lm.config import Data

END_OF_DOCUMENT = "<|endoftext|>"

#: Characters of a stream on which a BPE is trained.
TOKENIZER_CHARACTERS = 200_000_000


def tokenizer_for(config: Data, texts: Callable[[], Iterable[str]], path: Path) -> tuple[Tokenizer, int]:
    """Return the tokenizer that the settings name and its end-of-document token, and write the tokenizer to ``path``.

    A BPE is trained on ``texts()``; one that is already at ``path``, from an interrupted call, is read from there.

    Raises:
        InputError: the tokenizer is not available, or cannot be used.
    """
    end = END_OF_DOCUMENT
    if config.tokenizer != "bpe":
        tokenizer, end = _load(config.tokenizer)
    elif path.exists():
        tokenizer = Tokenizer.from_file(str(path))
        return tokenizer, _id(tokenizer, end)
    else:
        tokenizer = _train(_first(texts(), TOKENIZER_CHARACTERS), config.vocab_size)
    with written_whole(path) as aside:
        tokenizer.save(str(aside))
    return tokenizer, _id(tokenizer, end)


def _id(tokenizer: Tokenizer, token: str) -> int:
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, f"{token} is no token of its own tokenizer"
    return found


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _load(name: str) -> tuple[Tokenizer, str]:
    """Load a tokenizer of transformers, by the name or directory of a model, and its end-of-text token."""
    require("demo", "transformers")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of every kind; a hub out of reach among them
        raise InputError(f"{name}: no tokenizer found ({one_line(error)}); give the directory of one, or bpe") from None
    tokenizer: Tokenizer | None = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None or loaded.eos_token is None:
        raise InputError(f"{name}: this tokenizer has no fast form or no end-of-text token; choose another, or bpe")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, loaded.eos_token


def _train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer
