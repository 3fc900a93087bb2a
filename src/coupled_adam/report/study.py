"""What the study of this project found of AdamW and Coupled Adam, each at its best learning rate of the embedding.

``study.json`` is made from docs/results/study.csv by tools/evidence.py.
"""

from importlib.resources import files

from typing_extensions import TypedDict

from coupled_adam.files import validated


class Study(TypedDict):
    """A table, ready to print, and what it says in a sentence."""

    headings: list[str]
    """Of the columns; the first two are text, the others numbers."""
    rows: list[list[str]]
    sentence: str


def read_study() -> Study:
    """Read the table that comes with the package."""
    return validated("study.json", files("coupled_adam.report").joinpath("study.json").read_bytes(), Study)
