"""Write docs/results/study.csv and study-documents.csv from the runs of the study.

    coupled-adam reproduce mini --only words --only steps --out runs/mini
    python tools/collect_study.py runs/mini

Finished runs in the directories take the place of rows of the same name; the other rows stay. Then
`python tools/evidence.py` writes what the pages say of them. Losses by document are kept of experiments with several
seeds: the others only look for a learning rate.
"""

import argparse
from collections import Counter
from pathlib import Path

from tables import write_table

from coupled_adam.files import write_text
from coupled_adam.report import aggregate, documents
from coupled_adam.report.tuned import read_rows, text

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def collect(directories: list[Path], results: Path) -> None:
    """Put the runs in ``directories`` into the two files in ``results``."""
    rows, losses = {}, {}
    if (results / "study.csv").exists():
        rows = {text(row, "name"): row for row in read_rows(results / "study.csv")}
        losses = documents.read_documents(results / "study-documents.csv")
    runs = [run for run in aggregate.read_runs(directories) if run.frequency or run.diverged]
    rows |= {text(row, "name"): row for row in aggregate.table(runs)}
    losses |= documents.of_runs(runs)
    seeds = Counter(text(row, "experiment") for row in rows.values())
    kept = {name for name, row in rows.items() if seeds[text(row, "experiment")] > 1}
    ordered = sorted(rows.values(), key=lambda row: (text(row, "vocab_size") != "8192", text(row, "name")))
    write_table(results / "study.csv", ordered, aggregate.headings())
    write_text(
        results / "study-documents.csv", documents.formatted({n: losses[n] for n in sorted(kept & losses.keys())})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="runs, or directories of runs")
    collect(parser.parse_args().directories, RESULTS)


if __name__ == "__main__":
    main()
