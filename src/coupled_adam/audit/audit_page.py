"""The audit of one or several models as a table and as a page."""

from collections.abc import Sequence
from pathlib import Path

from coupled_adam.audit.advice import SECTION, Advice
from coupled_adam.audit.models import Audited
from coupled_adam.audit.verdict import ranges
from coupled_adam.evaluation.embedding_figures import figures_of
from coupled_adam.figures import figures
from coupled_adam.report.table import Row, rows

#: What the audit shows, in its order.
SHOWN = (
    "tokens",
    "hidden_size",
    "mean_shift_ratio",
    "norm_of_mean",
    "mean_of_norms",
    "mean_cosine",
    "isotropy",
    "isotropy_centered",
    "isotropy_post_processed",
    "inverse_condition",
    "logit_bound_ratio",
    "zero_rows",
    "word_similarity",
    "word_similarity_dot",
    "word_similarity_pairs",
    "norm_frequency_spearman",
    "projection_frequency_spearman",
)


def audit_rows(audited: Sequence[Audited]) -> list[Row]:
    """Make one row per metric, one column per matrix."""
    return rows(figures(SHOWN), [figures_of(matrix.measured) for matrix in audited])


def grouped_advice(audited: Sequence[Audited]) -> list[tuple[list[str], Advice]]:
    """Return each advice once, with the names of the matrices that it is for."""
    named: dict[Advice, list[str]] = {}
    for matrix in audited:
        named.setdefault(matrix.advice, []).append(matrix.name)
    return [(names, each) for each, names in named.items()]


def write_audit_page(path: Path, audited: Sequence[Audited]) -> None:
    """Write the page: metrics, verdicts and charts of all matrices; it opens offline."""
    from coupled_adam.report import charts  # with plotly, which the audit on the terminal does not need
    from coupled_adam.report.page import write_page

    samples = {matrix.name: matrix.sample for matrix in audited}
    counted = {name: sample for name, sample in samples.items() if sample.count}
    drawn = charts.token_maps(samples)
    drawn.append(charts.spectrum({matrix.name: matrix.measured.singular_values.tolist() for matrix in audited}))
    if counted:
        drawn.append(charts.norm_against_frequency(counted))
    write_page(
        path,
        __name__,
        {str(i): chart for i, chart in enumerate(drawn)},
        names=list(samples),
        rows=audit_rows(audited),
        audited=audited,
        ranges=ranges(finding for matrix in audited for finding in matrix.findings),
        map_caption=charts.MAP_CAPTION,
        grouped=grouped_advice(audited),
        section=SECTION,
    )
