"""The report over many runs: aggregate.csv and report.html."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupled_adam import experiments
from coupled_adam.errors import InputError
from coupled_adam.figures import FIGURES, Figure, cell, figures
from coupled_adam.files import check_file_replaceable, write_text
from coupled_adam.report import documents, tuned_sections
from coupled_adam.report.aggregate import (
    ADAMW,
    Comparison,
    Evaluated,
    as_csv,
    comparisons,
    groups,
    headings,
    largest,
    read_runs,
    short,
    spread,
    table,
)
from coupled_adam.report.page import check_page, write_page
from coupled_adam.report.paired import PairedDifference, difference_text, holm, p_text
from coupled_adam.report.sections import sections
from coupled_adam.report.sweeps import Sweeps, sweeps
from coupled_adam.report.table import published_value
from coupled_adam.report.tuned import Cell as TunedCell
from coupled_adam.report.tuned import tuned_cells, versus

#: Columns that the table of no other program has side by side.
TABLE_MARK = "Smin/Smax,family,experiment,seed,model"

#: The paper's one-sided t-test below this is called significant there.
SIGNIFICANT = 0.05


#: The figures of the paper's tables; accuracy is left out where no run has it.
COLUMN_NAMES = ("validation_loss", "downstream_accuracy", "isotropy", "mean_shift_ratio", "word_similarity")


@dataclass(frozen=True)
class Cell:
    """A figure ready to print."""

    text: str
    significant: bool = False
    """Whether Coupled Adam is better here by the paper's t-test; of the paper's experiments alone."""


@dataclass(frozen=True)
class Line:
    """A row of the table of comparisons: one optimizer in one setting or in a published one, or what two differ by."""

    model: str
    tokens: str
    method: str
    runs: str
    cells: tuple[Cell, ...]


def report(directories: Sequence[Path], out: Path) -> list[Evaluated]:
    """Write aggregate.csv and report.html to ``out`` for the runs in ``directories``, and return the runs.

    Raises:
        InputError: directories without runs, damaged files, runs of which none has been evaluated, or files of those
            names in ``out`` that were not made by this package.
    """
    check_outputs(out)
    runs = read_runs(directories)
    if not any(run.embeddings or run.validation for run in runs):
        raise InputError(
            f"{directories[0]}: none of its {len(runs)} runs has been evaluated; run `coupled-adam evaluate` first"
        )
    found = groups(runs)
    swept = sweeps(found)
    rows = table(runs)
    tuned, losses = tuned_cells(rows), documents.of_runs(runs)
    elsewhere = {id(group) for each in swept for line in each.lines for group in line.groups}
    at_own_rates = {row["name"] for cell in tuned for row in cell.rows}
    elsewhere |= {id(group) for group in found if group.first.name in at_own_rates}
    pairs = comparisons([group for group in found if id(group) not in elsewhere])
    columns = figures(COLUMN_NAMES)
    if all(run.figures["downstream_accuracy"] is None for run in runs):
        columns = [figure for figure in columns if figure.name != "downstream_accuracy"]
    drawn_sections = sections(found, pairs, swept, tuned, losses)
    write_text(out / "aggregate.csv", as_csv(runs))
    write_page(
        out / "report.html",
        __name__,
        {f"{i}-{j}": chart for i, section in enumerate(drawn_sections) for j, chart in enumerate(section.charts)},
        headline=_headline(pairs, swept, tuned),
        scale=_scale(runs),
        columns=columns,
        lines=comparison_lines(pairs, columns),
        papers=any(pair.of_the_paper for pair in pairs),
        published=published_lines(columns),
        sections=drawn_sections,
        chart_ids=[[f"{i}-{j}" for j in range(len(section.charts))] for i, section in enumerate(drawn_sections)],
        rows=[[_number(row[column]) for column in headings()] for row in rows],
        headings=headings(),
        downstream=_downstream(runs),
        similarity=_similarity(pairs),
        missing=[run.name for run in runs if not (run.embeddings and run.validation) and not run.diverged],
        diverged=[run.name for run in runs if run.diverged],
    )
    return runs


def check_outputs(out: Path) -> None:
    """Raise InputError unless aggregate.csv and report.html may be written to ``out``."""
    check_file_replaceable(out / "aggregate.csv", TABLE_MARK)
    check_page(out / "report.html")


def comparison_lines(pairs: Sequence[Comparison], columns: Sequence[Figure]) -> list[Line]:
    """Make three rows a setting: mean ± standard deviation over seeds of each, and the paired difference."""
    differences = [[pair.difference(figure.name) for figure in columns] for pair in pairs]
    tests = holm([found.p_value if found else None for each in differences for found in each])
    adjusted = iter(tests)
    lines = []
    for pair, found in zip(pairs, differences, strict=True):
        for group in (pair.adamw, pair.coupled):
            cells = []
            for figure in columns:
                p = pair.papers_p_value(figure) if group is pair.coupled and pair.of_the_paper else None
                cells.append(Cell(spread(group.moments(figure.name), figure.form), p is not None and p < SIGNIFICANT))
            counted = group.moments("validation_loss")
            runs = str(counted.count if counted else 0)
            lines.append(Line(group.first.model, group.first.length, group.first.method, runs, tuple(cells)))
        told = [_difference(d, next(adjusted), figure) for d, figure in zip(found, columns, strict=True)]
        count = max((each.count for each in found if each), default=0)
        last = lines[-1]
        lines.append(
            Line(last.model, last.tokens, "difference", f"{count} pairs" if count > 1 else "1 pair", tuple(told))
        )
    return lines


def _difference(found: PairedDifference | None, adjusted: float | None, figure: Figure) -> Cell:
    p = "" if adjusted is None else f", p {p_text(adjusted)}"
    return Cell(difference_text(found, figure.form[2:-1]) + p)


def published_lines(columns: Sequence[Figure]) -> list[Line]:
    """Put the paper's results in the same layout."""
    return [
        Line(row.model, row.tokens, row.method, "", tuple(Cell(cell(published_value(row, f), "{:g}")) for f in columns))
        for row in experiments.published()
    ]


def _number(value: str | float | None) -> str:
    return value if isinstance(value, str) else cell(value)


def _headline(pairs: Sequence[Comparison], swept: Sequence[Sweeps], tuned: Sequence[TunedCell]) -> str:
    told = tuned_sections.headline(versus(tuned))
    if pairs:
        return f"{told} {_headline_of_pairs(pairs)}".strip()
    if told:
        return told
    if swept:
        names = dict.fromkeys(line.first.method for each in swept for line in each.lines)
        return f"How much the loss depends on the learning rate, and how the logits behave: {', '.join(names)}."
    return "These runs contain no pair of AdamW and Coupled Adam that differs in nothing else."


def _headline_of_pairs(pairs: Sequence[Comparison]) -> str:
    better = [pair for pair in pairs if all(_improves(pair, f) for f in figures(("mean_shift_ratio", "isotropy")))]
    chosen = largest(pairs)
    a, v = (group.moments("mean_shift_ratio") for group in (chosen.adamw, chosen.coupled))
    x, y = (group.moments("validation_loss") for group in (chosen.adamw, chosen.coupled))
    count = f"{len(better)} of {len(pairs)} settings" if len(pairs) > 1 else "the one setting compared"
    not_all = "" if better or len(pairs) > 1 else "not "
    where = "In the largest one" if len(pairs) > 1 else "There"
    text = f"Coupled Adam leaves the embeddings {not_all}both better centered and more isotropic than AdamW in {count}."
    if a and v:
        text += f" {where} ({chosen.setting}) the mean shift ratio is {v.mean:.3f} instead of {a.mean:.3f}"
        text += f" at a test loss of {y.mean:.3f} instead of {x.mean:.3f}." if x and y else "."
    return text


def _improves(pair: Comparison, figure: Figure) -> bool:
    a, v = pair.adamw.moments(figure.name), pair.coupled.moments(figure.name)
    return a is not None and v is not None and (v.mean < a.mean if figure.better == "lower" else v.mean > a.mean)


def _scale(runs: Sequence[Evaluated]) -> str:
    sizes, tokens = [run.parameters for run in runs], [run.tokens for run in runs]
    ranges = [" to ".join(dict.fromkeys(short(f(values)) for f in (min, max))) for values in (sizes, tokens)]
    return f"{ranges[0]} parameters on {ranges[1]} tokens"


def _downstream(runs: Sequence[Evaluated]) -> dict[str, Any] | None:
    """Accuracy by task; None if no run was evaluated so."""
    evaluated = [run for run in runs if run.downstream.get("tasks")]
    names = sorted({name for run in evaluated for name in run.downstream["tasks"]})
    if not names:
        return None
    rows = [
        [run.name, *(_number(run.downstream["tasks"].get(name, {}).get("acc")) for name in names)] for run in evaluated
    ]
    return {"tasks": names, "rows": rows}


def _similarity(pairs: Sequence[Comparison]) -> dict[str, Any] | None:
    """Word similarity of the largest pair, by benchmark and post-processing."""
    if not pairs:
        return None
    pair = largest(pairs)
    both = {g.first.method: g.first.embeddings.get("word_similarity", {}) for g in (pair.adamw, pair.coupled)}
    if not all(both.values()):
        return None
    form = FIGURES["word_similarity"].form
    rows = []
    for method, variants in both.items():
        for variant, benchmarks in variants.items():
            for kind in ("cosine", "dot"):
                values = [b[kind] for b in benchmarks]
                known = [value for value in values if value is not None]
                mean = sum(known) / len(known) if known else None
                rows.append(
                    [method, variant.replace("_", " "), kind, *(cell(value, form) for value in (mean, *values))]
                )
    return {
        "setting": pair.setting,
        "names": [f"{b['benchmark']} ({b['covered']:,} of {b['pairs']:,})" for b in both[ADAMW]["original"]],
        "rows": rows,
    }
