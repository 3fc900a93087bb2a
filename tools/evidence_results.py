"""The files of docs/results, and the registry of what README and docs say of them.

A block whose runs are not in the files yet raises :class:`NotYet`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

from coupled_adam.report.documents import DocumentLosses, read_documents
from coupled_adam.report.tuned import Cell, Row, cells, read_rows


class NotYet(LookupError):
    """The runs that a block needs are not in the files."""


class Results:
    """The files of docs/results."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def rows(self, name: str) -> list[Row]:
        """Read a table. Raises NotYet if the file is not there."""
        path = self.directory / name
        if not path.exists():
            raise NotYet(f"{path.name} is not there")
        return read_rows(path)

    @cached_property
    def cells(self) -> list[Cell]:
        """What the study compares, in the order of its grids."""
        return cells(self.rows("study.csv"))

    @cached_property
    def documents(self) -> dict[str, DocumentLosses]:
        """Losses by document; empty if they are not there."""
        path = self.directory / "study-documents.csv"
        return read_documents(path) if path.exists() else {}

    def tuned(self, grid: str, *place: str) -> list[Cell]:
        """Return the cells of a grid in which a rate was chosen, or those at a place. Raises NotYet without any."""
        found = [
            each
            for each in self.cells
            if each.grid == grid and each.tuned and (not place or tuple(each.place.values()) == place)
        ]
        if not found:
            raise NotYet(f"study.csv has no tuned runs of {grid} {' '.join(place)}".rstrip())
        return found


Block = Callable[[Results], str]

BLOCKS: dict[str, Block] = {}


def block(name: str) -> Callable[[Block], Block]:
    """Register a block."""

    def registered(made: Block) -> Block:
        assert name not in BLOCKS, name
        BLOCKS[name] = made
        return made

    return registered


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Format a table; its first ``left`` columns are flush left, the others right. Raises NotYet without rows."""
    escaped = [[value.replace("|", "\\|") for value in row] for row in rows]
    if not escaped:
        raise NotYet("no runs for the table")
    lines = [[value.replace("|", "\\|") for value in headings], ["---"] * left + ["---:"] * (len(headings) - left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (*lines, *escaped))
