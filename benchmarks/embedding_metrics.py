"""Seconds of the embedding metrics at the size of GPT-2, and of isotropy against the textbook way to compute it.

    python benchmarks/embedding_metrics.py [--vocabulary 50304] [--width 768] [--rounds 3]

The textbook: numpy.linalg.eig of EᵀE, then Σ_i exp(e_i·c) for one eigenvector c after the other. Both alternate in one
process, in both orders; what is printed are medians, and that both find the same isotropy.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from coupled_adam import geometry


def textbook_isotropy(embedding: np.ndarray) -> float:
    """min Z / max Z, straight from the definition."""
    _, vectors = np.linalg.eig(embedding.T @ embedding)
    vectors = vectors.real
    vectors *= np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0, keepdims=True), axis=0))
    z = np.array([np.exp(embedding @ vectors[:, i]).sum() for i in range(vectors.shape[1])])
    return float(z.min() / z.max())


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and the result."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=50_304)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    # Shifted, and with a falling spectrum, as AdamW leaves an embedding.
    embedding = rng.normal(size=(arguments.vocabulary, arguments.width)) * np.geomspace(0.3, 0.03, arguments.width)
    embedding += 0.05
    counts = (1e9 / (1 + rng.permutation(arguments.vocabulary))).astype(np.int64)
    words = {
        word: i
        for i, word in enumerate(sorted({w for b in geometry.published_benchmarks() for p in b.pairs for w in p[:2]}))
    }

    def everything() -> geometry.Measurements:
        benchmarks = geometry.published_benchmarks()
        return geometry.measure(embedding, counts=counts, token_of=words.get, benchmarks=benchmarks)

    seconds: dict[str, list[float]] = {"isotropy": [], "textbook": [], "everything": []}
    jobs = {
        "isotropy": lambda: geometry.isotropy(embedding),
        "textbook": lambda: textbook_isotropy(embedding),
        "everything": everything,
    }
    found: dict[str, object] = {}
    for turn in range(arguments.rounds):
        for name in list(jobs) if turn % 2 == 0 else reversed(jobs):
            taken, found[name] = timed(jobs[name])
            seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours, theirs = found["isotropy"], found["textbook"]
    assert isinstance(ours, float) and isinstance(theirs, float) and abs(ours - theirs) < 1e-6, (ours, theirs)
    print(
        f"{arguments.vocabulary:,} × {arguments.width}, float64, median of {arguments.rounds}; isotropy {ours:.6f} both"
    )
    ratio = medians["textbook"] / medians["isotropy"]
    print(f"isotropy            {medians['isotropy']:8.2f} s")
    print(f"isotropy, textbook  {medians['textbook']:8.2f} s   textbook ÷ ours {ratio:.1f}")
    print(f"the whole audit     {medians['everything']:8.2f} s   with five benchmarks in five post-processings")


if __name__ == "__main__":
    main()
