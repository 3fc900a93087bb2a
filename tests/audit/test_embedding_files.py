"""Embeddings of models in every format, and the centered copies."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from coupled_adam.audit.centering import center
from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.audit.embedding_names import find_input, find_output, none_found
from coupled_adam.audit.tensor_files import Tensors
from coupled_adam.errors import InputError
from coupled_adam.files import checksums, write_json, write_sealed, write_text
from coupled_adam.lm.checkpoint import save_checkpoint
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.model import LanguageModel, build_model
from coupled_adam.lm.parallel import World
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles
from coupled_adam.lm.words import words_of

ROWS, WIDTH = 96, 16
SMALL: dict[str, Any] = {"vocab_size": ROWS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, **options))
    with torch.no_grad():
        model.get_output_embeddings().weight += 0.3  # a mean to subtract
    return model.eval()


def gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=ROWS, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32, **options)
    return GPT2LMHeadModel(config).eval()


def gpt_neox() -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=32))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=ROWS, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1))


def bert(kind: type[PreTrainedModel] = BertModel) -> PreTrainedModel:
    return kind(BertConfig(**SMALL, intermediate_size=32))


def saved(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def sharded(model: PreTrainedModel, directory: Path) -> Path:
    """In so small files that the embeddings are in few of them."""
    saved(model, directory, max_shard_size="7KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def shards_of(directory: Path, *endings: str) -> set[str]:
    files = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return {file for tensor, file in files.items() if tensor.endswith(endings)}


def ruin_all_but(directory: Path, kept: set[str]) -> None:
    ruined = [p for p in directory.glob("*.safetensors") if p.name not in kept]
    assert ruined
    for path in ruined:
        path.write_bytes(b"not safetensors")


@pytest.mark.parametrize(
    ("make", "tied"),
    [
        (gpt2, True),
        (lambda: gpt2(tie_word_embeddings=False), False),
        (lambda: llama(tie_word_embeddings=True), True),
        (llama, False),
        (gpt_neox, False),
        (t5, True),
        (lambda: bert(BertForMaskedLM), True),
        (bert, False),
    ],
    ids=["gpt2", "gpt2-untied", "llama-tied", "llama", "gpt-neox", "t5", "bert-mlm", "bert"],
)
def test_a_folder_gives_the_matrices_of_its_model(
    make: Callable[[], PreTrainedModel], tied: bool, tmp_path: Path
) -> None:
    model = make()
    read = read_embeddings(str(saved(model, tmp_path / "some-model")))
    assert torch.equal(read.input, model.get_input_embeddings().weight)
    assert read.tied is tied
    head = model.get_output_embeddings()
    if tied or head is None:
        assert read.output is None
    else:
        assert read.output is not None
        assert torch.equal(read.output, head.weight)
    assert (read.name, read.words, read.unigram_counts) == ("some-model", None, None)


def test_bfloat16_comes_as_float32(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    read = read_embeddings(str(saved(model, tmp_path / "m")))
    assert read.input.dtype == torch.float32
    assert torch.equal(read.input, model.get_input_embeddings().weight.float())


def test_of_a_model_in_several_files_only_those_of_the_embeddings_are_opened(tmp_path: Path) -> None:
    model = llama()
    directory = sharded(model, tmp_path / "m")
    ruin_all_but(directory, shards_of(directory, "embed_tokens.weight", "lm_head.weight"))
    read = read_embeddings(str(directory))
    assert torch.equal(read.input, model.get_input_embeddings().weight)
    assert read.output is not None and torch.equal(read.output, model.get_output_embeddings().weight)


def test_pickles_of_a_model_in_one_and_in_several_files(tmp_path: Path) -> None:
    model = llama()
    directory = saved(model, tmp_path / "m")
    (directory / "model.safetensors").unlink()
    state = model.state_dict()
    torch.save(state, directory / "pytorch_model.bin")
    for _ in range(2):
        read = read_embeddings(str(directory))
        assert torch.equal(read.input, state["model.embed_tokens.weight"])
        assert read.output is not None and torch.equal(read.output, state["lm_head.weight"])
        # The second time: in two files, a third is ruined.
        (directory / "pytorch_model.bin").unlink(missing_ok=True)
        files = dict.fromkeys(state, "other.bin")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            files[name] = f"{name}.bin"
            torch.save({name: state[name]}, directory / files[name])
        (directory / "other.bin").write_bytes(b"ruined")
        write_json(directory / "pytorch_model.bin.index.json", {"weight_map": files})


def test_where_the_configuration_is_silent_its_class_decides(tmp_path: Path) -> None:
    for model, tied in ((gpt2(), True), (llama(), False)):
        directory = saved(model, tmp_path / type(model).__name__)
        config = json.loads((directory / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        write_json(directory / "config.json", config)
        assert read_embeddings(str(directory)).tied is tied


def test_two_matrices_that_differ_are_not_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = llama()
    directory = saved(model, tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", {**config, "tie_word_embeddings": True})
    read = read_embeddings(str(directory))
    assert read.tied is False and read.output is not None
    loaded = LlamaForCausalLM.from_pretrained(directory)
    assert torch.equal(loaded.get_output_embeddings().weight, read.output), "transformers sees it so"


def test_a_safetensors_file_by_itself(tmp_path: Path) -> None:
    a, b = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    for name, content, tied in (
        ("one", {"model.embed_tokens.weight": a}, None),
        ("two", {"model.embed_tokens.weight": a, "lm_head.weight": b}, False),
        ("same", {"model.embed_tokens.weight": a, "lm_head.weight": a.clone()}, True),
        ("unknown-name", {"table": a, "scale": torch.ones(3)}, None),
    ):
        save_file(content, tmp_path / f"{name}.safetensors")
        read = read_embeddings(str(tmp_path / f"{name}.safetensors"))
        assert torch.equal(read.input, a) and read.tied is tied
        assert (read.output is None) is (tied is not False)
    named = read_embeddings(str(tmp_path / "two.safetensors"), tensor="lm_head.weight")
    assert torch.equal(named.input, b) and named.tied is None


def test_pickles_by_themselves(tmp_path: Path) -> None:
    matrix = torch.randn(ROWS, WIDTH)
    content = {"epoch": 3, "model_state_dict": {"transformer.wte.weight": matrix, "transformer.h.0.bias": matrix[0]}}
    torch.save(content, tmp_path / "a.pt")
    torch.save(matrix, tmp_path / "b.pth")
    torch.save(content, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    for path in sorted(tmp_path.iterdir()):
        assert torch.equal(read_embeddings(str(path)).input, matrix), path


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ">f8"])
def test_arrays(dtype: str, tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(dtype)
    np.save(tmp_path / "a.npy", matrix)
    np.savez(tmp_path / "b.npz", other=np.ones((9, 9)), embeddings=matrix)
    np.savez_compressed(tmp_path / "c.npz", whatever=matrix, counts=np.arange(ROWS))
    for path in sorted(tmp_path.iterdir()):
        read = read_embeddings(str(path))
        stored = np.float64 if dtype == ">f8" else np.float32
        assert torch.equal(read.input, torch.from_numpy(matrix.astype(stored))), path
        assert (read.output, read.tied, read.words) == (None, None, None)


def write_gguf(path: Path, architecture: str, tokens: list[str], model: str, **tensors: Any) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    for name, (matrix, kind) in tensors.items():
        data = gguf.quants.quantize(matrix, kind)
        writer.add_tensor(name.replace("__", "."), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BYTES = ["Ġlake", "moon", "ĠcafÃ©", "Ã", *(f"Ġw{i}" for i in range(60))]


def test_gguf_is_dequantized(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((64, 32)).astype(np.float32) for _ in range(2))
    kinds = gguf.GGMLQuantizationType
    for kind, tolerance in ((kinds.Q8_0, 0.02), (kinds.Q4_1, 0.25), (kinds.F16, 2e-3), (kinds.F32, 0)):
        path = tmp_path / f"{kind.name}.gguf"
        write_gguf(path, "llama", BYTES, "gpt2", token_embd__weight=(a, kind))
        read = read_embeddings(str(path))
        assert read.tied is True and read.output is None
        np.testing.assert_allclose(read.input, a, atol=tolerance)
        assert (np.asarray(read.input) == gguf.quants.dequantize(gguf.quants.quantize(a, kind), kind)).all()
    path = tmp_path / "digest-without-ending"
    write_gguf(path, "llama", BYTES, "gpt2", token_embd__weight=(a, kinds.F32), output__weight=(b, kinds.F32))
    read = read_embeddings(str(path))
    assert read.tied is False and read.output is not None and torch.equal(read.output, torch.from_numpy(b))
    write_gguf(path, "bert", BYTES, "bert", token_embd__weight=(a, kinds.F32))
    assert read_embeddings(str(path)).tied is False, "an encoder predicts nothing"


@pytest.mark.parametrize(
    ("model", "tokens", "expected"),
    [
        ("gpt2", BYTES, {"lake": 0, "moon": None, "café": 2, "sea": None}),
        ("llama", ["<unk>", "▁lake", "moon"], {"lake": 1, "moon": None, "Lake": None}),
        ("bert", ["[UNK]", "▁lake", "ing"], {"lake": 1, "Lake": 1, "ing": None}),
        ("bert", ["[UNK]", "lake", "##ing"], {"lake": 1, "ing": None}),
    ],
    ids=["byte-level", "sentencepiece", "wordpiece-converted", "wordpiece"],
)
def test_words_of_a_gguf_file(model: str, tokens: list[str], expected: dict[str, int | None], tmp_path: Path) -> None:
    matrix = np.ones((len(tokens), 32), np.float32)
    kind = gguf.GGMLQuantizationType.F32
    write_gguf(tmp_path / "m.gguf", "llama", tokens, model, token_embd__weight=(matrix, kind))
    read = read_embeddings(str(tmp_path / "m.gguf"))
    assert read.words is not None
    assert {word: read.words.token_of(word) for word in expected} == expected
    if model == "gpt2":
        assert [read.words.text_of(i) for i in (0, 1, 2, 3, 999)] == [" lake", "moon", " café", "Ã", "row 999"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["the lake and the moon"] * 3, trainers.BpeTrainer())
    return tokenizer  # of few letters: others are dropped


def word_piece() -> Tokenizer:
    vocabulary = {"[UNK]": 0, "lake": 1, "moon": 2, "##s": 3, "[PAD]": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.enable_padding(length=16, pad_id=4, pad_token="[PAD]")
    return tokenizer


def sentence_piece(scheme: str) -> Tokenizer:
    scores = [("<unk>", 0.0), ("▁lake", -1.0), ("moon", -1.0), ("▁", -2.0), *((c, -9.0) for c in "▁abcdefghiklmno")]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "single", "not_single"),
    [
        (byte_level, ["lake", "moon"], ["moonlake", "and lake", "xyz"]),
        (word_piece, ["lake", "moon"], ["moons", "s", "xyz"]),
        (lambda: sentence_piece("always"), ["lake"], ["moon", "xyz"]),
        (lambda: sentence_piece("never"), ["lake"], ["moon", "xyz"]),
    ],
    ids=["byte-level", "wordpiece", "sentencepiece", "sentencepiece-without-prefix"],
)
def test_a_word_is_one_token_as_it_stands_within_a_text(
    make: Callable[[], Tokenizer], single: list[str], not_single: list[str]
) -> None:
    words = words_of(make())
    assert [words.text_of(words.token_of(word) or 0).strip() for word in single] == single
    assert [words.token_of(word) for word in not_single] == [None] * len(not_single)


def test_the_tokenizer_beside_a_model_is_read(tmp_path: Path) -> None:
    directory = saved(bert(), tmp_path / "m")
    (directory / "vocab.txt").write_text("[UNK]\nlake\nmoon\n##s\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n", encoding="utf-8")
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    for _ in range(2):
        read = read_embeddings(str(directory))
        assert read.words is not None
        assert (read.words.token_of("moon"), read.words.token_of("moons"), read.words.token_of("xyz")) == (
            2,
            None,
            None,
        )
        assert (read.words.text_of(1), read.words.text_of(50)) == ("lake", "row 50")
        word_piece().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(InputError, match=r"tokenizer\.json: damaged"):
        read_embeddings(str(directory))


def tensors(**shapes: tuple[int, ...]) -> Tensors:
    """Names with __ for the dots, and shapes; nothing can be read."""
    known = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return Tensors(dict.fromkeys(known, Path("file")), known.__getitem__, lambda name: pytest.fail("read"))


def test_which_tensor_is_the_embedding() -> None:
    draft = tensors(model__layers__61__embed_tokens__weight=(99, 8), model__embed_tokens__weight=(99, 8))
    assert find_input(draft) == "model.embed_tokens.weight"
    multimodal = tensors(
        model__vision_tower__embeddings__weight=(7, 8), model__language_model__embed_tokens__weight=(99, 8)
    )
    assert find_input(multimodal) == "model.language_model.embed_tokens.weight"
    positions = tensors(bert__embeddings__position_embeddings__weight=(512, 8))
    assert find_input(positions) is None
    classifier = tensors(bert__embeddings__word_embeddings__weight=(99, 8), head__weight=(2, 8), lm_head__bias=(99,))
    assert find_output(classifier, 99, 8) is None
    padded = tensors(lm_head__weight=(96, 8), blk__0__attn__output__weight=(99, 8))
    assert find_output(padded, 99, 8) == "lm_head.weight"
    unknown = tensors(a=(3, 8), b=(50, 8), c=(100_000,))
    assert (find_input(unknown), find_output(unknown)) == (None, None)
    assert "b 50 × 8, a 3 × 8" in str(none_found("x", unknown))


@pytest.fixture
def corpus(text_file: Path, tiny: Experiment, tmp_path: Path) -> Corpus:
    return prepare(TextFiles(text_file), tiny.data, tmp_path / "corpus")


def write_run(directory: Path, experiment: Experiment, corpus: Corpus) -> LanguageModel:
    model = build_model(experiment.model, corpus.vocab_size, experiment.data.sequence_length, seed=1)
    write_text(directory / "experiment.toml", experiment.to_toml())
    write_json(directory / "environment.json", {"corpus": corpus.fingerprint})
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        with torch.no_grad():
            model.token_embedding.weight += 1
        save_checkpoint(directory / "checkpoints", step, model, [optimizer], {}, World(), keep_every=1)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_our_runs(tied: bool, tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    experiment = tiny.with_values(model__tied=tied)
    model = write_run(tmp_path / "run", experiment, corpus)
    bare, read = (read_embeddings(str(tmp_path / "run"), data=data) for data in (None, corpus.directory))
    for each in (bare, read):
        assert torch.equal(each.input, model.token_embedding.weight), "the last checkpoint"
        assert each.tied is tied
        assert (each.output is None) is tied
        assert tied or (each.output is not None and torch.equal(each.output, model.head.weight))
    assert (bare.words, bare.unigram_counts) == (None, None)
    assert read.words is not None
    token = read.words.token_of("the")
    assert token is not None and read.words.text_of(token) == " the"
    assert read.unigram_counts is not None and len(read.unigram_counts) == len(read.input)


def test_a_run_of_which_something_is_wrong(tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    write_run(directory, tiny, corpus)
    write_json(directory / "environment.json", {"corpus": "another"})
    with pytest.raises(InputError, match="not the text that"):
        read_embeddings(str(directory), data=corpus.directory)
    with pytest.raises(InputError, match=r"contains no model\.no\.such"):
        read_embeddings(str(directory), tensor="no.such")
    dcp = directory / "checkpoints" / "step-00000002" / "dcp"
    description = (dcp / ".metadata").read_bytes()
    (dcp / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"\.metadata: damaged"):
        read_embeddings(str(directory))
    state = dcp.parent / "state.json"  # whoever made it may have made the checksums too
    written = state.read_text()
    forged = json.loads(written) | {"checksums": checksums(dcp.parent, [dcp / ".metadata"])}
    del forged["sha256"]
    write_sealed(state, forged)
    with pytest.raises(InputError, match=r"damaged \(unexpected class .*mkdir"):
        read_embeddings(str(directory))
    state.write_text(written)
    assert not (tmp_path / "ran").exists()
    (dcp / ".metadata").write_bytes(description)
    (data,) = dcp.glob("*.distcp")
    os.truncate(data, 500)
    with pytest.raises(InputError, match="damaged"):
        read_embeddings(str(directory))
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint yet"):
        read_embeddings(str(directory))


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.directory),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"wte.weight": torch.ones(4, 4), "x": Payload(tmp_path / "ran")}, tmp_path / "m.bin")
    with pytest.raises(InputError, match="could run arbitrary code"):
        read_embeddings(str(tmp_path / "m.bin"))
    assert not (tmp_path / "ran").exists()
    np.save(tmp_path / "m.npy", np.array([Payload(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"m\.npy: 'embedding' contains Python objects, .* could run code"):
        read_embeddings(str(tmp_path / "m.npy"))
    for protocol in (0, 2, 4):  # no file of torch.save: torch says at length what to do, and not to
        (tmp_path / "raw.bin").write_bytes(pickle.dumps({"x": Payload(tmp_path / "ran")}, protocol))
        with pytest.raises(
            InputError, match=r"raw\.bin: contains more than tensors, and could run arbitrary code"
        ) as error:
            read_embeddings(str(tmp_path / "raw.bin"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file_of_each_kind_gets_one_line(tmp_path: Path) -> None:
    matrix = torch.randn(ROWS, WIDTH)
    save_file({"wte.weight": matrix}, tmp_path / "m.safetensors")
    torch.save({"wte.weight": matrix}, tmp_path / "m.pt")
    np.save(tmp_path / "m.npy", matrix.numpy())
    np.savez(tmp_path / "m.npz", embedding=matrix.numpy())
    kind = gguf.GGMLQuantizationType.F32
    write_gguf(tmp_path / "m.gguf", "llama", BYTES, "gpt2", token_embd__weight=(matrix.numpy(), kind))
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        read_embeddings(str(path))
        for length in (len(whole) - 40, len(whole) // 2, 60, 5, 0):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match=r"truncated") as error:
                read_embeddings(str(path))
            assert "\n" not in str(error.value) and path.name in str(error.value)


def save_npz(path: Path) -> None:
    np.savez(path, first=np.ones((3, 2)), second=np.ones((4, 2)))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("missing.safetensors", lambda p: None, "no such file"),
        ("m.txt", lambda p: p.write_text("text"), "a text file, which is not supported"),
        ("m.npy", lambda p: np.save(p, np.ones(5)), r"shape \(5,\)"),
        ("m.npy", lambda p: np.save(p, np.ones((5, 5), int)), "holds int64"),
        ("m.npz", save_npz, r"second 4 × 2, first 3 × 2"),
        ("m.safetensors", lambda p: save_file({"x": torch.ones(3)}, p), "none of its tensors is a matrix"),
        ("m.safetensors", lambda p: save_file({"wte.weight": torch.ones(4, 4).int()}, p), "holds int32"),
        ("m.pt", lambda p: torch.save({"step": 3}, p), "contains no tensors"),
        ("m.pt", lambda p: torch.save([1, 2], p), "contains no tensors"),
        ("directory", lambda p: p.mkdir(), "no weights in it"),
    ],
)
def test_what_is_no_model_gets_one_line(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        read_embeddings(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_folders_of_which_something_is_wrong(tmp_path: Path) -> None:
    directory = sharded(llama(), tmp_path / "m")
    (shard,) = shards_of(directory, "lm_head.weight")
    (directory / shard).unlink()
    with pytest.raises(InputError, match=rf"{shard}: not found"):
        read_embeddings(str(directory))
    with pytest.raises(InputError, match=r"contains no tensor 'wte'"):
        read_embeddings(str(saved(gpt2(), tmp_path / "g")), tensor="wte")
    (tmp_path / "g" / "config.json").write_text("[")
    with pytest.raises(InputError, match=r"config\.json: damaged"):
        read_embeddings(str(tmp_path / "g"))
    write_json(directory / "model.safetensors.index.json", {"metadata": {}})
    with pytest.raises(InputError, match="no weight_map"):
        read_embeddings(str(directory))
    only_gguf = tmp_path / "only"
    only_gguf.mkdir()
    (only_gguf / "m.Q4.gguf").touch()
    with pytest.raises(InputError, match=r"name what to read of it: m\.Q4\.gguf"):
        read_embeddings(str(only_gguf))


class Hub:
    """A hub of one model, from which the files that are asked for are copied."""

    def __init__(self, remote: Path, local: Path) -> None:
        self.remote, self.local, self.fetched = remote, local, set[str]()

    def snapshot_download(self, name: str, allow_patterns: list[str]) -> str:
        assert name == "somebody/some-model"
        self.local.mkdir(exist_ok=True)
        for path in self.remote.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copyfile(path, self.local / path.name)
                self.fetched.add(path.name)
        return str(self.local)


def test_of_a_model_on_the_hub_only_the_needed_files_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    remote = sharded(model, tmp_path / "remote")
    hub = Hub(remote, tmp_path / "local")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    read = read_embeddings("somebody/some-model")
    assert torch.equal(read.input, model.get_input_embeddings().weight)
    assert read.name == "somebody/some-model" and read.output is not None
    needed = shards_of(remote, "embed_tokens.weight", "lm_head.weight")
    assert hub.fetched == {"config.json", "model.safetensors.index.json", *needed}
    with pytest.raises(InputError, match=r"lacks model-.*; download the whole model"):
        center(read, tmp_path / "centered")

    (remote / "pytorch_model.bin").write_bytes(b"another form")
    for path in remote.glob("*.safetensors*"):
        path.unlink()
    saved(model, remote)
    hub = Hub(remote, tmp_path / "local2")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert torch.equal(read_embeddings("somebody/some-model").input, read.input)
    assert "pytorch_model.bin" not in hub.fetched


def test_without_a_network_the_cache_of_the_hub_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached, model = tmp_path / "models--somebody--some-model", gpt2()
    write_text(cached / "refs" / "main", "0" * 40)
    saved(model, cached / "snapshots" / ("0" * 40))
    assert torch.equal(read_embeddings("somebody/some-model").input, model.get_input_embeddings().weight)
    with pytest.raises(InputError, match=r"nobody/nothing: not found locally.*hf download nobody/nothing") as error:
        read_embeddings("nobody/nothing")
    assert "\n" not in str(error.value)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.randint(ROWS, (4, 24), generator=torch.Generator().manual_seed(0))
    return model(tokens).logits.log_softmax(-1)


@pytest.mark.parametrize("several", [False, True], ids=["one-file", "several-files"])
def test_a_centered_copy_predicts_the_same(several: bool, tmp_path: Path) -> None:
    model = llama()
    source = (sharded if several else saved)(model, tmp_path / "m")
    (source / "README.md").write_text("kept")
    (source / "pytorch_model.bin").write_bytes(b"another form of the weights")
    result = center(read_embeddings(str(source)), tmp_path / "centered")
    assert result.tensor == "lm_head.weight" and result.condition is None
    assert result.norm_of_mean == pytest.approx(model.get_output_embeddings().weight.mean(0).norm().item(), rel=1e-5)

    copy = LlamaForCausalLM.from_pretrained(tmp_path / "centered").eval()
    head = copy.get_output_embeddings().weight.detach()
    assert head.double().mean(0).abs().max() < 1e-8
    assert not torch.equal(head, model.get_output_embeddings().weight)
    torch.testing.assert_close(log_probabilities(copy), log_probabilities(model), atol=1e-5, rtol=0)
    others = {p.name for p in source.iterdir()} - {"pytorch_model.bin"}
    assert {p.name for p in result.path.iterdir()} == others
    (changed,) = shards_of(source, "lm_head.weight") if several else {"model.safetensors"}
    assert [n for n in others if (source / n).read_bytes() != (result.path / n).read_bytes()] == [changed]
    before, after = load_file(source / changed), load_file(result.path / changed)
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["lm_head.weight"]
    with safe_open(result.path / changed, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_copy_of_a_bfloat16_model_is_off_by_rounding_alone(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    result = center(read_embeddings(str(saved(model, tmp_path / "m"))), tmp_path / "centered")
    before = model.get_output_embeddings().weight.detach().double()
    after = load_file(tmp_path / "centered" / "model.safetensors")["lm_head.weight"]
    assert after.dtype == torch.bfloat16
    errors = (after.double() - (before - before.mean(0))).norm(dim=1)
    assert result.rounding == pytest.approx(errors.max().item()) and 0 < result.rounding < 0.01


def test_single_files_are_centered_with_a_condition(tmp_path: Path) -> None:
    a, b = torch.randn(ROWS, WIDTH) + 1, torch.randn(ROWS, WIDTH) + 1
    save_file({"model.embed_tokens.weight": a, "lm_head.weight": b}, tmp_path / "m.safetensors", {"made": "here"})
    result = center(read_embeddings(str(tmp_path / "m.safetensors")), tmp_path / "new" / "c.safetensors")
    assert result.condition is not None and "must not cap" in result.condition
    copy = load_file(result.path)
    assert torch.equal(copy["model.embed_tokens.weight"], a)
    torch.testing.assert_close(copy["lm_head.weight"], b - b.mean(0))
    with safe_open(result.path, "pt") as file:
        assert file.metadata() == {"made": "here"}

    array = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float16) + np.float16(1)
    np.save(tmp_path / "m.npy", array)
    result = center(read_embeddings(str(tmp_path / "m.npy")), tmp_path / "c.npy")
    assert result.condition is not None and "must be the output embedding" in result.condition
    centered = np.load(tmp_path / "c.npy")
    assert centered.dtype == np.float16
    np.testing.assert_allclose(centered, array - array.mean(0, dtype=np.float64), atol=2e-3)


def gemma2() -> PreTrainedModel:
    config = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=32, tie_word_embeddings=False)
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: llama(tie_word_embeddings=True), "one matrix"),
        (bert, "no output embedding"),
        (gemma2, r"caps its logits \(final_logit_softcapping = 30"),
    ],
    ids=["tied", "encoder", "capped"],
)
def test_no_copy_where_predictions_would_change(
    make: Callable[[], PreTrainedModel], reason: str, tmp_path: Path
) -> None:
    read = read_embeddings(str(saved(make(), tmp_path / "m")))
    with pytest.raises(InputError, match=f"not centered: .*{reason}"):
        center(read, tmp_path / "centered")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_the_cap_that_only_the_class_knows_of_counts(tmp_path: Path) -> None:
    directory = saved(gemma2(), tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    del config["final_logit_softcapping"]
    write_json(directory / "config.json", config)
    with pytest.raises(InputError, match="caps its logits"):
        center(read_embeddings(str(directory)), tmp_path / "centered")
    write_json(directory / "config.json", {**config, "final_logit_softcapping": None})
    center(read_embeddings(str(directory)), tmp_path / "centered")


def test_what_cannot_be_centered_says_why(tmp_path: Path) -> None:
    model = llama()
    directory = saved(model, tmp_path / "m")
    read = read_embeddings(str(directory))
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="already exists"):
        center(read, tmp_path / "there")
    with pytest.raises(InputError, match=r"lies in .*, which is an input"):
        center(read, directory / "centered")
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", {**config, "model_type": "somebodys-own"})
    with pytest.raises(InputError, match="does not know the model type 'somebodys-own'"):
        center(read_embeddings(str(directory)), tmp_path / "centered")

    content = {name: torch.randn(ROWS, WIDTH) for name in ("wte.weight", "lm_head.weight", "lm_head.more.weight")}
    save_file(content, tmp_path / "parts.safetensors")
    with pytest.raises(InputError, match=r"its head is more than one matrix \(lm_head\.more\.weight\)"):
        center(read_embeddings(str(tmp_path / "parts.safetensors")), tmp_path / "c.safetensors")
    del content["lm_head.more.weight"]
    content["lm_head.weight"][3, 3] = torch.inf
    save_file(content, tmp_path / "infinite.safetensors")
    infinite = read_embeddings(str(tmp_path / "infinite.safetensors"))
    with pytest.raises(InputError, match="non-finite"):
        center(infinite, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=r"copy of a \.safetensors file"):
        center(infinite, tmp_path / "c.npy")
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(InputError, match="pickle files cannot be written"):
        center(read_embeddings(str(tmp_path / "m.pt")), tmp_path / "c.pt")
    kind, matrix = gguf.GGMLQuantizationType.F32, np.ones((64, 32), np.float32)
    write_gguf(
        tmp_path / "m.gguf", "llama", BYTES, "gpt2", token_embd__weight=(matrix, kind), output__weight=(matrix, kind)
    )
    with pytest.raises(InputError, match="cannot be written without loss"):
        center(read_embeddings(str(tmp_path / "m.gguf")), tmp_path / "c.gguf")
    np.savez(tmp_path / "m.npz", embedding=matrix)
    with pytest.raises(InputError, match=r"\.npz files cannot be written"):
        center(read_embeddings(str(tmp_path / "m.npz")), tmp_path / "c.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_that_claims_more_than_it_holds_is_refused_before_memory_is_taken(
    compressed: bool, tmp_path: Path
) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**5, 10**5)})
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "m.npz", "w", kind) as archive:
        archive.writestr("embedding.npy", header.getvalue() + bytes(1000))
    with pytest.raises(InputError, match=r"m\.npz: truncated: 'embedding' should have 40,000,000,000 bytes"):
        read_embeddings(str(tmp_path / "m.npz"))


def test_an_array_of_negative_size_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "m.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (-4, 8)})
        file.write(bytes(1000))
    with pytest.raises(InputError, match=r"m\.npy: damaged: 'embedding' declares the shape \(-4, 8\)"):
        read_embeddings(str(tmp_path / "m.npy"))
