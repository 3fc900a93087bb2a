"""Comparisons in which the learning rate of the embedding is chosen for each method: from rows of aggregate.csv alone.

They are grids of experiments (``coupled_adam.experiments``) with an axis ``factor`` along which that rate is tuned,
and an axis ``arm`` of the methods; the other axes make cells, within which methods are compared. A factor is chosen
by the loss on one half of the held-out text (``loss_selection``), and all losses that are compared are those of the
other half (``loss_report``).
"""

import csv
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from coupled_adam import experiments
from coupled_adam.errors import InputError
from coupled_adam.report.documents import DocumentLosses, interval_over_documents
from coupled_adam.report.paired import Interval, PairedDifference, holm, mean_interval, paired_difference

#: The axes of a grid that say along what is tuned, and what is compared.
FACTOR, ARM = "factor", "arm"

#: What the arm that others are compared with may be called, and that of Coupled Adam: a second moment of each element,
#: and one that is shared over the vocabulary.
REFERENCES, SHARED = ("adamw", "element"), ("coupled", "hidden")

#: A row of the table: text as read from CSV, or values as made from runs.
Row = Mapping[str, str | float | None]

#: What the parts of an arm's name are called.
PART_LABELS = {
    "adamw": "AdamW",
    "element": "AdamW",
    "coupled": "Coupled Adam",
    "hidden": "Coupled Adam",
    "token": "v per token (V,1)",
    "scalar": "one v (1,1)",
    "sgd": "SGD",
    "center": "center",
    "zero-sum": "zero-sum step",
    "amsgrad": "AMSGrad",
    "bf16-head": "bfloat16 head",
}
#: And those of them that end in a number.
NUMBERED_LABELS = {"alpha-": "tempered by frequency, α = ", "factored-": "tempered, α = ", "beta2-": "β2 = "}
_PARTS = re.compile("|".join([*PART_LABELS, *(rf"{part}[\d.]+" for part in NUMBERED_LABELS)]))


def read_rows(path: Path) -> list[Row]:
    """Read a table as ``aggregate.as_csv`` writes it."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(row: Row, column: str) -> float | None:
    """Return a figure of a row; None if its column is missing or empty, or it is not finite.

    Raises:
        InputError: the cell holds something else.
    """
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        found = float(value)
    except ValueError:
        raise InputError(f"{row.get('name')}, column {column}: {value!r} is not a number") from None
    return found if math.isfinite(found) else None


def text(row: Row, column: str) -> str:
    """Return a cell as text; empty if its column is missing."""
    value = row.get(column)
    return "" if value is None else str(value)


def seed_of(row: Row) -> int:
    """Return the seed of a run. Raises InputError if the row has none."""
    seed = number(row, "seed")
    if seed is None:
        raise InputError(f"{row.get('name')}: the row has no seed")
    return int(seed)


def _numbered(part: str) -> str:
    kind, _, value = part.rpartition("-")
    return NUMBERED_LABELS[f"{kind}-"] + value


def label_of(arm: str) -> str:
    """Return what people call an arm, by the name it has in those of experiments."""
    parts = _PARTS.findall(arm)
    if "-".join(parts) != arm:
        return arm
    words = [PART_LABELS.get(part) or _numbered(part) for part in parts]
    named = words[0]
    for part, word in zip(parts[1:], words[1:], strict=True):
        named += f" + {word}" if part == "center" else f", {word}"
    return named


@dataclass(frozen=True)
class Choice:
    """The factor that is best for an arm."""

    factor: float
    losses: Mapping[float, float]
    """By factor that was tried, ascending: the loss that it was chosen by; infinite where a run diverged."""
    seeds: tuple[int, ...]
    """Those whose mean chose: the seeds that were run at every factor tried."""

    @property
    def at_end(self) -> bool:
        """Whether it lies at the end of what was tried, so that a better one may lie beyond."""
        return self.factor in (min(self.losses), max(self.losses))

    @cached_property
    def fitted(self) -> float | None:
        """The minimum of the parabola in log(factor) through the best factor and its neighbors.

        None where the best lies at the end, or a neighbor diverged.
        """
        return fitted_optimum(self.losses)


def fitted_optimum(losses: Mapping[float, float]) -> float | None:
    """Return the factor at the minimum of the parabola in log(factor) through the lowest loss and its two neighbors.

    Args:
        losses: by factor, above 0. None where the lowest lies at an end, or the three losses are not finite or equal.
    """
    factors = sorted(losses)
    best = min(range(len(factors)), key=lambda i: losses[factors[i]])
    near = factors[best - 1 : best + 2] if best else []
    if len(near) < 3 or not all(math.isfinite(losses[factor]) for factor in near):
        return None
    at = np.log(near)
    curvature, slope, _ = np.polyfit(at - at[1], [losses[factor] for factor in near], 2)
    return float(np.exp(at[1] - slope / (2 * curvature))) if curvature > 0 else None


@dataclass(frozen=True)
class Arm:
    """A method with runs at some factors."""

    name: str
    """As it stands in the names of the experiments."""
    runs: Mapping[float, Mapping[int, Row]]
    """By factor, ascending, and seed."""

    @property
    def label(self) -> str:
        """What people call it."""
        return label_of(self.name)

    def figures(self, column: str, factor: float) -> dict[int, float]:
        """Return a figure at a factor by seed, for the runs that have it."""
        values = {seed: number(row, column) for seed, row in self.runs.get(factor, {}).items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, column: str, factor: float) -> float | None:
        """Return the mean over seeds of a figure at a factor; None if no run has it."""
        values = self.figures(column, factor).values()
        return statistics.fmean(values) if values else None

    @cached_property
    def choice(self) -> Choice | None:
        """The factor of the lowest ``loss_selection``; None where no run has that."""
        counted = {factor: self._selection(factor) for factor in self.runs}
        counted = {factor: losses for factor, losses in counted.items() if losses}
        if not counted:
            return None
        seeds = set.intersection(*(set(losses) for losses in counted.values()))
        if not seeds:  # no seed was run everywhere: the one that was at most factors
            most = max({s for losses in counted.values() for s in losses}, key=lambda s: (self._tried(s), -s))
            seeds = {most}
            counted = {factor: losses for factor, losses in counted.items() if most in losses}
        means = {factor: statistics.fmean(losses[s] for s in seeds) for factor, losses in counted.items()}
        best = min(means, key=lambda factor: means[factor])
        return Choice(best, means, tuple(sorted(seeds))) if math.isfinite(means[best]) else None

    def _selection(self, factor: float) -> dict[int, float]:
        losses: dict[int, float] = self.figures("loss_selection", factor)
        diverged = [seed for seed, row in self.runs[factor].items() if text(row, "diverged").lower() == "true"]
        return losses | dict.fromkeys(diverged, math.inf)

    def _tried(self, seed: int) -> int:
        return sum(seed in self._selection(factor) for factor in self.runs)


@dataclass(frozen=True)
class Outcome:
    """An arm at the factor chosen for it, beside the reference at its own."""

    arm: Arm
    choice: Choice
    difference: PairedDifference | None
    """Of ``loss_report``, this arm minus the reference; None for the reference itself, or without common seeds."""
    adjusted: float | None
    """Its p-value by Holm's method within the cell."""
    over_documents: Interval | None
    """Bootstrap interval over documents and seeds; None where the losses by document are not known."""
    reference: bool
    """Whether it is the arm that the others are compared with."""

    @property
    def losses(self) -> dict[int, float]:
        """``loss_report`` by seed."""
        return self.at_the_best("loss_report")

    @property
    def interval(self) -> Interval | None:
        """Of the mean of ``losses``: how far the seeds scatter."""
        return mean_interval(list(self.losses.values()))

    def at_the_best(self, column: str) -> dict[int, float]:
        """Return a figure by seed at the chosen factor."""
        return self.arm.figures(column, self.choice.factor)

    def mean(self, column: str) -> float | None:
        """Return the mean over seeds of a figure at the chosen factor."""
        return self.arm.mean(column, self.choice.factor)


@dataclass(frozen=True)
class Cell:
    """Arms that are compared with each other."""

    grid: str
    """The pattern of the experiments' names."""
    place: Mapping[str, str]
    """By axis other than those of arm and factor, the entry."""
    arms: Mapping[str, Arm]

    @property
    def name(self) -> str:
        """Its entries, for a heading."""
        return ", ".join(self.place.values()) or self.grid.partition("{")[0].strip("-")

    @property
    def rows(self) -> list[Row]:
        """All runs."""
        return [row for arm in self.arms.values() for runs in arm.runs.values() for row in runs.values()]

    @property
    def reference(self) -> Arm | None:
        """The arm that the others are compared with."""
        return next((self.arms[name] for name in REFERENCES if name in self.arms), None)

    @property
    def shared(self) -> Arm | None:
        """The arm of Coupled Adam."""
        return next((self.arms[name] for name in SHARED if name in self.arms), None)

    @property
    def tuned(self) -> bool:
        """Whether some arm was tried at more than one factor, and a loss to choose by is known."""
        return any(arm.choice is not None and len(arm.runs) > 1 for arm in self.arms.values())

    def fact(self, column: str) -> str:
        """Return what all runs have in a column; empty if they differ or do not have it."""
        values = {text(row, column) for row in self.rows}
        return values.pop() if len(values) == 1 else ""

    def outcomes(self, documents: Mapping[str, DocumentLosses] | None = None) -> list[Outcome]:
        """Compare each arm at its best with the reference at its own, in the order of the grid.

        Args:
            documents: losses by document of each run, by name.
        """
        chosen = [(arm, arm.choice) for arm in self.arms.values()]
        against = self.reference
        found = []
        for arm, choice in chosen:
            if choice is None or not arm.figures("loss_report", choice.factor):
                continue
            difference = over = None
            if against is not None and against.choice is not None and arm is not against:
                base = against.choice.factor
                difference = difference_at(against, base, arm, choice.factor)
                over = _over_documents(against.runs[base], arm.runs[choice.factor], documents or {})
            found.append((arm, choice, difference, over))
        adjusted = holm([difference.p_value if difference else None for _, _, difference, _ in found])
        return [
            Outcome(arm, choice, difference, p, over, arm is against)
            for (arm, choice, difference, over), p in zip(found, adjusted, strict=True)
        ]


def difference_at(
    first: Arm, first_factor: float, second: Arm, second_factor: float, column: str = "loss_report"
) -> PairedDifference | None:
    """Return a figure of ``second`` minus ``first``, each at a factor, over the seeds that both have."""
    return paired_difference(first.figures(column, first_factor), second.figures(column, second_factor))


def _over_documents(
    first: Mapping[int, Row], second: Mapping[int, Row], documents: Mapping[str, DocumentLosses]
) -> Interval | None:
    names = [(text(first[seed], "name"), text(second[seed], "name")) for seed in sorted(first.keys() & second.keys())]
    if not all(name in documents for pair in names for name in pair):
        return None
    return interval_over_documents([(documents[a], documents[b]) for a, b in names])


@cache
def _places() -> dict[str, tuple[str, str, dict[str, str]]]:
    """By experiment: the pattern of its grid, its arm, and its entries on the other axes; in the order of the grids."""
    found = {}
    for grid in experiments.grids():
        if not {FACTOR, ARM} <= grid.axes.keys():
            continue
        others = [axis for axis in grid.axes if axis not in (FACTOR, ARM)]
        for chosen in itertools.product(*(grid.axes[axis] for axis in (*others, ARM, FACTOR))):
            entries = dict(zip((*others, ARM, FACTOR), chosen, strict=True))
            place = {axis: entries[axis] for axis in others}
            found[grid.pattern.format(**entries)] = (grid.pattern, entries[ARM], place)
    return found


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Gather the runs of grids with axes ``arm`` and ``factor`` into cells, in the order of the grids.

    Raises:
        InputError: two rows of one experiment and seed differ, or a row lacks its seed or factor.
    """
    places = _places()
    order = {name: i for i, name in enumerate(places)}
    # A run that was trained longer is no run of its experiment any more.
    known = [row for row in rows if text(row, "experiment") in places and not row.get("longer_from")]
    known.sort(key=lambda row: order[text(row, "experiment")])
    gathered: dict[tuple[str, tuple[str, ...]], dict[str, dict[float, dict[int, Row]]]] = {}
    entries: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for row in known:
        grid, arm, place = places[text(row, "experiment")]
        factor, seed = number(row, "lr_factor"), seed_of(row)
        if factor is None:
            raise InputError(f"{row.get('name')}: the row has no lr_factor")
        key = (grid, tuple(place.values()))
        entries[key] = place
        runs = gathered.setdefault(key, {}).setdefault(arm, {}).setdefault(factor, {})
        if runs.get(seed, row) != row:
            raise InputError(f"{row.get('name')}: two rows of this experiment and seed differ; keep one")
        runs[seed] = row
    return [
        Cell(key[0], entries[key], {arm: Arm(arm, dict(sorted(runs.items()))) for arm, runs in arms.items()})
        for key, arms in gathered.items()
    ]


def tuned_cells(rows: Iterable[Row]) -> list[Cell]:
    """Return the cells in which something was tuned."""
    return [cell for cell in cells(rows) if cell.tuned]


@dataclass(frozen=True)
class Versus:
    """Coupled Adam beside AdamW in a cell."""

    cell: Cell
    adamw: Outcome
    coupled: Outcome
    at_one_rate: PairedDifference | None
    """The difference of ``loss_report`` where the embedding has the rate of the rest: both at factor 1."""
    bits_per_byte: PairedDifference | None
    """The difference at the best factors, in bits per byte of text."""
    adjusted: float | None
    """The p-value at the best factors, by Holm's method over the cells."""


def versus(found: Iterable[Cell], documents: Mapping[str, DocumentLosses] | None = None) -> list[Versus]:
    """Compare Coupled Adam with AdamW in each cell that has both, each at its best factor."""
    made: list[Versus] = []
    for cell in found:
        first, second = cell.reference, cell.shared
        if first is None or second is None:
            continue
        outcomes = replace(cell, arms={first.name: first, second.name: second}).outcomes(documents)
        if len(outcomes) < 2:
            continue
        a, v = outcomes
        bits = difference_at(first, a.choice.factor, second, v.choice.factor, "bits_per_byte")
        made.append(Versus(cell, a, v, difference_at(first, 1.0, second, 1.0), bits, None))
    adjusted = holm([each.coupled.difference.p_value if each.coupled.difference else None for each in made])
    return [replace(each, adjusted=p) for each, p in zip(made, adjusted, strict=True)]


def factor_text(choice: Choice) -> str:
    """Format the best factor; ``≤`` or ``≥`` where it lies at the end of what was tried."""
    if len(choice.losses) == 1:
        return f"{choice.factor:g} (only one tried)"
    if not choice.at_end:
        return f"{choice.factor:g}"
    return f"{'≤' if choice.factor == min(choice.losses) else '≥'} {choice.factor:g}"
