"""What the demo shows of study.csv: src/coupled_adam/report/study.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from evidence_results import NotYet, Results
from evidence_study import HEADLINE, headline_cells, headline_rows

from coupled_adam.report.paired import PairedDifference
from coupled_adam.report.tuned import versus

FILE = Path("src/coupled_adam/report/study.json")


def study_json(results: Results) -> str:
    """Make the content of the file. Raises NotYet if the runs are not there."""
    content = {"headings": HEADLINE, "rows": headline_rows(results), "sentence": sentence(results)}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def sentence(results: Results) -> str:
    """Say how the losses of the two compare, at one rate for all parameters and at the best of each."""
    found = versus(headline_cells(results))
    at_one = [each.at_one_rate for each in found if each.at_one_rate]
    at_best = [each.coupled.difference for each in found if each.coupled.difference]
    if not at_best:
        raise NotYet("study.csv has no pairs of AdamW and Coupled Adam")
    told = [f"{compared(at_one)} at one learning rate for all parameters"] if at_one else []
    told += [f"{compared(at_best)} with the best learning rate of the embedding for each"]
    return f"In our study the loss with Coupled Adam, compared with AdamW, is {', and '.join(told)}."


def compared(differences: Sequence[PairedDifference]) -> str:
    """Put differences, Coupled Adam's loss minus AdamW's, into words: the range, and how many are not significant."""
    low, high = min(each.mean for each in differences), max(each.mean for each in differences)
    if low < 0 < high:
        told = f"from {-low:.3f} lower to {high:.3f} higher"
    else:
        sizes = sorted({f"{abs(mean):.3f}" for mean in (low, high)})
        told = f"{' to '.join(sizes)} {'lower' if high <= 0 else 'higher'}"
    settled = [each.interval is not None and each.interval.low * each.interval.high > 0 for each in differences]
    if all(settled):
        return told
    return f"{told} (not significant in {settled.count(False)} of {len(settled)})"
