"""Word similarity: by hand, and the published benchmarks as the packages carry them."""

import numpy as np
import pytest

from coupled_adam import geometry
from coupled_adam.geometry.word_similarity import parse_benchmark

WORDS = {f"w{i}": i for i in range(12)}


def benchmark(count: int) -> geometry.Benchmark:
    """Pairs of w0 with the others, rated by the cosine that :func:`fan` gives them, plus one that is not covered."""
    pairs = [("w0", f"w{i}", 3 + 2 * float(np.cos(0.1 * i))) for i in range(1, count + 1)]
    return geometry.Benchmark("fan", (*pairs, ("w0", "unknown", 9.0)))


def fan() -> np.ndarray:
    """Row i has the angle 0.1·i and the length 1 + i."""
    angle = 0.1 * np.arange(12)
    return (1 + np.arange(12))[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_ratings_that_are_linear_in_the_cosine_correlate_perfectly() -> None:
    result = geometry.word_similarity(fan(), WORDS.get, benchmark(11))
    assert result.cosine == pytest.approx(100)
    assert result.dot == pytest.approx(
        100
        * np.corrcoef([(1 + i) * np.cos(0.1 * i) for i in range(1, 12)], [np.cos(0.1 * i) for i in range(1, 12)])[0, 1]
    )
    assert (result.covered, result.pairs) == (11, 12)


def test_fewer_than_ten_pairs_give_no_figure() -> None:
    result = geometry.word_similarity(fan(), WORDS.get, benchmark(9))
    assert (result.cosine, result.dot, result.covered) == (None, None, 9)
    assert geometry.word_similarity(fan(), WORDS.get, benchmark(10)).cosine is not None


def test_a_row_of_zeros_is_similar_to_nothing() -> None:
    embedding = fan()
    embedding[3] = 0
    assert geometry.word_similarity(embedding, WORDS.get, benchmark(11)).cosine < 100
    assert geometry.word_similarity(np.zeros((12, 2)), WORDS.get, benchmark(11)).cosine is None


def test_the_mean_is_over_the_benchmarks_that_have_a_figure() -> None:
    def result(cosine: float | None) -> geometry.WordSimilarity:
        return geometry.WordSimilarity("x", cosine, None, 0, 0)

    assert geometry.mean_similarity([result(10.0), result(None), result(30.0)]) == 20.0
    assert geometry.mean_similarity([result(None)]) is None


def test_the_published_benchmarks() -> None:
    benchmarks = {b.name: b for b in geometry.published_benchmarks()}
    originals = {
        "MEN": 3000,
        "RW": 2034,
        "SimLex-999": 999,
        "WordSim-353 similarity": 203,
        "WordSim-353 relatedness": 252,
    }
    assert list(benchmarks) == list(originals)
    for name, count in originals.items():
        assert 0.98 * count <= len(benchmarks[name].pairs) <= count, "the packages' curators removed a few rows"
    assert ("old", "new", 1.58) in benchmarks["SimLex-999"].pairs


def test_a_damaged_line_is_quoted() -> None:
    with pytest.raises(ValueError, match=r"X: not 'word .*'sun\\tmoon'"):
        parse_benchmark("X", "# comment\nword1\tword2\tscore\nsun\tlight\t5.0\nsun\tmoon\n")
