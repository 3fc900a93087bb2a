"""Seconds of the embedding metrics at the size of GPT-2, and of isotropy against the textbook way to compute it; and
milliseconds of what can be followed at every step, against the optimizer's step of the same matrix.

    python benchmarks/embedding_metrics.py [--vocabulary 50304] [--width 768] [--rounds 3] [--live] [--json FILE]

The textbook: numpy.linalg.eig of EᵀE, then Σ_i exp(e_i·c) for one eigenvector c after the other. Both alternate in one
process, in both orders; what is printed are medians, and that both find the same isotropy. --live leaves that out, and
takes turns between drift, health and the steps of fused AdamW and of Coupled Adam, in processor time of one thread.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import harness
import numpy as np
import torch
from torch.optim import AdamW, Optimizer

from coupled_adam import CoupledAdam, geometry, monitor


def textbook_isotropy(embedding: np.ndarray) -> float:
    """min Z / max Z, straight from the definition."""
    _, vectors = np.linalg.eig(embedding.T @ embedding)
    vectors = vectors.real
    vectors *= np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0, keepdims=True), axis=0))
    z = np.array([np.exp(embedding @ vectors[:, i]).sum() for i in range(vectors.shape[1])])
    return float(z.min() / z.max())


def live(vocabulary: int, width: int, rounds: int) -> dict[str, list[float]]:
    """Print what drift and health take, and which share of a step of the same matrix that is."""
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def stepped(make: Callable[[torch.nn.Parameter], Optimizer]) -> tuple[Optimizer, torch.nn.Parameter]:
        weight = torch.nn.Parameter(0.02 * torch.randn(vocabulary, width))
        weight.grad = torch.randn_like(weight)
        return make(weight), weight

    adamw, first = stepped(lambda weight: AdamW([weight], fused=True))
    coupled, second = stepped(lambda weight: CoupledAdam([{"params": [weight], "second_moment": "vocabulary"}]))
    jobs: dict[str, Callable[[], object]] = {
        "step, fused AdamW": adamw.step,
        "step, Coupled Adam": coupled.step,
        "drift, AdamW": lambda: monitor.drift(adamw, first),
        "drift, Coupled Adam": lambda: monitor.drift(coupled, second),
        "health": lambda: monitor.health(first),
        "health with isotropy": lambda: monitor.health(first, isotropy=True),
    }
    for job in jobs.values():
        job()
    seconds = harness.in_turn(jobs, rounds, harness.thread_seconds)
    medians = harness.medians(seconds)
    print(f"{vocabulary:,} × {width}, float32, one thread, median of {rounds}")
    for name, median in medians.items():
        fused, coupled_step = (median / medians[f"step, {step}"] for step in ("fused AdamW", "Coupled Adam"))
        print(
            f"{name:22}{1000 * median:9.2f} ms   ÷ step of fused AdamW {fused:.2f}, of Coupled Adam {coupled_step:.2f}"
        )
    return seconds


def metrics(vocabulary: int, width: int, rounds: int) -> dict[str, list[float]]:
    """Print what the metrics of a matrix take."""
    rng = np.random.default_rng(0)
    # Shifted, and with a falling spectrum, as AdamW leaves an embedding.
    embedding = rng.normal(size=(vocabulary, width)) * np.geomspace(0.3, 0.03, width)
    embedding += 0.05
    counts = (1e9 / (1 + rng.permutation(vocabulary))).astype(np.int64)
    words = {
        word: i
        for i, word in enumerate(sorted({w for b in geometry.published_benchmarks() for p in b.pairs for w in p[:2]}))
    }

    def everything() -> geometry.Measurements:
        benchmarks = geometry.published_benchmarks()
        return geometry.measure(embedding, counts=counts, token_of=words.get, benchmarks=benchmarks)

    found: dict[str, float] = {}
    jobs: dict[str, harness.Step] = {
        "isotropy": lambda: found.update(ours=geometry.isotropy(embedding)),
        "textbook": lambda: found.update(theirs=textbook_isotropy(embedding)),
        "everything": everything,
    }
    seconds = harness.in_turn(jobs, rounds)
    medians = harness.medians(seconds)
    ours, theirs = found["ours"], found["theirs"]
    assert abs(ours - theirs) < 1e-6, (ours, theirs)
    print(f"{vocabulary:,} × {width}, float64, median of {rounds}; isotropy {ours:.6f} both")
    ratio = medians["textbook"] / medians["isotropy"]
    print(f"isotropy            {medians['isotropy']:8.2f} s")
    print(f"isotropy, textbook  {medians['textbook']:8.2f} s   textbook ÷ ours {ratio:.1f}")
    print(f"the whole audit     {medians['everything']:8.2f} s   with five benchmarks in five post-processings")
    return seconds


def main() -> None:
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--vocabulary", type=int, default=50_304)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--live", action="store_true")
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # libraries read it when they are loaded
    arguments = parser.parse_args()
    if arguments.live and not one_thread.items() <= os.environ.items():
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=os.environ | one_thread).returncode)
    with harness.results(arguments) as results:
        measure = live if arguments.live else metrics
        for name, seconds in measure(arguments.vocabulary, arguments.width, arguments.rounds).items():
            results.add(name, seconds)


if __name__ == "__main__":
    main()
