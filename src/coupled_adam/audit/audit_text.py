"""The audit on the terminal: a summary first, the advice last."""

from collections.abc import Sequence
from pathlib import Path

from coupled_adam.audit.advice import SECTION
from coupled_adam.audit.audit_page import audit_rows, grouped_advice
from coupled_adam.audit.models import Audited
from coupled_adam.audit.verdict import Level, ranges
from coupled_adam.terminal import Justify, print_line, print_styled, print_table

#: The color of each level.
COLORS: dict[Level, str] = {"good": "green", "fair": "yellow", "poor": "red", "note": "cyan"}


def print_audit(audited: Sequence[Audited], page: Path | None = None) -> None:
    """Print one line for each matrix, the table, the findings, their ranges once, and what to do.

    Args:
        audited: the matrices.
        page: the page with charts, if one was written.
    """
    for matrix in audited:
        print_styled((matrix.name, "bold"), (f": {matrix.summary}", ""))
    headings: list[tuple[str, Justify]] = [("", "left"), *((matrix.name, "right") for matrix in audited)]
    print_table(headings, [(row.label, *row.runs) for row in audit_rows(audited)])
    for matrix in audited:
        print_styled((matrix.name, "bold"))
        for finding in matrix.findings:
            print_styled(("  ", ""), (finding.level, COLORS[finding.level]), (f"  {finding.text}", ""))
    if told := ranges(finding for matrix in audited for finding in matrix.findings):
        print_styled(("Ranges", "bold"))
        for label, text in told:
            print_styled((f"  {label}: {text}", ""))
    if page is not None:
        print_line(f"Page: {page}")
    print_styled(("What to do", "bold"))
    grouped = grouped_advice(audited)
    for names, advice in grouped:
        about = f"{', '.join(names)}: " if len(audited) > 1 else ""
        print_styled((f"  {about}{advice.text}", ""))
    cases = ", ".join(dict.fromkeys(f"“{advice.case}”" for _, advice in grouped))
    print_styled((f"  More: docs/audit.md, “{SECTION}”: {cases}", ""))
