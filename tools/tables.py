"""Write tables of results as CSV files."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from coupled_adam.files import written_whole


def write_table(path: Path, lines: Iterable[Mapping[str, object]], columns: Sequence[str] | None = None) -> None:
    """Write one line per mapping, whole or not at all; ``columns`` are those of the first one if not given."""
    lines = list(lines)
    with written_whole(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]) if columns is None else columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
