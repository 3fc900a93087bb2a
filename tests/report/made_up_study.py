"""Rows of a study in which every arm has a best factor that is known: nothing is trained."""

from collections.abc import Iterable, Mapping

import numpy as np

from coupled_adam.report.documents import DocumentLosses
from coupled_adam.report.tuned import Row

#: By arm: the lowest loss, and the factor where it lies.
TRUTH: Mapping[str, tuple[float, float]] = {"adamw": (5.7, 30.0), "coupled": (5.8, 10.0), "token": (5.75, 100.0)}
FACTORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def loss_at(arm: str, factor: float) -> float:
    lowest, best = TRUTH[arm]
    return lowest + 0.3 * float(np.log10(factor / best)) ** 2


def row(tying: str, arm: str, factor: float, seed: int, **values: str | float | None) -> dict[str, str | float | None]:
    """A row of the grid mini-what-…; the seed is worth a hundredth."""
    loss = loss_at(arm, factor) + 0.01 * seed + 0.0005 * seed * list(TRUTH).index(arm)
    experiment = f"mini-what-{tying}-{arm}-x{factor:g}"
    made: dict[str, str | float | None] = {
        "name": f"{experiment}-s{seed}",
        "experiment": experiment,
        "seed": seed,
        "tied": str(tying == "tied").lower(),
        "parameters": 631232,
        "tokens": 499712,
        "batch_tokens": 1024,
        "vocab_size": 8192,
        "lr": 0.003,
        "lr_factor": factor,
        "beta2": 0.95,
        "loss_selection": loss - 0.05,
        "loss_report": loss,
        "isotropy": 1 / (1 + factor / 30),
        "ratio norm": 0.7 if arm == "adamw" else 0.02,
        "eb_cos_sim": 3 * float(np.log10(factor)),
        "word_similarity_centered": 1 + 3 * float(np.log10(factor)),
        "word_similarity_post_processed": 2 + 3 * float(np.log10(factor)),
        "step_rms": 0.001 * factor,
        "kappa_rows": 0.6,
        "kappa_text": 0.13,
        "diverged": "false",
    }
    made |= {f"loss_decile_{i + 1}": 10.0 - i + (loss - 5.7) for i in range(10)}
    return made | values


def study(seeds: Iterable[int] = (1, 2, 3)) -> list[Row]:
    """The first seed looks for the best factor, the others run there; tied and untied."""
    first, *others = seeds
    rows = [row(tying, arm, factor, first) for tying in ("tied", "untied") for arm in TRUTH for factor in FACTORS]
    best = [(tying, arm, TRUTH[arm][1]) for tying in ("tied", "untied") for arm in TRUTH]
    return rows + [row(*each, seed) for each in best for seed in others]


def documents(rows: Iterable[Row], count: int = 40) -> dict[str, DocumentLosses]:
    """Losses by document whose mean is that of the row."""
    rng = np.random.default_rng(0)
    tokens, shape = rng.integers(20, 200, count), rng.normal(0, 0.5, count)
    shape -= tokens @ shape / tokens.sum()
    return {
        str(each["name"]): DocumentLosses("made-up", tokens, float(each["loss_report"] or 0.0) + shape) for each in rows
    }
