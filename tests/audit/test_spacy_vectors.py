"""Word vectors of spaCy, written and read by spaCy."""

import fnmatch
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import spacy
import srsly
from in_process import command
from spacy.vectors import Vectors
from spacy.vocab import Vocab

from coupled_adam.audit.centering import center, remove_top
from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.audit.models import audit_models
from coupled_adam.errors import InputError
from coupled_adam.geometry.post_processing import all_but_the_top, principal_components
from coupled_adam.geometry.word_similarity import Benchmark

WORDS = [f"w{i}" for i in range(18)] + ["Köln", "PERSON"]  # the latter is one of spaCy's symbols
E = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32) + 1


def pipeline(*components: str) -> spacy.Language:
    """Of these vectors, some without a word: spaCy makes room for more."""
    made = spacy.blank("en")
    for word, row in zip(WORDS, E, strict=True):
        made.vocab.set_vector(word, row)
    for component in components:
        made.add_pipe(component)
    assert len(made.vocab.vectors.data) > len(WORDS)
    return made


@pytest.mark.parametrize("given", ["pipeline", "vocab", "package"])
def test_words_and_vectors_are_those_of_spacy(given: str, tmp_path: Path) -> None:
    place = {"pipeline": tmp_path / "m", "vocab": tmp_path / "m", "package": tmp_path / "m" / "m-1.0"}[given]
    place.parent.mkdir(exist_ok=True)
    pipeline().to_disk(place)
    found = read_embeddings(str(tmp_path / "m" / "vocab" if given == "vocab" else tmp_path / "m"))
    assert found.origin.kind == "spaCy" and found.notes == () and found.words is not None
    rows = [found.words.token_of(word) for word in WORDS]
    assert sorted(rows) == list(range(20)) and np.array_equal(found.input[rows], E)
    assert [found.words.text_of(row) for row in rows] == WORDS and found.words.token_of("absent") is None


def test_words_that_share_a_vector_have_one_row(tmp_path: Path) -> None:
    made = pipeline()
    made.vocab.prune_vectors(12)
    made.to_disk(tmp_path / "m")
    found = read_embeddings(str(tmp_path / "m"))
    assert len(found.input) == 12 and found.notes == ("Its 20 words share 12 vectors.",) and found.words is not None
    for word in WORDS:
        assert np.array_equal(found.input[found.words.token_of(word)], made.vocab[word].vector)


def test_similarity_is_measured_of_the_words(tmp_path: Path) -> None:
    made = pipeline()
    made.to_disk(tmp_path / "m")
    pairs = [(a, b, float(made.vocab[a].similarity(made.vocab[b]))) for a, b in zip(WORDS, WORDS[7:], strict=False)]
    (audited,), _ = audit_models([str(tmp_path / "m")], [Benchmark("all", tuple(pairs))])
    assert audited.matrix == "embedding" and audited.measured.mean_similarity == pytest.approx(100)


@pytest.mark.parametrize("top", [False, True], ids=["center", "top"])
@pytest.mark.parametrize("pruned", [False, True])
def test_spacy_reads_the_copy(top: bool, pruned: bool, tmp_path: Path) -> None:
    made = pipeline("sentencizer")
    if pruned:
        made.vocab.prune_vectors(12)
    made.to_disk(tmp_path / "m")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = read_embeddings(str(tmp_path / "m"))
    (remove_top if top else center)(found, tmp_path / "copy")
    new, wide = spacy.load(tmp_path / "copy"), found.input.double().numpy()
    without = all_but_the_top(wide, principal_components(wide, 1)) if top else lambda rows: rows - wide.mean(0)
    assert new.pipe_names == ["sentencizer"] and new.vocab.vectors.shape == made.vocab.vectors.shape
    for word in WORDS:
        wanted = without(made.vocab[word].vector[None].astype(np.float64))[0]
        np.testing.assert_allclose(new.vocab[word].vector, wanted, atol=1e-6)
    unused = sorted(set(range(len(new.vocab.vectors.data))) - set(new.vocab.vectors.key2row.values()))
    assert not new.vocab.vectors.data[unused].any()
    assert {path: path.read_bytes() for path in before} == before
    copied = {path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == {path.relative_to(tmp_path / "m") for path in before}


def test_components_that_take_the_vectors_in_keep_them(tmp_path: Path) -> None:
    made = pipeline()
    embed = {
        "@architectures": "spacy.MultiHashEmbed.v2",
        "width": 8,
        "attrs": ["NORM"],
        "rows": [20],
        "include_static_vectors": True,
    }
    encode = {"@architectures": "spacy.MaxoutWindowEncoder.v2", "width": 8, "window_size": 1, "maxout_pieces": 2}
    model = {"@architectures": "spacy.Tok2Vec.v2", "embed": embed, "encode": {**encode, "depth": 1}}
    made.add_pipe("tok2vec", config={"model": model})
    made.initialize()
    made.to_disk(tmp_path / "m")
    for option in ("--center", "--all-but-the-top"):
        done = command("audit", tmp_path / "m", option, tmp_path / "copy")
        assert done.returncode == 2 and "its components take the vectors in" in done.stderr
    assert command("audit", tmp_path / "m" / "vocab", "--center", tmp_path / "copy").returncode == 0
    vocab = Vocab().from_disk(tmp_path / "copy")
    np.testing.assert_allclose(vocab["w3"].vector, E[3] - E.mean(0), atol=1e-6)


def test_rows_of_floret_are_measured_without_words_and_not_written(tmp_path: Path) -> None:
    made = spacy.blank("en")
    made.vocab.vectors = Vectors(data=E, mode="floret", minn=2, maxn=3, hash_count=2, strings=made.vocab.strings)
    made.to_disk(tmp_path / "m")
    found = read_embeddings(str(tmp_path / "m"))
    assert np.array_equal(found.input, E) and found.words is None and "hash of n-grams" in found.notes[0]
    with pytest.raises(InputError, match="those of n-grams"):
        center(found, tmp_path / "copy")


def damaged(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("key2row", b"\x81\x01", "key2row: damaged"),
        ("key2row", srsly.msgpack_dumps([1, 2]), "no map of numbers"),
        ("key2row", srsly.msgpack_dumps({5: 10**6}), "rows that are not among"),
        ("key2row", srsly.msgpack_dumps({5: -1}), "rows that are not among"),
        ("key2row", srsly.msgpack_dumps({-5: 1}), "key2row: damaged"),
        ("key2row", srsly.msgpack_dumps({}), "0 vectors of words"),
        ("key2row", b"\xdf\xff\xff\xff\xff", "key2row: damaged"),
        ("strings.json", b"{}", r"strings\.json"),
        ("strings.json", b"[5]", r"strings\.json"),
        ("vectors", b"\x93NUMPY", "vectors: truncated"),
        ("vectors.cfg", b"[", r"vectors\.cfg"),
    ],
)
def test_damaged_vocabularies_are_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    pipeline().to_disk(tmp_path / "m")
    damaged(tmp_path / "m" / "vocab", name, content)
    with pytest.raises(InputError, match=message) as error:
        read_embeddings(str(tmp_path / "m"))
    assert "\n" not in str(error.value)


def test_a_pipeline_without_vectors_is_named(tmp_path: Path) -> None:
    spacy.blank("en").to_disk(tmp_path / "m")
    with pytest.raises(InputError, match="without word vectors"):
        read_embeddings(str(tmp_path / "m"))
    (tmp_path / "m" / "vocab" / "key2row").unlink()
    pipeline().vocab.vectors.to_disk(tmp_path / "m" / "vocab")
    with pytest.raises(InputError, match="leave out --tensor x"):
        read_embeddings(str(tmp_path / "m"), tensor="x")


def test_without_spacy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline().to_disk(tmp_path / "m")
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "spacy" else find(name))
    done = command("audit", tmp_path / "m")
    assert done.returncode == 2 and "spacy not installed" in done.stderr and ".[spacy]" in done.stderr


def test_of_a_pipeline_on_the_hub_the_vocabulary_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline("tagger").to_disk(tmp_path / "remote")

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        for path in (path for path in (tmp_path / "remote").rglob("*") if path.is_file()):
            place = path.relative_to(tmp_path / "remote")
            if any(fnmatch.fnmatch(place.as_posix(), pattern) for pattern in allow_patterns):
                (tmp_path / "local" / place.parent).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, tmp_path / "local" / place)
        return str(tmp_path / "local")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = read_embeddings("spacy/en_core_web_md")
    assert len(found.input) == 20 and found.name == "spacy/en_core_web_md"
    assert not (tmp_path / "local" / "tagger").exists()
    with pytest.raises(InputError, match="only its vocabulary is here; download the whole pipeline"):
        center(found, tmp_path / "copy")


def test_pipelines_of_spacy_2_are_read_and_kept(tmp_path: Path) -> None:
    pipeline().to_disk(tmp_path / "m")
    (tmp_path / "m" / "vocab" / "vectors.cfg").unlink()
    (tmp_path / "m" / "config.cfg").unlink()
    meta = tmp_path / "m" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"pipeline": ["tagger"]}))
    found = read_embeddings(str(tmp_path / "m"))
    assert len(found.input) == 20
    with pytest.raises(InputError, match="its components take the vectors in"):
        center(found, tmp_path / "copy")
