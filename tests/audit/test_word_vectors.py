"""Word vectors: files of our own and of gensim's tests, audited, and written without mean and first components."""

import struct
from pathlib import Path
from typing import Any

import gensim
import numpy as np
import pytest
from gensim.models import FastText, KeyedVectors
from gensim.models.fasttext import load_facebook_vectors, save_facebook_model
from in_process import command

from coupled_adam.audit.centering import center, remove_top
from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.audit.models import audit_models
from coupled_adam.errors import InputError
from coupled_adam.geometry.post_processing import all_but_the_top, principal_components
from coupled_adam.geometry.word_similarity import Benchmark

GENSIM = Path(gensim.__file__).parent / "test" / "test_data"
WORDS = [f"w{i}" for i in range(18)] + ["Köln", "new_york"]
E = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32) + 1


def write(path: Path, kind: str, words: list[str] = WORDS, matrix: Any = E) -> Path:
    header = f"{len(words)} {matrix.shape[1]}\n"
    if kind.startswith("binary"):
        end = b"\n" if kind == "binary with line ends" else b""
        rows = b"".join(word.encode() + b" " + row.tobytes() + end for word, row in zip(words, matrix, strict=True))
        path.write_bytes(header.encode() + rows)
    else:
        rows = "".join(f"{word} {' '.join(map(str, row.tolist()))}\n" for word, row in zip(words, matrix, strict=True))
        path.write_text((header if kind == "text" else "") + rows, encoding="utf-8")
    return path


KINDS = {
    "text": "word2vec text",
    "binary": "word2vec binary",
    "binary with line ends": "word2vec binary",
    "GloVe": "GloVe",
}


@pytest.mark.parametrize("kind", KINDS)
def test_words_and_vectors_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    found = read_embeddings(str(write(tmp_path / "any", kind)))
    assert found.origin.kind == KINDS[kind] and found.tied is None and found.output is None and not found.notes
    assert np.array_equal(found.input.numpy(), E)
    assert found.words is not None and [found.words.text_of(i) for i in range(20)] == WORDS
    assert [found.words.token_of(word) for word in (*WORDS, "absent", "w")] == [*range(20), None, None]


@pytest.mark.parametrize("name", ["euclidean_vectors.bin", "crime-and-punishment.vec", "test_glove.txt"])
def test_files_of_the_original_programs_are_read_as_gensim_does(name: str) -> None:
    found = read_embeddings(str(GENSIM / name))
    kind = {"binary": ".bin" in name, "no_header": "glove" in name}
    theirs = KeyedVectors.load_word2vec_format(GENSIM / name, **kind)
    assert np.array_equal(found.input.numpy(), theirs.vectors)


@pytest.fixture(scope="module")
def fasttext(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model = FastText([WORDS] * 9, vector_size=6, min_count=1, bucket=50, epochs=1, seed=1, workers=1)
    path = tmp_path_factory.mktemp("fasttext") / "cc.bin"
    save_facebook_model(model, str(path))
    return path, model


def test_a_model_of_the_original_fasttext_is_read_as_gensim_does() -> None:
    path = GENSIM / "crime-and-punishment.bin"
    found = read_embeddings(str(path))
    assert found.origin.kind == "fastText"
    assert np.array_equal(found.input.numpy(), load_facebook_vectors(str(path)).vectors)


def test_a_model_of_fasttext_has_the_vectors_of_its_words(fasttext: tuple[Path, Any]) -> None:
    path, model = fasttext
    found = read_embeddings(str(path))
    assert found.words is not None and "n-grams" in found.notes[0]
    for word in WORDS:
        np.testing.assert_allclose(found.input[found.words.token_of(word)], model.wv[word], rtol=1e-6)


def test_similarity_is_measured_of_the_words(tmp_path: Path) -> None:
    pairs = [
        (WORDS[i], WORDS[j], float(E[i] @ E[j] / np.linalg.norm(E[i]) / np.linalg.norm(E[j])))
        for i, j in zip(range(12), range(7, 19), strict=True)
    ]
    (audited,), _ = audit_models([str(write(tmp_path / "v.vec", "text"))], [Benchmark("all", tuple(pairs))])
    assert audited.matrix == "embedding" and audited.measured.mean_similarity == pytest.approx(100)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [False, True])
def test_a_copy_has_the_same_words_in_the_same_format(kind: str, top: bool, tmp_path: Path) -> None:
    source, copy = write(tmp_path / "v.vec", kind), tmp_path / "copy.vec"
    before = source.read_bytes()
    written = (remove_top if top else center)(read_embeddings(str(source)), copy)
    found = read_embeddings(str(copy))
    assert found.origin.kind == KINDS[kind] and found.words is not None
    assert [found.words.text_of(i) for i in range(20)] == WORDS
    wide = E.astype(np.float64)
    wanted = all_but_the_top(wide, principal_components(wide, 1))(wide) if top else wide - wide.mean(0)
    assert np.array_equal(found.input.numpy(), wanted.astype(np.float32))
    assert written.norm_of_mean == pytest.approx(np.linalg.norm(wide.mean(0)))
    assert source.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["copy.vec", "v.vec"]


def test_all_but_the_top_of_an_array(tmp_path: Path) -> None:
    matrix = np.random.default_rng(1).normal(size=(500, 101)).astype(np.float16)
    np.save(tmp_path / "e.npy", matrix)
    done = command("audit", tmp_path / "e.npy", "--all-but-the-top", tmp_path / "copy.npy")
    assert done.returncode == 0 and "principal components removed: 2," in done.stderr
    written = np.load(tmp_path / "copy.npy")
    wide = matrix.astype(np.float64)
    assert written.dtype == np.float16
    np.testing.assert_allclose(written, all_but_the_top(wide, principal_components(wide, 2))(wide), atol=2e-3)


def test_repeated_words_are_counted_once_and_said(tmp_path: Path) -> None:
    found = read_embeddings(str(write(tmp_path / "v.vec", "text", [*WORDS[:19], "w0"])))
    assert len(found.input) == 19 and found.notes == ("1 of its 20 words occur a second time and were left out.",)


def test_words_cut_within_a_character_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "v.bin", "binary")
    path.write_bytes(path.read_bytes().replace("Köln".encode(), b"K\xc3ln"))
    found = read_embeddings(str(path))
    assert found.words is not None and found.words.text_of(18) == "K\ufffdln"


def damaged(path: Path, change: Any) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


BAD = {
    "cut": (lambda p: damaged(write(p, "binary"), lambda b: b[:-30]), "damaged"),
    "cut text": (lambda p: damaged(write(p, "text"), lambda b: b[: len(b) // 2]), "damaged"),
    "too large a header": (
        lambda p: damaged(write(p, "text"), lambda b: b.replace(b"20 4", b"999999999999 4", 1)),
        "take",
    ),
    "too large a binary header": (
        lambda p: damaged(write(p, "binary"), lambda b: b.replace(b"20 4", b"20 999999", 1)),
        "take",
    ),
    "a row of another width": (lambda p: damaged(write(p, "text"), lambda b: b.replace(b"w7 ", b"w7 1.0 ")), "damaged"),
    "no number": (lambda p: damaged(write(p, "GloVe"), lambda b: b.replace(b"w7 ", b"w7 x ")), "damaged"),
    "one word": (lambda p: write(p, "text", WORDS[:1], E[:1]), "only 1 words"),
    "a cut model of fastText": (
        lambda p: p.write_bytes(struct.pack("<ii", 793712314, 12) + bytes(40)) and p,
        "damaged",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_one_line(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    path = make(tmp_path / "v.vec")
    with pytest.raises(InputError, match=rf"v\.vec: .*{message}") as error:
        read_embeddings(str(path))
    assert "\n" not in str(error.value)


def test_what_cannot_be_written_is_refused_before_anything_is(fasttext: tuple[Path, Any], tmp_path: Path) -> None:
    source, other = write(tmp_path / "v.vec", "text"), write(tmp_path / "w.vec", "text")
    for arguments, message in (
        ([fasttext[0], "--center", tmp_path / "c.bin"], "n-grams"),
        ([fasttext[0], "--all-but-the-top", tmp_path / "c.bin"], "n-grams"),
        ([source, "--all-but-the-top", tmp_path / "c.txt"], "needs the suffix .vec"),
        ([source, "--all-but-the-top", other], "already exists"),
        ([source, other, "--all-but-the-top", tmp_path / "c.vec"], "one model at a time"),
        ([source, "--center", tmp_path / "a.vec", "--all-but-the-top", tmp_path / "b.vec"], "choose one"),
        ([source, "--tensor", "x"], "leave out --tensor x"),
    ):
        done = command("audit", *arguments)
        assert done.returncode == 2 and message in done.stderr, (arguments, done.stderr)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.vec", "w.vec"]


def test_all_but_the_top_is_not_for_models(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"wte.weight": E, "lm_head.weight": E[::-1].copy()}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="in a model it would change predictions"):
        remove_top(read_embeddings(str(tmp_path / "m.safetensors")), tmp_path / "copy.safetensors")
