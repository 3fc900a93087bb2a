"""gensim's own files, which are pickles: its tests' files of all versions, and files of this one; no code is run."""

import os
import pickle
from pathlib import Path
from typing import Any

import gensim
import numpy as np
import pytest
from gensim.models import Doc2Vec, FastText, KeyedVectors, Word2Vec
from gensim.models.doc2vec import TaggedDocument
from in_process import command

from coupled_adam.audit.centering import center, remove_top
from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.audit.gensim_files import class_of
from coupled_adam.audit.models import audit_models
from coupled_adam.errors import InputError
from coupled_adam.geometry.post_processing import all_but_the_top, principal_components
from coupled_adam.geometry.word_similarity import Benchmark

GENSIM = Path(gensim.__file__).parent / "test" / "test_data"
WORDS = [f"w{i}" for i in range(18)] + ["Köln", "new_york"]
E = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32) + 1
TEXTS = [WORDS[i:] + WORDS[:i] for i in range(9)]


def keyed_vectors(dtype: str = "float32") -> KeyedVectors:
    made = KeyedVectors(4, dtype=dtype)
    made.add_vectors(WORDS, E.astype(dtype))
    for number, word in enumerate(WORDS):
        made.set_vecattr(word, "count", 100 - number)
    return made


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"separately": ["vectors"]}, {"pickle_protocol": 2}, {"pickle_protocol": 5}])
def test_words_and_vectors_are_those_that_gensim_saved(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    keyed_vectors(dtype).save(str(tmp_path / "any"), **options)
    found = read_embeddings(str(tmp_path / "any"))
    assert found.origin.kind == "gensim" and found.notes == ()
    assert np.array_equal(found.input, E.astype(dtype)) and str(found.input.dtype).endswith(("64", "32"))
    assert found.words is not None and [found.words.text_of(i) for i in range(20)] == WORDS


MODELS = {
    "Word2Vec": lambda: Word2Vec(TEXTS, vector_size=4, min_count=1, epochs=1, workers=1),
    "Word2Vec hs": lambda: Word2Vec(TEXTS, vector_size=4, min_count=1, epochs=1, workers=1, hs=1, negative=0),
    "FastText": lambda: FastText(TEXTS, vector_size=4, min_count=1, epochs=1, workers=1, bucket=50),
    "FastText vectors": lambda: MODELS["FastText"]().wv,
    "Doc2Vec": lambda: Doc2Vec(
        [TaggedDocument(text, [i]) for i, text in enumerate(TEXTS)],
        vector_size=4,
        min_count=1,
        epochs=1,
        workers=1,
        dm=0,
        dbow_words=1,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("apart", [False, True], ids=["one-file", "several-files"])
def test_of_a_model_the_vectors_of_its_words_are_read(
    kind: str, apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind]()
    theirs = getattr(model, "wv", model)
    if apart:
        whole = gensim.utils.SaveLoad._save_specials
        monkeypatch.setattr(  # arrays of more than 80 MB lie apart; here those of one number
            gensim.utils.SaveLoad,
            "_save_specials",
            lambda self, name, separately, limit, *rest: whole(self, name, separately, 1, *rest),
        )
    model.save(str(tmp_path / "m"))
    assert (len(list(tmp_path.iterdir())) > 1) == apart
    found = read_embeddings(str(tmp_path / "m"))
    np.testing.assert_allclose(found.input, theirs.vectors, rtol=1e-6)
    assert found.words is not None and [found.words.text_of(i) for i in range(20)] == theirs.index_to_key
    assert "the vectors of its words" in found.notes[0]
    with pytest.raises(InputError, match="more than the vectors of words; save these alone"):
        center(found, tmp_path / "copy")


OLD = sorted(path for path in GENSIM.rglob("*") if path.is_file() and class_of(path))
HOLD_VECTORS = ("Word2Vec", "Doc2Vec", "FastText", "EuclideanKeyedVectors")


def loaded(path: Path) -> KeyedVectors | None:
    """What gensim reads of a file of an earlier version; None if it no longer does."""
    for kind in (KeyedVectors, Word2Vec, FastText):
        try:
            model = kind.load(str(path))
            vectors = getattr(model, "wv", model)
            if isinstance(vectors.vectors, np.ndarray):
                return vectors
        except Exception:
            continue
    return None


def test_files_of_all_versions_are_read_or_refused_by_the_name_of_their_class() -> None:
    compared = 0
    for path in OLD:
        if class_of(path) not in HOLD_VECTORS:
            with pytest.raises(InputError, match=f"a {class_of(path)} of gensim without the vectors of words"):
                read_embeddings(str(path))
            continue
        found = read_embeddings(str(path))
        assert len(found.input) >= 3 and bool(found.input.isfinite().all()) and found.words is not None
        if (theirs := loaded(path)) is not None:
            compared += 1
            assert np.array_equal(found.input, theirs.vectors), path
            assert [found.words.text_of(i) for i in range(len(theirs))] == theirs.index_to_key
    assert compared > 15 and len(OLD) > 80


def test_similarity_is_measured_of_the_words(tmp_path: Path) -> None:
    keyed_vectors().save(str(tmp_path / "v.kv"))
    theirs = KeyedVectors.load(str(tmp_path / "v.kv"))
    pairs = [(a, b, float(theirs.similarity(a, b))) for a, b in zip(WORDS, WORDS[7:], strict=False)]
    (audited,), _ = audit_models([str(tmp_path / "v.kv")], [Benchmark("all", tuple(pairs))])
    assert audited.matrix == "embedding" and audited.measured.mean_similarity == pytest.approx(100)
    assert "--center COPY" in audited.advice.text


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("top", [False, True], ids=["center", "top"])
def test_gensim_reads_the_copy(dtype: str, top: bool, tmp_path: Path) -> None:
    keyed_vectors(dtype).save(str(tmp_path / "v.kv"), separately=["vectors"])
    (remove_top if top else center)(read_embeddings(str(tmp_path / "v.kv")), tmp_path / "copy.kv")
    theirs, wide = KeyedVectors.load(str(tmp_path / "copy.kv")), E.astype(dtype).astype(np.float64)
    wanted = all_but_the_top(wide, principal_components(wide, 1))(wide) if top else wide - wide.mean(0)
    np.testing.assert_allclose(theirs.vectors, wanted, atol=2e-3 if dtype == "float16" else 1e-6)
    assert theirs.vectors.dtype == dtype and theirs.index_to_key == WORDS
    assert [theirs.get_vecattr(word, "count") for word in WORDS] == [100 - i for i in range(20)]
    assert theirs.most_similar("w3") and sorted(p.name for p in tmp_path.iterdir()) == [
        "copy.kv",
        "v.kv",
        "v.kv.vectors.npy",
    ]


def test_an_old_file_is_written_as_this_version_of_gensim_does(tmp_path: Path) -> None:
    source = GENSIM / "old_keyedvectors_320.dat"
    assert command("audit", source, "--center", tmp_path / "copy.dat").returncode == 0
    theirs, old = KeyedVectors.load(str(tmp_path / "copy.dat")), KeyedVectors.load(str(source))
    np.testing.assert_allclose(theirs.vectors, old.vectors - old.vectors.mean(0), atol=1e-6)
    assert [theirs.get_vecattr(w, "count") for w in old.index_to_key] == [
        old.get_vecattr(w, "count") for w in old.index_to_key
    ]


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nothing_that_a_file_names_is_called_or_imported(protocol: int, tmp_path: Path) -> None:
    vectors, place = keyed_vectors(), tmp_path / "called"
    vectors.extra = [Calls(os.system, f"touch {place}"), Calls(eval, f"open({str(place)!r}, 'w')"), Calls(print, "x")]
    (tmp_path / "v.kv").write_bytes(pickle.dumps(vectors, protocol))
    assert np.array_equal(read_embeddings(str(tmp_path / "v.kv")).input, E)
    vectors.vectors = Calls(os.system, f"touch {place}")
    (tmp_path / "v.kv").write_bytes(pickle.dumps(vectors, protocol))
    with pytest.raises(InputError, match="without the vectors of words"):
        read_embeddings(str(tmp_path / "v.kv"))
    assert not place.exists()


def change(**attributes: Any) -> KeyedVectors:
    made = keyed_vectors()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (change(vectors=E[:5]), "damaged, .*20 words, but vectors of shape"),
        (change(vectors=E.astype(object)), "without the vectors of words"),
        (change(vectors=E.astype(np.int32)), "type int32"),
        (change(vectors=E[0]), "damaged"),
        (change(index_to_key=[*WORDS[:19], "w0"]), "a word occurs twice"),
        (change(index_to_key=5), "without the vectors of words"),
    ],
)
def test_damaged_files_are_one_line(made: KeyedVectors, message: str, tmp_path: Path) -> None:
    (tmp_path / "v.kv").write_bytes(pickle.dumps(made))
    with pytest.raises(InputError, match=rf"v\.kv: .*{message}") as error:
        read_embeddings(str(tmp_path / "v.kv"))
    assert "\n" not in str(error.value)


def test_a_file_that_belongs_to_it_and_is_missing_or_a_pointer_is_named(tmp_path: Path) -> None:
    keyed_vectors().save(str(tmp_path / "v.kv"), separately=["vectors"])
    apart = tmp_path / "v.kv.vectors.npy"
    apart.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548105171\n")
    with pytest.raises(InputError, match=r"v\.kv\.vectors\.npy: a Git LFS pointer"):
        read_embeddings(str(tmp_path / "v.kv"))
    apart.unlink()
    with pytest.raises(InputError, match=r"its vectors are in v\.kv\.vectors\.npy, which is missing"):
        read_embeddings(str(tmp_path / "v.kv"))


def test_fasttext_with_other_hashes_is_refused(tmp_path: Path) -> None:
    vectors = MODELS["FastText vectors"]()
    vectors.compatible_hash = False
    vectors.save(str(tmp_path / "v.kv"))
    with pytest.raises(InputError, match=r"before 3\.8"):
        read_embeddings(str(tmp_path / "v.kv"))
