"""Tokenizers of every kind: special tokens in a text are text, IDs may have holes, a changed tokenizer is noticed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from paragraphs import WORDS, paragraphs
from test_prepare import tokenizer_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coupled_adam.errors import InputError
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.config import Data, Experiment
from coupled_adam.lm.prepare import Corpus, corpus_for, prepare, resolved
from coupled_adam.lm.sources import TextFiles
from coupled_adam.lm.tokenizer import END_OF_DOCUMENT, size_of
from coupled_adam.lm.words import words_of

DOCUMENTS = paragraphs(60).split("\n\n")
CHARACTERS = sorted({*"".join(DOCUMENTS), *"</s>[]UNKMASKP|endoftext|", "é"})


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([*special, "</s>"])
    return tokenizer


def unigram(special: list[str]) -> Tokenizer:
    pieces = ["<unk>", "</s>", *special, "▁", *CHARACTERS]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i > 1)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>", *special])
    return tokenizer


def word_level(special: list[str]) -> Tokenizer:
    words = ["[UNK]", "</s>", *special, *WORDS.split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]", "</s>", *special])
    return tokenizer


def word_piece(special: list[str]) -> Tokenizer:
    words = ["[UNK]", "</s>", *special, *WORDS.split(), *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "</s>", *special])
    return tokenizer


KINDS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "byte_level": byte_level,
    "unigram": unigram,
    "word_level": word_level,
    "word_piece": word_piece,
}


def save(tokenizer: Tokenizer, path: Path) -> str:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    return str(path)


def made(documents: list[str], tokenizer: str, directory: Path) -> Corpus:
    (directory / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    data = Data(tokenizer=tokenizer, vocab_size=300, sequence_length=16)
    return prepare(TextFiles(directory / "text.txt"), data, directory / "corpus", overwrite=True)


def ends(corpus: Corpus) -> dict[str, int]:
    return {
        split: int(sum((shard == corpus.meta["end_of_document"]).sum() for shard in corpus.shards(split)))
        for split in ("train", "validation")
    }


@pytest.mark.parametrize("kind", ["bpe", *KINDS])
def test_special_tokens_in_a_text_are_text(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    special = ["<|im_start|>", "[MASK]", "␃"]
    tokenizer = "bpe" if kind == "bpe" else save(KINDS[kind](special), tmp_path / "tokenizer")
    names = [END_OF_DOCUMENT, "</s>", "＜/s＞", *special]
    documents = [f"{text} {names[i % 6]} the {names[i % 6]}{names[i % 5]} cat" for i, text in enumerate(DOCUMENTS)]
    corpus = made([*documents, *names], tokenizer, tmp_path)
    assert ends(corpus) == corpus.meta["documents"] and corpus.documents == len(documents) + len(names)
    decoder = corpus.tokenizer.get_added_tokens_decoder()
    unknown = {"<unk>", "[UNK]"}
    inner = {n for n, token in decoder.items() if token.special and token.content not in unknown}
    assert inner and corpus.unigram_counts[sorted(inner)].sum() == corpus.meta["documents"]["train"]
    said = "special tokens that appear in the text were left out" in capsys.readouterr().err
    assert said == (kind in ("unigram", "word_level", "word_piece")), "␃ alone cannot be taken apart"
    if kind in ("bpe", "byte_level"):
        tokens = np.concatenate([np.concatenate(corpus.shards(split)) for split in ("train", "validation")])
        cuts = np.flatnonzero(tokens == corpus.meta["end_of_document"]) + 1
        texts = [corpus.tokenizer.decode(part[:-1], skip_special_tokens=False) for part in np.split(tokens, cuts)[:-1]]
        assert sorted(texts) == sorted([*documents, *names])
        assert corpus.tokenizer.encode(documents[0]).tokens.count(END_OF_DOCUMENT) == 0


def test_ordinary_added_tokens_stay_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level([])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    corpus = made([f"{text} <think>" for text in DOCUMENTS], save(tokenizer, tmp_path / "tokenizer"), tmp_path)
    assert corpus.unigram_counts[corpus.tokenizer.token_to_id("<think>")] == corpus.meta["documents"]["train"]


def with_highest_id(tokenizer: Tokenizer, number: int) -> Tokenizer:
    """The same tokenizer, whose end-of-document token has that ID."""
    content = json.loads(tokenizer.to_str())
    old = next(token["id"] for token in content["added_tokens"] if token["content"] == "</s>")
    for token in content["added_tokens"]:
        token["id"] = number if token["id"] == old else token["id"]
    content["model"]["vocab"]["</s>"] = number
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("highest", [300, 5_000, 65_535, 65_536, 70_000])
def test_ids_may_have_holes(highest: int, tiny: Experiment, tmp_path: Path) -> None:
    tokenizer = with_highest_id(word_level([]), highest)
    assert size_of(tokenizer) == highest + 1 > tokenizer.get_vocab_size()
    corpus = made(DOCUMENTS, save(tokenizer, tmp_path / "tokenizer"), tmp_path)
    assert corpus.meta["tokenizer_tokens"] == highest + 1 and corpus.meta["end_of_document"] == highest
    assert corpus.meta["dtype"] == ("<u2" if highest < 65_536 else "<u4")
    assert highest < corpus.vocab_size == len(corpus.unigram_counts) <= highest + 64
    assert ends(corpus) == corpus.meta["documents"]
    experiment = tiny.with_values(data__vocab_size=highest + 1)
    assert resolved(experiment, corpus_for(experiment, corpus.directory)).data.vocab_size == highest + 1
    Batches(corpus.shards("train"), 16, 4, 0, corpus.vocab_size).batch(0)
    if highest > 300:
        with pytest.raises(InputError, match=f"a tokenizer of {highest + 1:,} tokens"):
            corpus_for(tiny.with_values(data__vocab_size=tokenizer.get_vocab_size() + 257), corpus.directory)


def test_a_tokenizer_beyond_all_models_is_refused(tmp_path: Path) -> None:
    tokenizer = save(with_highest_id(word_level([]), 3_000_000), tmp_path / "tokenizer")
    with pytest.raises(InputError, match=r"highest token ID is 3,000,000, but at most 1,999,999 is supported"):
        made(DOCUMENTS, tokenizer, tmp_path)


@pytest.mark.parametrize("model", [models.WordLevel, models.WordPiece])
def test_a_tokenizer_without_a_token_for_unknown_words_is_refused(model: type, tmp_path: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(["</s>", *WORDS.split()])}
    tokenizer = Tokenizer(model(vocabulary, unk_token="[NO]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"no token for unknown words \(\[NO\]\)"):
        made(DOCUMENTS, save(tokenizer, tmp_path / "tokenizer"), tmp_path)
    assert words_of(tokenizer).token_of("nowhere") is None
    assert words_of(tokenizer).token_of("river") == vocabulary["river"]


def test_a_text_that_a_tokenizer_cannot_encode_is_one_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0)], unk_id=None))
    with pytest.raises(InputError, match=r"tokenizer: cannot encode the text \(.*\); choose another, or bpe"):
        made(DOCUMENTS, save(tokenizer, tmp_path / "tokenizer"), tmp_path)


def test_a_tokenizer_that_drops_characters_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["</s>", *CHARACTERS])}, []))
    made(DOCUMENTS, save(tokenizer, tmp_path / "tokenizer"), tmp_path)
    assert "tokenizer: drops characters that are not in its vocabulary" in capsys.readouterr().err
    made(DOCUMENTS, save(byte_level([]), tmp_path / "other"), tmp_path)
    assert "drops" not in capsys.readouterr().err


def test_a_changed_tokenizer_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tokenizer_folder(tmp_path / "tokenizer", 320)
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    data = Data(tokenizer=str(directory), sequence_length=16)

    def prepared(overwrite: bool = False) -> Corpus:
        return prepare(TextFiles(tmp_path / "text.txt"), data, tmp_path / "corpus", overwrite)

    first = prepared()
    assert prepared().fingerprint == first.fingerprint
    shutil.rmtree(directory)
    tokenizer_folder(directory, 310)
    with pytest.raises(InputError, match=rf"vocabulary 320; the tokenizer {directory} has changed"):
        prepared()
    assert prepared(overwrite=True).meta["tokenizer_tokens"] == 310
    shutil.rmtree(directory)
    capsys.readouterr()
    assert prepared().meta["tokenizer_tokens"] == 310, "the corpus needs it no more"
    assert "no tokenizer found" in capsys.readouterr().err


def test_the_tokenizer_of_another_corpus(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = made(DOCUMENTS[:30], "bpe", tmp_path / "other")
    corpus = made(DOCUMENTS, str(other.directory), tmp_path)
    for key in ("tokenizer_sha256", "tokenizer_tokens", "end_of_document"):
        assert corpus.meta[key] == other.meta[key]
    assert ends(corpus) == corpus.meta["documents"]
    for out in (other.directory, other.directory / "new"):
        with pytest.raises(InputError, match="which is an input"):
            prepare(TextFiles(tmp_path / "text.txt"), Data(tokenizer=str(other.directory)), out)


def test_a_tokenizer_of_few_tokens_is_recorded(tiny: Experiment, tmp_path: Path) -> None:
    corpus = made(DOCUMENTS, save(word_level([]), tmp_path / "tokenizer"), tmp_path)
    experiment = resolved(tiny, corpus_for(tiny, corpus.directory))
    assert experiment.data.vocab_size == corpus.meta["tokenizer_tokens"] < 30
    assert experiment.data.tokenizer == str(tmp_path / "tokenizer")
    assert experiment.data.padded_vocab_size == corpus.vocab_size
    with pytest.raises(InputError, match="at least 257 with the tokenizer bpe"):
        tiny.with_values(data__vocab_size=256)


def test_a_tokenizer_is_known_by_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(word_level([]), tmp_path / "tokenizer")
    first = made(DOCUMENTS, "tokenizer", tmp_path)
    data = Data(tokenizer="./tokenizer/", sequence_length=16)
    assert prepare(TextFiles(tmp_path / "text.txt"), data, tmp_path / "corpus").fingerprint == first.fingerprint


def test_a_bare_word_is_another_row_than_the_word_after_a_space() -> None:
    vocabulary = {token: i for i, token in enumerate(["r", "u", "n", "Ġ", "ru", "run", "Ġrun", "un"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("r", "u"), ("ru", "n"), ("Ġ", "run"), ("u", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = words_of(tokenizer)
    assert (words.token_of("run"), words.bare_token_of("run")) == (6, 5)
    assert (words.token_of("un"), words.bare_token_of("un")) == (None, 7)
    assert words.bare_token_of("nun") is None, "two tokens"


def test_words_that_end_in_a_mark_are_shown_without_it() -> None:
    vocabulary = {token: i for i, token in enumerate(["d", "o", "g</w>", "do", "dog</w>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("d", "o"), ("do", "g</w>")], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = words_of(tokenizer)
    assert words.text_of(4) == "dog" and words.token_of("dog") == 4
