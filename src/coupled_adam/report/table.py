"""The comparison of two optimizers as rows, for the terminal and the page alike."""

from collections.abc import Mapping
from dataclasses import dataclass

from coupled_adam.experiments import Published

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Row:
    """A figure of each run, and what the paper reports for it, ready to print."""

    label: str
    meaning: str
    runs: tuple[str, ...]
    published: tuple[str, ...]


#: Name in the figures, label, what it means, format, and the attribute of a published result, where there is one.
LINES = (
    ("validation_loss", "validation loss", "nats per token on held-out text; lower is better", "{:.2f}", "loss"),
    ("isotropy", "isotropy Iso", "1: no direction is preferred", "{:.3f}", "isotropy"),
    ("mean_norm", "mean norm ‖μ‖", "distance of the mean embedding from the origin", "{:.3f}", None),
    (
        "mean_shift_ratio",
        "mean shift ratio ‖μ‖ʳ",
        "the same over the average norm; 0: centred, 1: all tokens the same",
        "{:.3f}",
        "mean_shift_ratio",
    ),
    ("condition", "condition (%)", "100·smallest/largest singular value; higher is better", "{:.1f}", None),
    ("norm_frequency_pearson", "norm–frequency Pearson", "correlation of ‖e‖ with log frequency", "{:+.2f}", None),
    ("norm_frequency_spearman", "norm–frequency Spearman", "the same by rank", "{:+.2f}", None),
    (
        "word_similarity",
        "word similarity r̄",
        "100·correlation with human ratings, mean of the benchmarks; higher is better",
        "{:.1f}",
        "word_similarity",
    ),
    ("word_similarity_pairs", "word pairs covered", "pairs whose words are both one token", "{:.0f}", None),
)


def comparison(runs: list[Figures], published: list[Published]) -> list[Row]:
    """One row a figure, in the order of the papers."""
    return [
        Row(
            label,
            meaning,
            tuple(_formatted(run.get(name), form) for run in runs),
            tuple(_formatted(getattr(result, attribute) if attribute else None, "{:g}") for result in published),
        )
        for name, label, meaning, form, attribute in LINES
    ]


def _formatted(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
