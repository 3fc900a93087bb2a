"""The block that rests on audited.csv: models that come as packages."""

import re

from evidence_results import Results, block, markdown

from coupled_adam.figures import cell
from coupled_adam.report.tuned import number, text

#: Headings, and the column and format of each.
SHOWN = {
    "mean shift ratio": ("mean_shift_ratio", "{:.3f}"),
    "mean cosine": ("mean_cosine", "{:z.3f}"),
    "isotropy": ("isotropy", "{:.3f}"),
    "isotropy, centered": ("isotropy_centered", "{:.3f}"),
    "inverse condition (%)": ("inverse_condition", "{:.2f}"),
    "norm–frequency Spearman": ("norm_frequency_spearman", "{:+.2f}"),
    "word similarity": ("word_similarity", "{:.1f}"),
    "… centered": ("word_similarity_centered", "{:.1f}"),
}

#: What a matrix is, by its name in an audit.
MATRICES = {"tied": "tied", "input": "input", "output": "output", "embedding": "–"}


@block("models")
def models(results: Results) -> str:
    rows = []
    for row in results.rows("audited.csv"):
        size = " × ".join(f"{number(row, column):,.0f}" for column in ("tokens", "hidden_size"))
        shown = [cell(number(row, column), form) for column, form in SHOWN.values()]
        # The numbers and causes of the summary stand in the columns.
        verdict = re.sub(r" \([^)]*\)| off the origin|[;:.] .*|\.$", "", text(row, "summary"))
        matrix = MATRICES[text(row, "matrix")]
        rows.append([text(row, "model"), text(row, "source"), verdict, matrix, size, *shown])
    return markdown(["model", "package", "verdict", "matrix", "rows × columns", *SHOWN], rows, left=4)
