"""Figures of several models as rows, for the terminal and the pages alike."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coupled_adam.experiments import Published
from coupled_adam.figures import Figure, cell


@dataclass(frozen=True)
class Row:
    """A figure of each model, and what the paper reports for it, ready to print."""

    label: str
    meaning: str
    runs: tuple[str, ...]
    published: tuple[str, ...] = ()


def rows(
    figures: Iterable[Figure], models: Sequence[Mapping[str, float | None]], published: Sequence[Published] = ()
) -> list[Row]:
    """Make one row a figure, one column a model; figures that no model has are left out."""
    return [
        Row(
            figure.label,
            figure.meaning,
            tuple(figure.cell(model.get(figure.name)) for model in models),
            tuple(cell(published_value(result, figure), "{:g}") for result in published),
        )
        for figure in figures
        if any(model.get(figure.name) is not None for model in models)
    ]


def published_value(result: Published, figure: Figure) -> float | None:
    """Return what the paper reports for a figure; None if it does not."""
    value: float | None = getattr(result, figure.published) if figure.published else None
    return value
