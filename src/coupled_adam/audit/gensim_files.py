"""Files of gensim's own format, which are pickles: vectors and words are taken out, and no code of the file is run."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from coupled_adam.errors import InputError
from coupled_adam.files import check_no_pointer

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

#: How such a file begins: the protocol of the pickle, perhaps a frame, and a class of gensim as the first.
BEGINNING = re.compile(rb"\x80[\x02-\x05](?:\x95.{8})?(?:c|\x8c.)gensim\.[\w.]+(?:\n|\x94\x8c.)(\w+)", re.DOTALL)

#: Bytes that are enough for that.
LONGEST_BEGINNING = 256

#: Classes that are word vectors and no more. Others train them, or have vectors of something else beside them.
VECTORS_ALONE = ("KeyedVectors", "Word2VecKeyedVectors", "EuclideanKeyedVectors")

#: The names of vectors and words in the versions of gensim, newest first.
VECTORS, WORDS = ("vectors", "syn0"), ("index_to_key", "index2word", "index2entity")

#: Where gensim says which arrays of an object lie in files of their own.
APART = "__numpys"


def class_in(head: bytes) -> str | None:
    """Return the class of gensim that a file holds by how it begins; None if it is no such file."""
    match = BEGINNING.match(head)
    return match[1].decode() if match else None


def class_of(path: Path) -> str | None:
    """Return the class of gensim that a file holds; None if it is no such file."""
    with path.open("rb") as file:
        return class_in(file.read(LONGEST_BEGINNING))


def reason_against_writing(path: Path) -> str | None:
    """Return why no copy with other vectors can be written; None if one can."""
    kind = class_of(path)
    if kind in VECTORS_ALONE:
        return None
    return (
        f"it is a {kind} of gensim, which is more than the vectors of words; save these alone "
        "(model.wv.save_word2vec_format('words.vec')), and center that"
    )


def load(path: Path) -> "KeyedVectors":
    """Read the words and vectors of a file, with the counts of the words.

    Raises:
        InputError: it holds no word vectors, or a file with arrays that belongs to it is missing.
        Exception: it is damaged; of any kind.
    """
    root = _unpickled(path)
    if not isinstance(root, _Record) or not isinstance(root.state, dict):
        raise InputError(f"{path}: no object of gensim")
    found, place = root.state, str(path)
    if isinstance(inner := found.get("wv"), _Record) and isinstance(inner.state, dict):
        found, place = inner.state, f"{path}.wv"
    arrays = _Arrays(found, place)
    words = next((found[name] for name in WORDS if isinstance(found.get(name), list)), None)
    vectors = next((array for name in VECTORS if (array := arrays.get(name)) is not None), None)
    if words is None or (vectors is None and "vectors_ngrams" not in found and "vectors_ngrams" not in arrays.apart):
        raise InputError(f"{path}: a {root.name.rpartition('.')[2]} of gensim without the vectors of words")
    words = [str(word) for word in words]
    if vectors is None:
        vectors = _with_ngrams(found, arrays, words, path)
    return _keyed_vectors(words, vectors, _counts(found, arrays, words))


def save(vectors: "KeyedVectors", path: Path) -> None:
    """Write vectors in gensim's format, in one file."""
    vectors.save(str(path), separately=[])


def _keyed_vectors(words: list[str], vectors: NDArray[Any], counts: NDArray[np.int64] | None = None) -> "KeyedVectors":
    from gensim.models import KeyedVectors

    if vectors.ndim != 2 or vectors.dtype.kind != "f" or vectors.dtype.itemsize > 8 or len(vectors) != len(words):
        raise ValueError(f"{len(words):,} words, but vectors of shape {vectors.shape} and type {vectors.dtype}")
    made = KeyedVectors(vectors.shape[1])
    made.index_to_key, made.vectors, made.next_index = words, vectors, len(words)
    made.key_to_index = {word: i for i, word in enumerate(words)}
    if len(made.key_to_index) != len(words):
        raise ValueError("a word occurs twice")
    if counts is not None:
        made.expandos["count"] = counts
    return made


def _counts(found: Mapping[str, Any], arrays: "_Arrays", words: list[str]) -> NDArray[np.int64] | None:
    """Return how often each word occurs in the text: an array by itself, or, before gensim 4, a part of each entry."""
    expandos, entries = found.get("expandos"), found.get("vocab")
    counts: list[Any] | NDArray[Any] | None = None
    if isinstance(expandos, dict) and "count" in expandos:
        counts = arrays.made_of(expandos["count"])
    elif isinstance(entries, dict):
        states = [getattr(entries.get(word), "state", None) for word in words]
        counts = [state.get("count") if isinstance(state, dict) else None for state in states]
    if counts is None or len(counts) != len(words) or not all(isinstance(n, int | np.integer) for n in counts):
        return None
    return np.asarray(counts, dtype=np.int64)


def _with_ngrams(found: Mapping[str, Any], arrays: "_Arrays", words: list[str], path: Path) -> NDArray[Any]:
    """Compute the vectors of the words of FastText, of which gensim stores the parts."""
    from gensim.models.fasttext import FastTextKeyedVectors

    if not found.get("compatible_hash", False):
        raise InputError(f"{path}: FastText of a gensim before 3.8, whose hashes of n-grams are others; save it again")
    own, ngrams = arrays.get("vectors_vocab"), arrays.get("vectors_ngrams")
    bucket, sizes = int(found["bucket"]), (int(found["min_n"]), int(found["max_n"]))
    if own is None or ngrams is None or own.shape[1:] != ngrams.shape[1:] or len(own) != len(words):
        raise ValueError("the vectors of words and n-grams do not fit")
    if len(ngrams) < bucket or not 0 <= sizes[0] <= sizes[1] < 100:
        raise ValueError(f"{len(ngrams):,} vectors of n-grams for {bucket:,} hashes of {sizes} characters")
    made = FastTextKeyedVectors(own.shape[1], *sizes, bucket)
    made.index_to_key, made.vectors_vocab, made.vectors_ngrams = words, own, ngrams
    made.recalc_char_ngram_buckets()
    made.adjust_vectors()
    return np.asarray(made.vectors)


class _Arrays:
    """The arrays among the attributes of an object, wherever they lie."""

    def __init__(self, found: Mapping[str, Any], place: str) -> None:
        self.found, self.place = found, place
        self.apart = [str(name) for name in found.get(APART) or []]

    def get(self, name: str) -> NDArray[Any] | None:
        if name in self.apart:
            return self._from_file(Path(f"{self.place}.{name}.npy"))
        return self.made_of(self.found.get(name))

    def _from_file(self, path: Path) -> NDArray[Any]:
        if not path.is_file():
            raise InputError(f"{self.place}: its vectors are in {path.name}, which is missing; put it beside this file")
        with path.open("rb") as file:
            check_no_pointer(path, file.read(256))
        return np.array(np.load(path, allow_pickle=False, mmap_mode="r"))

    def made_of(self, value: object) -> NDArray[Any] | None:
        """Make an array of what a pickle says of it; None if it says something else, or of Python objects."""
        if not isinstance(value, _Record):
            return None
        if value.name.endswith("._reconstruct") and isinstance(value.state, tuple):
            shape, dtype, fortran, data = value.state[-4:]
        elif value.name.endswith("._frombuffer"):
            data, dtype, shape, order = value.args
            fortran = order == "F"
        else:
            return None
        kind = _dtype(dtype)
        if kind is None or kind.hasobject:
            return None
        if isinstance(data, _Record):  # bytes, as protocol 2 writes them: text and its encoding
            data = data.args[0]
        if isinstance(data, str):
            data = data.encode("latin1")
        return np.array(np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C"))


def _dtype(value: object) -> np.dtype[Any] | None:
    if not isinstance(value, _Record) or value.name != "numpy.dtype" or not re.fullmatch(r"[fiu][1248]", value.args[0]):
        return None
    order = value.state[1] if isinstance(value.state, tuple) else "="
    found: np.dtype[Any] = np.dtype(value.args[0]).newbyteorder(order if order in ("<", ">") else "=")
    return found


class _Record:
    """Stands for an object of any class: what a pickle says of it."""

    name: ClassVar[str]

    def __new__(cls, *args: Any, **_: Any) -> "_Record":
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    args: tuple[Any, ...]
    state: Any

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


class _Unpickler(pickle._Unpickler):  # written in Python: that in C takes memory for what a file only claims
    """Makes records of all objects, so that nothing is imported or called, whatever the file names."""

    def find_class(self, module: str, name: str) -> Any:
        return type(name.rpartition(".")[2], (_Record,), {"name": f"{module}.{name}"})

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"a class by the number {code}")


def _unpickled(path: Path) -> Any:
    with path.open("rb") as file:
        return _Unpickler(file, encoding="latin1").load()
