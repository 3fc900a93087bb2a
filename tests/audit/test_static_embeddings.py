"""Static embeddings, written and read by the packages they come from: model2vec and sentence-transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import command
from model2vec import StaticModel
from model2vec.model import quantize_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from coupled_adam.audit.centering import center, remove_top
from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.audit.models import audit_models
from coupled_adam.errors import InputError
from coupled_adam.geometry.post_processing import all_but_the_top, principal_components
from coupled_adam.geometry.word_similarity import Benchmark

V, H = 120, 8
WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(V - 2))]
E = np.random.default_rng(0).normal(size=(V, H)).astype(np.float32) + 1
WEIGHTS = np.random.default_rng(1).uniform(0.5, 2, size=V)
TEXTS = ["w0 w1 w2", "w7", "w99 w99 w3 w50", "w2 w2"]


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def model2vec(**options: Any) -> StaticModel:
    return StaticModel(E, tokenizer(), {"model_type": "model2vec", "architectures": ["StaticModel"]}, **options)


def vectors_of_words(model: StaticModel) -> Any:
    return np.stack([model.encode(word, normalize=False) for word in WORDS[2:]])


MODEL2VEC: dict[str, Callable[[], StaticModel]] = {
    "plain": model2vec,
    "weighted": lambda: model2vec(weights=WEIGHTS),
    "float16": lambda: quantize_model(model2vec(), quantize_to="float16"),
    "int8": lambda: quantize_model(model2vec(), quantize_to="int8"),
    "shared": lambda: model2vec(token_mapping=np.arange(V) % 40),
    "quantized": lambda: quantize_model(model2vec(), vocabulary_quantization=30),
    "int8 without a type": lambda: StaticModel((E * 20).astype(np.int8), tokenizer()),
    "quantized int8": lambda: quantize_model(model2vec(), vocabulary_quantization=30, quantize_to="int8"),
}


@pytest.mark.parametrize("kind", MODEL2VEC)
def test_each_token_of_model2vec_has_the_vector_that_model2vec_gives_it(kind: str, tmp_path: Path) -> None:
    MODEL2VEC[kind]().save_pretrained(tmp_path / "m")
    theirs = vectors_of_words(StaticModel.from_pretrained(tmp_path / "m"))
    read = read_embeddings(str(tmp_path / "m"))
    assert read.words is not None and read.origin.static == "embeddings"
    rows = [read.words.token_of(word) for word in WORDS[2:]]
    np.testing.assert_allclose(read.input[rows], theirs, rtol=1e-3 if kind == "float16" else 1e-6)
    if kind == "plain":
        assert read.notes == ()
    if kind.startswith(("shared", "quantized")):
        assert "share" in read.notes[0]
    pairs = [
        (a, b, float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)))
        for a, b, x, y in zip(WORDS[2:], WORDS[9:], theirs, theirs[7:], strict=False)
    ]
    (audited,), _ = audit_models([str(tmp_path / "m")], [Benchmark("all", tuple(pairs))])
    assert audited.matrix == "embedding" and audited.measured.mean_similarity == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize("kind", ["plain", "weighted", "float16", "shared"])
@pytest.mark.parametrize("top", [False, True], ids=["center", "top"])
def test_a_copy_of_model2vec_gives_every_text_the_vector_without_mean_or_components(
    kind: str, top: bool, tmp_path: Path
) -> None:
    MODEL2VEC[kind]().save_pretrained(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    found = read_embeddings(str(tmp_path / "m"))
    written = (remove_top if top else center)(found, tmp_path / "copy")
    rows = found.input.double().numpy()
    without = all_but_the_top(rows, principal_components(rows, 1)) if top else lambda texts: texts - rows.mean(0)
    old, new = (StaticModel.from_pretrained(tmp_path / name) for name in ("m", "copy"))
    wanted = without(old.encode(TEXTS, normalize=False).astype(np.float64))
    np.testing.assert_allclose(new.encode(TEXTS, normalize=False), wanted, atol=4e-3 if kind == "float16" else 1e-5)
    assert written.norm_of_mean == pytest.approx(np.linalg.norm(rows.mean(0)))
    assert new.embedding.dtype == old.embedding.dtype
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    kept = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert kept | {"model.safetensors": b""} == before | {"model.safetensors": b""}


@pytest.mark.parametrize(
    ("kind", "reason"), [("int8", "int8, too coarse"), ("quantized", "share vectors and have weights of their own")]
)
def test_what_cannot_be_subtracted_from_is_said(kind: str, reason: str, tmp_path: Path) -> None:
    MODEL2VEC[kind]().save_pretrained(tmp_path / "m")
    for option in ("--center", "--all-but-the-top"):
        done = command("audit", tmp_path / "m", option, tmp_path / "copy")
        assert done.returncode == 2 and reason in done.stderr
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mapping": torch.full((V,), V)}, "'mapping' names rows that 'embeddings' does not have"),
        ({"weights": torch.ones(V - 1)}, "119 'weights' for 120 tokens"),
    ],
)
def test_damaged_models_of_model2vec_are_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model2vec().save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors") | change, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        read_embeddings(str(tmp_path))


def word_embeddings() -> WordEmbeddings:
    return WordEmbeddings(WhitespaceTokenizer(WORDS, stop_words=["w5"]), E)


SENTENCES: dict[str, Callable[[], list[Any]]] = {
    "static": lambda: [StaticEmbedding(tokenizer(), E.copy())],
    "static, normalized": lambda: [StaticEmbedding(tokenizer(), E.copy()), Normalize()],
    "words": lambda: [word_embeddings(), Pooling(H)],
}


def saved(kind: str, directory: Path, **options: Any) -> Path:
    SentenceTransformer(modules=SENTENCES[kind](), device="cpu").save(str(directory), **options)
    return directory


@pytest.mark.parametrize("kind", SENTENCES)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_modules_of_sentence_transformers_are_read_with_their_words(kind: str, safe: bool, tmp_path: Path) -> None:
    path = saved(kind, tmp_path / "m", safe_serialization=safe)
    read = read_embeddings(str(path))
    assert np.array_equal(read.input, E) and read.output is None and read.origin.static is not None
    assert read.words is not None and [read.words.text_of(row) for row in range(V)] == WORDS
    assert [read.words.token_of(word) for word in ("w3", "w117", "absent")] == [5, 119, None]


@pytest.mark.parametrize("kind", SENTENCES)
@pytest.mark.parametrize("top", [False, True], ids=["center", "top"])
def test_a_copy_of_an_encoder_gives_every_text_the_vector_without_mean_or_components(
    kind: str, top: bool, tmp_path: Path
) -> None:
    found = read_embeddings(str(saved(kind, tmp_path / "m")))
    (remove_top if top else center)(found, tmp_path / "copy")
    wide = E.astype(np.float64)
    without = all_but_the_top(wide, principal_components(wide, 1)) if top else lambda texts: texts - wide.mean(0)
    bare = SentenceTransformer(modules=SENTENCES["static"](), device="cpu") if "normal" in kind else None
    old, new = (SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("m", "copy"))
    wanted = without((bare or old).encode(TEXTS).astype(np.float64))
    if "normal" in kind:
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(new.encode(TEXTS), wanted, atol=1e-5)


MORE: dict[str, Callable[[], list[Any]]] = {
    "another layer": lambda: [*SENTENCES["words"](), Dense(H, 4)],
    "sums": lambda: [word_embeddings(), Pooling(H, pooling_mode="mean_sqrt_len_tokens")],
    "two ways": lambda: [word_embeddings(), Pooling(H, pooling_mode=("mean", "max"))],
}


@pytest.mark.parametrize("more", MORE)
def test_an_encoder_that_computes_more_is_not_static(more: str, tmp_path: Path) -> None:
    modules = MORE[more]()
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "m"))
    found = read_embeddings(str(tmp_path / "m"))
    assert np.array_equal(found.input, E) and found.origin.static is None
    with pytest.raises(InputError, match="no output embedding"):
        center(found, tmp_path / "copy")


def test_the_mean_is_known_in_the_configuration_of_earlier_versions(tmp_path: Path) -> None:
    path = saved("words", tmp_path / "m")
    config = path / "1_Pooling" / "config.json"
    for mode, static in (("mean_tokens", True), ("max_tokens", False)):
        config.write_text(json.dumps({"word_embedding_dimension": H, f"pooling_mode_{mode}": True}))
        assert (read_embeddings(str(path)).origin.static is not None) == static


def test_the_routes_of_an_encoder_are_named(tmp_path: Path) -> None:
    routes = {"query": SENTENCES["static"](), "document": SENTENCES["static"]()}
    SentenceTransformer(modules=[Router(routes)], device="cpu").save(str(tmp_path / "m"))
    with pytest.raises(InputError, match=r"name what to read of it: document_0_StaticEmbedding, query_0_Static"):
        read_embeddings(str(tmp_path / "m"))
    assert np.array_equal(read_embeddings(str(tmp_path / "m" / "query_0_StaticEmbedding")).input, E)


def test_pickles_of_static_embeddings_are_not_written(tmp_path: Path) -> None:
    found = read_embeddings(str(saved("words", tmp_path / "m", safe_serialization=False)))
    with pytest.raises(InputError, match="pickle files cannot be written"):
        center(found, tmp_path / "copy")


def test_a_list_of_words_that_is_none_is_named(tmp_path: Path) -> None:
    path = saved("words", tmp_path / "m")
    (config,) = path.rglob("whitespacetokenizer_config.json")
    for content in ('{"vocab": 5}', '{"vocab": [1]}', "[]", "{"):
        config.write_text(content)
        with pytest.raises(InputError, match=r"whitespacetokenizer_config\.json: "):
            read_embeddings(str(path))


def test_a_file_of_model2vec_by_itself_is_centered(tmp_path: Path) -> None:
    model2vec(weights=WEIGHTS).save_pretrained(tmp_path / "m")
    done = command("audit", tmp_path / "m" / "model.safetensors", "--center", tmp_path / "copy.safetensors")
    assert done.returncode == 0 and "Centered copy" in done.stderr
    shutil.copyfile(tmp_path / "copy.safetensors", tmp_path / "m" / "model.safetensors")
    np.testing.assert_allclose(
        read_embeddings(str(tmp_path / "m")).input, E * WEIGHTS[:, None] - (E * WEIGHTS[:, None]).mean(0), atol=1e-5
    )
