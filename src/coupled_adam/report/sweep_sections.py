"""The sections of the report on sweeps over learning rates: a sentence, a table and charts for each."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from coupled_adam import experiments
from coupled_adam.figures import FIGURES, MISSING, Figure, cell, figures
from coupled_adam.report import charts
from coupled_adam.report.aggregate import ADAMW
from coupled_adam.report.charts import Chart
from coupled_adam.report.sweeps import Sweep, Sweeps

#: What AdamW with centering is called.
CENTERED = f"{ADAMW} + center"

#: The head, and the rest, of runs in which nothing rounds to bfloat16.
EXACT = ("float32", "float32")

#: Norms of the mean below this are drawn at it: those of centered embeddings, which are rounding errors.
LEAST_NORM = 1e-3

#: Sweeps have more lines than other charts; the colors are those of Okabe and Ito, too.
SWEEP_COLORS = (*charts.COLORS, "#56b4e9", charts.INK, "#e69f00")
DASHES = ("solid", "dash", "solid", "dash", "dot", "dot", "dashdot")


@dataclass(frozen=True)
class TextTable:
    """A table ready to print; the first column names the row."""

    caption: str
    headings: tuple[tuple[str, str], ...]
    """A heading, and the small print under it."""
    rows: tuple[tuple[str, ...], ...]
    published: bool = False


def heading(found: Sweeps) -> str:
    """Say what the section compares."""
    if found.of == "core":
        return f"The optimizer of the rest, with {found.lines[0].first.method} on the embedding: {found.setting}"
    return f"Learning rates: {found.setting}"


def sentences(found: Sweeps) -> str:
    """Say which sweep depends most and least on the learning rate, and how they compare at their best."""
    rates = found.rates
    if len(rates) < 2:
        return "The sweeps have fewer than two learning rates in common."
    by_sensitivity = sorted(found.lines, key=lambda line: line.sensitivity(rates))
    by_loss = sorted(found.lines, key=lambda line: line.losses[line.best(rates)])
    lowest, highest = (line.losses[line.best(rates)] for line in (by_loss[0], by_loss[-1]))
    text = [
        f"Learning-rate sensitivity (LRS) over {len(rates)} learning rates from {rates[0]:g} to {rates[-1]:g}:",
        "; ".join(f"{line.name} {line.sensitivity(rates):.3f}" for line in by_sensitivity) + ".",
        f"The best losses lie between {lowest:.3f} ({by_loss[0].name}) and {highest:.3f} ({by_loss[-1].name}).",
        "LRS is the mean distance of the loss from its lowest, over all learning rates but the best one. A run that",
        f"diverged, or ended above it, counts with the loss before training, {found.lines[0].initial_loss:.2f}.",
    ]
    noise = rounding(found)
    if noise:
        text += [
            f"Without rounding {ADAMW} and {CENTERED} would be the same run here, as no gradient depends on the mean.",
            "Their losses differ by " + ", ".join(f"{value:.3f} at {rate:g}" for rate, value in noise.items()) + ":",
            "differences of this size between two single runs mean nothing.",
        ]
    return " ".join(text)


def rounding(found: Sweeps) -> dict[float, float]:
    """Return by learning rate what centering makes of the loss of AdamW, where only rounding can make a difference.

    With an untied head, plain cross entropy and no decay (an output embedding has none here), subtracting the mean row
    changes no probability and no gradient. Empty where that does not hold or the runs are not there; a head that rounds
    to bfloat16 depends on the mean.
    """
    run = found.lines[0].first
    if found.of != "method" or run.experiment.model.tied or (run.head, run.experiment.train.precision) != EXACT:
        return {}
    losses = [line.losses for name in (ADAMW, CENTERED) for line in found.lines if line.first.method == name]
    return {rate: abs(losses[0][rate] - losses[1][rate]) for rate in found.rates} if len(losses) == 2 else {}


def table(found: Sweeps) -> TextTable:
    """Make one row a sweep: sensitivity, best loss, and what the largest learning rate does."""
    rates = found.rates
    last = f"at {rates[-1]:g}" if rates else ""
    shown = figures(("norm_of_mean", "mean_shift_ratio", "logit_max", "isotropy"))
    rows = []
    for line in found.lines:
        row = [line.name, line.first.head]
        row += [f"{line.sensitivity(rates):.3f}" if len(rates) > 1 else MISSING]
        if rates:
            best = line.best(rates)
            row += [f"{line.losses[best]:.3f}", f"{best:g}"]
            row += [f"{line.losses[rates[-1]]:.3f}", *(_mean(line, rates[-1], figure) for figure in shown)]
        else:
            row += [MISSING] * (3 + len(shown))
        rows.append((*row, ", ".join(f"{rate:g}" for rate in line.diverged) or MISSING))
    headings = [(found.of, ""), ("head", ""), ("LRS", ""), ("best loss", ""), ("best lr", ""), ("loss", last)]
    headings += [*((figure.column, last) for figure in shown), ("diverged", "at")]
    return TextTable("Means over seeds.", tuple(headings), tuple(rows))


def drawn(found: Sweeps) -> list[Chart]:
    """Draw loss and figures against the learning rate."""
    made = [
        Chart(
            _losses(found),
            "Nats per token on held-out text; the rate is the peak of the schedule. A cross marks a diverged run.",
        )
    ]
    if found.of == "method":
        made += [
            Chart(
                _figures(found, "norm_of_mean", floor=LEAST_NORM, log_y=True),
                f"How far the mean embedding is from the origin; values below {LEAST_NORM:g} are drawn there.",
            ),
            Chart(
                _figures(found, "logit_max", log_y=True),
                "The largest absolute logit of a position, mean over held-out text. In bfloat16, neighboring "
                "numbers are 0.125 apart at 16 to 32, and 2 at 256 to 512.",
            ),
        ]
    made += [
        Chart(_figures(found, "mean_shift_ratio", highest=1.02), "The shift off the origin relative to the length."),
        Chart(_figures(found, "isotropy", highest=1.02), "1 = isotropic: no preferred direction."),
    ]
    return [chart for chart in made if any(len(trace.x) for trace in chart.figure.data)]


def published() -> TextTable:
    """Make the table of the paper on output embedding centering: a row a method, a column a size."""
    found = experiments.published_sweeps()
    sizes, rates = list(dict.fromkeys(sweep.model for sweep in found)), experiments.published_learning_rates()
    shown = figures(("norm_of_mean", "logit_max"))
    rows: dict[str, list[str]] = {}
    largest: dict[str, list[str]] = {}
    for sweep in found:
        strength = "" if sweep.coefficient is None else f", λ = {sweep.coefficient:g}".replace("e-0", "e-")
        best = "" if sweep.best_loss is None else f" ({sweep.best_loss:.3f})"
        rows.setdefault(sweep.method + strength, []).append(f"{sweep.lr_sensitivity:.3f}{best}")
        lists = [getattr(sweep, figure.name) for figure in shown]
        cells = [cell(values[-1] if values else None, "{:g}") for values in lists]
        largest.setdefault(sweep.method + strength, cells)  # of the first size, of which most is known
    small = f"{sizes[0]} at {rates[-1]:g}"
    return TextTable(
        f"LRS over {len(rates)} learning rates from {rates[0]:g} to {rates[-1]:g} by model size; in brackets the "
        "best loss, where known. AdamW, untied, bfloat16 head, 13.1B tokens, one seed.",
        (("method", ""), *((size, "") for size in sizes), *((figure.column, small) for figure in shown)),
        tuple((name, *cells, *largest[name]) for name, cells in rows.items()),
        published=True,
    )


def _mean(line: Sweep, rate: float, figure: Figure) -> str:
    found = line.at(rate).moments(figure.name)
    return cell(found.mean if found else None, figure.form)


def _losses(found: Sweeps) -> go.Figure:
    rates = found.rates
    lines = []
    for line in found.lines:
        sensitivity = f" (LRS {line.sensitivity(rates):.3f})" if len(rates) > 1 else ""
        points = [(rate, loss, line.deviation(rate)) for rate, loss in line.losses.items()]
        lines.append((line.name + sensitivity, points))
    figure = _against_rate(FIGURES["validation_loss"], lines)
    for trace, line in zip(figure.data, found.lines, strict=True):
        crossed = [rate in line.diverged for rate in line.losses]
        trace.marker = {"symbol": ["x" if c else "circle" for c in crossed], "size": [11 if c else 6 for c in crossed]}
    return figure


def _figures(
    found: Sweeps, name: str, *, floor: float | None = None, highest: float | None = None, log_y: bool = False
) -> go.Figure:
    lines = []
    for line in found.lines:
        points = []
        for rate in line.losses:
            if values := line.at(rate).moments(name):
                mean = values.mean if floor is None else max(values.mean, floor)
                points.append((rate, mean, 0.0 if log_y else values.deviation or 0.0))
        lines.append((line.name, points))
    return _against_rate(FIGURES[name], lines, highest=highest, log_y=log_y)


def _against_rate(
    drawn: Figure, lines: Sequence[tuple[str, charts.Points]], *, highest: float | None = None, log_y: bool = False
) -> go.Figure:
    figure = charts.curves(
        drawn.title, lines, y=drawn.axis, x="learning rate", highest=highest, log_x=True, log_y=log_y
    )
    figure.update_xaxes(**charts.ticks(point[0] for _, points in lines for point in points))
    for i, trace in enumerate(figure.data):  # dashes, for lines that cover each other
        color = SWEEP_COLORS[i % len(SWEEP_COLORS)]
        trace.line.update(color=color, dash=DASHES[i % len(DASHES)])
        trace.meta = "ink" if color == charts.INK else None
    return figure.update_layout(height=340 + 20 * len(lines))
