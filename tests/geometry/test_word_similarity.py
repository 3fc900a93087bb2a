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
    with pytest.raises(ValueError, match=r"X: expected two words and a rating, got 'sun\\tmoon'"):
        parse_benchmark("X", "# comment\nword1\tword2\tscore\nsun\tlight\t5.0\nsun\tmoon\n")


# The layouts in which the authors of the benchmarks distribute them, three lines of each.
ORIGINALS = {
    "MEN_dataset_natural_form_full": "sun sunlight 50.000000\nautomobile car 50.000000\nriver water 49.000000\n",
    "rw.txt": "squishing\tsquirt\t5.88\t7\t7\t6\nundated\tundatable\t5.83\t10\t9\t5\ncircumvents\tbeat\t5.33\t7\t7\n",
    "SimLex-999.txt": (
        "word1\tword2\tPOS\tSimLex999\tconc(w1)\tconc(w2)\tconcQ\tAssoc(USF)\tSimAssoc333\tSD(SimLex)\n"
        "old\tnew\tA\t1.58\t2.72\t2.81\t2\t7.25\t1\t0.41\nsmart\tintelligent\tA\t9.2\t1.75\t2.46\t1\t7.11\t1\t0.67\n"
    ),
    "wordsim_similarity_goldstandard.txt": "tiger\tcat\t7.35\nplane\tcar\t5.77\n",
    "wordsim_relatedness_goldstandard.txt": "computer\tkeyboard\t7.62\n",
    "readme.txt": "not a benchmark",
}


def test_the_files_as_their_authors_distribute_them(tmp_path) -> None:
    for name, text in ORIGINALS.items():
        (tmp_path / name).write_text(text)
    found = {b.name: b.pairs for b in geometry.read_benchmarks(tmp_path)}
    assert list(found) == [b.name for b in geometry.published_benchmarks()]
    assert found["MEN"][0] == ("sun", "sunlight", 50.0)
    assert found["RW"] == (("squishing", "squirt", 5.88), ("undated", "undatable", 5.83), ("circumvents", "beat", 5.33))
    assert found["SimLex-999"] == (("old", "new", 1.58), ("smart", "intelligent", 9.2))
    assert found["WordSim-353 similarity"][1] == ("plane", "car", 5.77)
    assert found["WordSim-353 relatedness"] == (("computer", "keyboard", 7.62),)


def test_mens_lemma_form_and_commas() -> None:
    assert parse_benchmark("MEN", "sun-n sunlight-n 50.0\nbright-j run-v 9.0\n").pairs == (
        ("sun", "sunlight", 50.0),
        ("bright", "run", 9.0),
    )
    assert parse_benchmark("x", "Word 1,Word 2,Human (mean)\nlove,sex,6.77\nx-n,y,1\n").pairs == (
        ("love", "sex", 6.77),
        ("x-n", "y", 1.0),
    )


def test_a_folder_without_benchmarks_or_with_two_of_one_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"contains no known benchmark; .*MEN"):
        geometry.read_benchmarks(tmp_path)
    for name in ("rw.txt", "rare_words.tsv"):
        (tmp_path / name).write_text(ORIGINALS["rw.txt"])
    with pytest.raises(ValueError, match=r"both rare_words.tsv and rw.txt are RW"):
        geometry.read_benchmarks(tmp_path)
