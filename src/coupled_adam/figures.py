"""The figures that the project measures, by name: what to call them, how to print them, and which way is better.

The names are those in metrics.jsonl, in the JSON files of an evaluation and in the trackers. Tables, pages, model cards
and the command line take their words and formats from here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Figures = dict[str, float | None]
"""Metrics by name; None where one is not defined or was not measured."""

#: What stands in a table where there is no figure.
MISSING = "–"


@dataclass(frozen=True)
class Figure:
    """A figure as people read it."""

    name: str
    label: str
    meaning: str
    form: str
    better: Literal["lower", "higher"] | None = None
    """Which way is better; None for figures that are neither."""
    unit: str | None = None
    """What the axis of a chart is called: the unit, or how the metric is computed; None for the label."""
    heading: str | None = None
    """The heading of a narrow column, if the label is too long for it."""
    published: str | None = None
    """The attribute of a published result that holds the same figure."""

    @property
    def title(self) -> str:
        """Title of a chart."""
        return self.label[0].upper() + self.label[1:]

    @property
    def axis(self) -> str:
        """Title of an axis."""
        return self.unit or self.label

    @property
    def column(self) -> str:
        """Heading of a column."""
        return self.heading or self.label

    def cell(self, value: float | None) -> str:
        """Format a value for a table."""
        return cell(value, self.form)


def cell(value: float | None, form: str = "{:.4g}") -> str:
    """Format a value, or a dash if there is none."""
    return MISSING if value is None else form.format(value)


FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure("tokens", "rows", "tokens, or whatever the vectors stand for", "{:,.0f}"),
        Figure("hidden_size", "columns", "hidden size: numbers per row", "{:,.0f}"),
        Figure("loss", "training loss", "nats per token of the batch", "{:.3f}", "lower"),
        Figure(
            "validation_loss",
            "validation loss",
            "nats per token on held-out text; lower is better",
            "{:.3f}",
            "lower",
            unit="nats per token",
            heading="test loss",
            published="loss",
        ),
        Figure("logit_mean", "mean logit", "mean over the vocabulary, then over held-out tokens", "{:.3g}"),
        Figure(
            "logit_std", "spread of the logits", "standard deviation over the vocabulary, mean over tokens", "{:.3g}"
        ),
        Figure(
            "logit_max",
            "largest logit",
            "largest absolute logit per position, mean over held-out tokens",
            "{:.3g}",
            unit="|logit|",
            heading="max |logit|",
        ),
        Figure(
            "log_z_squared",
            "mean (log Z)²",
            "mean square of the logarithm of the softmax's denominator over held-out tokens; what z-loss penalizes",
            "{:.3g}",
        ),
        Figure("perplexity", "perplexity", "exp of the validation loss", "{:.2f}", "lower"),
        Figure(
            "downstream_accuracy",
            "downstream accuracy",
            "mean accuracy of the paper's seven tasks",
            "{:.3f}",
            "higher",
            published="downstream_accuracy",
        ),
        Figure(
            "mean_shift_ratio",
            "mean shift ratio ‖μ‖ʳ",
            "‖μ‖ over the mean norm of an embedding; 0: centered, 1: all tokens the same",
            "{:.3f}",
            "lower",
            unit="‖μ‖ / mean ‖e‖",
            heading="‖μ‖ʳ",
            published="mean_shift_ratio",
        ),
        Figure(
            "norm_of_mean",
            "norm of the mean ‖μ‖",
            "distance of the mean embedding from the origin",
            "{:.3g}",
            unit="‖μ‖",
            heading="‖μ‖",
        ),
        Figure(
            "drift_second_moments",
            "drift: uneven second moments",
            "how far step sizes that differ between tokens have moved the mean along μ; coupling removes this",
            "{:+.3g}",
        ),
        Figure(
            "drift_gradients",
            "drift: gradient sum",
            "how far gradients that do not sum to zero over the vocabulary have moved the mean along μ",
            "{:+.3g}",
        ),
        Figure("drift_decay", "drift: weight decay", "how far weight decay has moved the mean along μ", "{:+.3g}"),
        Figure(
            "mean_cosine",
            "mean cosine",
            "mean cosine of two different rows; 0: directions spread evenly, 1: all the same",
            "{:z.3f}",
            "lower",
        ),
        Figure("mean_of_norms", "mean of the norms", "mean length of an embedding", "{:.3g}"),
        Figure(
            "isotropy",
            "isotropy Iso",
            "1 = isotropic: no direction is preferred",
            "{:.3f}",
            "higher",
            unit="Iso",
            heading="Iso",
            published="isotropy",
        ),
        Figure(
            "isotropy_centered",
            "isotropy, centered",
            "isotropy of the embeddings minus their mean",
            "{:.3f}",
            "higher",
        ),
        Figure(
            "isotropy_post_processed",
            "isotropy, All-but-the-Top",
            "isotropy of the embeddings without their mean and their first principal components",
            "{:.3f}",
            "higher",
        ),
        Figure(
            "inverse_condition",
            "inverse condition (%)",
            "100·smallest/largest singular value; higher is better",
            "{:.2f}",
            "higher",
        ),
        Figure(
            "principal_share",
            "principal share",
            "share of the largest principal direction in the variance around the mean",
            "{:.3f}",
            "lower",
        ),
        Figure(
            "logit_bound_ratio",
            "logit bound ratio",
            "largest |e·μ| after centering, relative to before; below 1: centering narrows the range of the logits",
            "{:.2f}",
        ),
        Figure("zero_rows", "all-zero rows", "usually unused tokens", "{:,.0f}"),
        Figure("norm_frequency_pearson", "norm–frequency Pearson", "correlation of ‖e‖ with log frequency", "{:+.2f}"),
        Figure(
            "norm_frequency_spearman",
            "norm–frequency Spearman",
            "rank correlation of ‖e‖ with the token's frequency",
            "{:+.2f}",
        ),
        Figure(
            "projection_frequency_pearson",
            "projection–frequency Pearson",
            "correlation of e·μ with log frequency",
            "{:+.2f}",
        ),
        Figure(
            "projection_frequency_spearman",
            "projection–frequency Spearman",
            "rank correlation of e·μ with the token's frequency",
            "{:+.2f}",
        ),
        Figure(
            "second_moment_frequency_fit",
            "second moment–frequency R²",
            "fit of Adam's second moment by the token's frequency",
            "{:.2f}",
        ),
        Figure(
            "word_similarity",
            "word similarity r̄",
            "100·correlation of the cosine with human ratings, mean of the benchmarks; higher is better",
            "{:.1f}",
            "higher",
            unit="100·correlation",
            heading="r̄",
            published="word_similarity",
        ),
        Figure(
            "word_similarity_dot",
            "word similarity, dot",
            "100·correlation of the dot product with human ratings, mean of the benchmarks; higher is better",
            "{:.1f}",
            "higher",
        ),
        Figure(
            "word_similarity_pairs",
            "word pairs covered",
            "benchmark pairs in which both words are single tokens",
            "{:,.0f}",
        ),
    )
}


def figures(names: Iterable[str]) -> list[Figure]:
    """Look up figures by name."""
    return [FIGURES[name] for name in names]
