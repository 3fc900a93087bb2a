"""The audit of one or several models as a table and as a page."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from coupled_adam.evaluation.auditing import Audited
from coupled_adam.evaluation.embeddings import audit_figures
from coupled_adam.report import charts
from coupled_adam.report.page import write_page
from coupled_adam.report.sections import Chart
from coupled_adam.report.table import Row

#: Figure, label, what it means, format.
LINES = (
    ("tokens", "tokens", "rows of the matrix", "{:,.0f}"),
    ("width", "width", "columns of the matrix", "{:,.0f}"),
    ("mean_shift_ratio", "mean shift ratio ‖μ‖ʳ", "0: centred, 1: all tokens the same", "{:.3f}"),
    ("mean_norm", "mean norm ‖μ‖", "distance of the mean embedding from the origin", "{:.3g}"),
    ("average_norm", "average norm", "of an embedding", "{:.3g}"),
    ("isotropy", "isotropy Iso", "1: no direction is preferred", "{:.3f}"),
    ("isotropy_centered", "isotropy, centred", "of the embeddings less their mean", "{:.3f}"),
    ("isotropy_post_processed", "isotropy, All-but-the-Top", "also without the first principal components", "{:.3f}"),
    ("condition", "condition (%)", "100·smallest/largest singular value; higher is better", "{:.2f}"),
    (
        "logit_bound_ratio",
        "logit bound ratio",
        "widest e·μ after centring over before; below 1: centring helps",
        "{:.2f}",
    ),
    ("zero_rows", "rows of zeros", "unused tokens, as a rule", "{:,.0f}"),
    ("word_similarity", "word similarity r̄", "100·correlation with human ratings, by cosine", "{:.1f}"),
    ("word_similarity_dot", "word similarity, dot", "the same by dot product", "{:.1f}"),
    ("word_similarity_pairs", "word pairs covered", "pairs whose words are both one token", "{:,.0f}"),
    ("norm_frequency_spearman", "norm–frequency Spearman", "correlation by rank of ‖e‖ with frequency", "{:+.2f}"),
    ("projection_frequency_spearman", "projection–frequency Spearman", "the same of e·μ", "{:+.2f}"),
)


def rows(audited: Sequence[Audited]) -> list[Row]:
    """One row a figure, one column a matrix; figures that none of them has are left out."""
    figures = [audit_figures(matrix.audit) for matrix in audited]
    return [
        Row(label, meaning, tuple("–" if f[name] is None else form.format(f[name]) for f in figures), ())
        for name, label, meaning, form in LINES
        if any(f[name] is not None for f in figures)
    ]


def write_audit_page(path: Path, audited: Sequence[Audited]) -> None:
    """Write the page: figures, verdicts and charts of all matrices; it opens offline."""
    samples = {matrix.name: matrix.sample for matrix in audited}
    counted = {name: sample for name, sample in samples.items() if sample.count}
    drawn = [
        Chart(
            charts.token_maps({name: sample}),
            f"{name}: every dot is a token (hover to read it), the red cross the origin. Across: along the "
            "mean embedding. Up: along the widest direction at right angles to it.",
        )
        for name, sample in samples.items()
    ]
    spectra = [(m.name, _spectrum(m)) for m in audited]
    figure = charts.curves("Spectrum", spectra, x="rank of the singular value", log_y=True, markers=False)
    drawn.append(
        Chart(figure, "Singular values over the largest: one that towers above the rest is a dominating direction.")
    )
    if counted:
        figure = charts.token_scatter("Norm ‖e‖ against frequency", counted, "norm")
        drawn.append(Chart(figure, "A cloud that rises or falls: the length of an embedding depends on its frequency."))
    write_page(
        path,
        "audit",
        {str(i): chart.figure for i, chart in enumerate(drawn)},
        names=list(samples),
        rows=rows(audited),
        verdicts=[(matrix.name, matrix.audit.findings) for matrix in audited],
        drawn=drawn,
        version=version("coupled-adam"),
    )


def _spectrum(matrix: Audited) -> list[tuple[float, ...]]:
    """The singular values over the largest, by rank, without zeros: they are drawn on a logarithmic scale."""
    values = matrix.audit.singular_values
    return [(i + 1, float(value / values[0])) for i, value in enumerate(values) if value > 0]
