"""The sections of the report on grids whose embedding rate is tuned for each method: sentences, tables and charts."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from coupled_adam.figures import FIGURES, MISSING, cell
from coupled_adam.report import charts
from coupled_adam.report.aggregate import short
from coupled_adam.report.charts import Chart
from coupled_adam.report.documents import DocumentLosses
from coupled_adam.report.paired import bracketed, difference_text, p_text, paired_difference
from coupled_adam.report.sweep_sections import SWEEP_COLORS, TextTable
from coupled_adam.report.tuned import Cell, Outcome, Versus, factor_text, number, text, versus

#: Losses higher than the lowest by more than this lie outside of the charts.
SHOWN = 1.0

#: Marks and dashes tell arms of one color apart.
SYMBOLS, DASHES = ("circle", "square", "diamond"), ("solid", "dash", "dot")

#: The axes of the charts.
FACTOR_AXIS = "factor on the embedding's rate"
LOSS_AXIS = "test loss (nats per token)"

#: Word similarity by what was done to the embedding before.
SIMILARITIES = {
    "eb_cos_sim": "raw",
    "word_similarity_centered": "centered",
    "word_similarity_post_processed": "All-but-the-Top",
}


@dataclass(frozen=True)
class Style:
    """How an arm looks in all charts of a page."""

    color: str
    symbol: str
    dash: str


def styles(found: Iterable[Cell]) -> dict[str, Style]:
    """Give every arm a color and, where there are more arms than colors, a mark and dashes."""
    names = list(dict.fromkeys(arm.label for each in found for arm in each.arms.values()))
    return {
        name: Style(
            SWEEP_COLORS[i % len(SWEEP_COLORS)],
            SYMBOLS[i // len(SWEEP_COLORS) % len(SYMBOLS)],
            DASHES[i // len(SWEEP_COLORS) % len(DASHES)],
        )
        for i, name in enumerate(names)
    }


def grids(found: Sequence[Cell]) -> list[list[Cell]]:
    """Gather the cells by grid."""
    return [[each for each in found if each.grid == grid] for grid in dict.fromkeys(each.grid for each in found)]


def setting(found: Cell) -> str:
    """Say what the models of a cell are, as far as all of its runs agree."""
    first = found.rows[0]
    parameters, tokens = number(first, "parameters"), number(first, "tokens")
    parts = [found.name]
    parts += [f"{short(int(parameters))} parameters"] if parameters else []
    parts += [f"{short(int(tokens))} tokens"] if tokens else []
    parts += [f"{batch} tokens per step"] if (batch := found.fact("batch_tokens")) else []
    parts += [f"learning rate of the rest {lr:g}"] if (lr := number(first, "lr")) and found.fact("lr") else []
    return ", ".join(parts)


def heading(found: Cell) -> str:
    """Name the section of a cell."""
    return f"Each method at its own rate of the embedding: {setting(found)}"


def heading_across(found: Sequence[Cell]) -> str:
    """Name the section that shows all cells of a grid side by side."""
    return f"The loss at each method's best rate of the embedding: {', '.join(each.name for each in found)}"


def sentence(found: Versus) -> str:
    """Say how Coupled Adam compares with AdamW, each at its best factor and both at factor 1."""
    a, v = found.adamw, found.coupled
    if v.difference is None:
        return ""
    told = (
        f"With the embedding's learning rate chosen for each (AdamW {factor_text(a.choice)}, Coupled Adam "
        f"{factor_text(v.choice)} times that of the rest), Coupled Adam's loss minus AdamW's is "
        f"{difference_text(v.difference)} ({_pairs(v.difference.count)})"
    )
    if found.at_one_rate is None:
        return f"{told}."
    one = found.at_one_rate
    return f"{told}; at one rate for all parameters it is {difference_text(one)} ({_pairs(one.count)})."


def _pairs(count: int) -> str:
    return f"{count} pairs" if count > 1 else "1 pair"


def headline(found: Sequence[Versus]) -> str:
    """Say it for all cells of a report; empty if no cell has both methods."""
    return " ".join(f"{_capital(each.cell.name)}: {told}" for each in found if (told := sentence(each)))


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def table(found: Cell, documents: Mapping[str, DocumentLosses] | None = None) -> TextTable:
    """Make one row an arm, at its best factor."""
    rows = [_arm_row(outcome) for outcome in found.outcomes(documents)]
    headings = [
        ("method", ""),
        ("best factor", ""),
        ("optimum", "fitted"),
        ("loss", "at the best factor"),
        ("minus AdamW's", "[95%]"),
    ]
    headings += [("p", "Holm"), ("over documents", "[95%]"), ("loss", "at factor 1")]
    headings += [(FIGURES[name].column, "") for name in ("isotropy", "mean_shift_ratio")]
    headings += [("r̄", name) for name in SIMILARITIES.values()] + [("step", "rms"), ("seeds", "")]
    return TextTable(
        "Factor: the learning rate of the embedding over that of the rest, chosen by the loss on one half of the "
        "held-out text; all losses are those of the other half. ≤ or ≥: the best factor lies at the end of what was "
        "tried; fitted: the minimum of the parabola through it and its neighbors, in the logarithm of the factor. "
        "Differences: means over pairs of runs with the same seed, with 95% t intervals; p from two-sided paired "
        "t-tests, with Holm's correction over the table; over documents: bootstrap interval over documents and "
        "seeds.",
        tuple(headings),
        tuple(rows),
    )


def _arm_row(outcome: Outcome) -> tuple[str, ...]:
    loss, at_one = outcome.mean("loss_report"), outcome.arm.mean("loss_report", 1.0)
    rms = outcome.mean("step_rms")
    return (
        outcome.arm.label,
        factor_text(outcome.choice),
        cell(outcome.choice.fitted, "{:.3g}"),
        cell(loss, "{:.3f}"),
        difference_text(outcome.difference),
        p_text(outcome.adjusted),
        bracketed(outcome.over_documents),
        cell(at_one, "{:.3f}"),
        cell(outcome.mean("isotropy"), FIGURES["isotropy"].form),
        cell(outcome.mean("ratio norm"), FIGURES["mean_shift_ratio"].form),
        *(cell(outcome.mean(column), FIGURES["word_similarity"].form) for column in SIMILARITIES),
        MISSING if rms is None else f"{rms:.2g}",
        str(len(outcome.losses)),
    )


def table_across(found: Sequence[Cell], documents: Mapping[str, DocumentLosses] | None = None) -> TextTable:
    """Make one row a cell: Coupled Adam against AdamW, each at its best factor there."""
    rows = []
    for each in versus(found, documents):
        a, v = each.adamw, each.coupled
        first = each.cell.rows[0]
        kappa = [number(first, column) for column in ("kappa_rows", "kappa_text")]
        rows.append(
            (
                each.cell.name,
                text(first, "batch_tokens") or MISSING,
                text(first, "vocab_size") or MISSING,
                text(first, "beta2") or MISSING,
                *(cell(None if value is None else 100 * value, "{:.1f}%") for value in kappa),
                f"{cell(a.mean('loss_report'), '{:.3f}')} ({factor_text(a.choice)})",
                f"{cell(v.mean('loss_report'), '{:.3f}')} ({factor_text(v.choice)})",
                difference_text(v.difference),
                p_text(each.adjusted),
                bracketed(v.over_documents),
                difference_text(each.bits_per_byte, ".4f"),
                difference_text(each.at_one_rate),
                str(v.difference.count if v.difference else 0),
            )
        )
    return TextTable(
        "Coupled Adam against AdamW, each at the factor on the embedding's learning rate that is best for it, in "
        "brackets next to its loss. κ > 1: the share of the vocabulary and of the training text whose second moment "
        "Adam forgets between two occurrences. Differences: Coupled Adam minus AdamW, means over pairs of runs with "
        "the same seed, with 95% t intervals; p with Holm's correction over the table.",
        (
            ("cell", ""),
            ("tokens", "per step"),
            ("vocabulary", ""),
            ("β2", "of the embedding"),
            ("κ > 1", "of the vocabulary"),
            ("κ > 1", "of the text"),
            ("AdamW", "loss (factor)"),
            ("Coupled Adam", "loss (factor)"),
            ("difference", "[95%]"),
            ("p", "Holm"),
            ("over documents", "[95%]"),
            ("difference", "bits per byte"),
            ("difference", "at factor 1"),
            ("pairs", ""),
        ),
        tuple(rows),
    )


def drawn(found: Cell, styled: Mapping[str, Style]) -> list[Chart]:
    """Draw a cell: losses and word similarity against the factor, loss by frequency, and the front."""
    outcomes = found.outcomes()
    made = [
        Chart(
            against_factor(f"Loss against the embedding's rate: {found.name}", outcomes, "loss_report", styled),
            "Nats per token on the half of the held-out text not used to choose the rate, over the seeds used to "
            f"choose it; a star marks the chosen factor. Losses more than {SHOWN:g} above the lowest are not shown.",
        ),
        Chart(
            by_decile(f"Loss by frequency: {found.name}", outcomes, styled),
            "Tenths of the held-out text, from its rarest tokens to its most frequent; each method at its best "
            "factor, minus AdamW at its best; means over pairs.",
        ),
    ]
    for column, name in SIMILARITIES.items():
        chart = against_factor(f"Word similarity, {name}: {found.name}", outcomes, column, styled)
        made.append(Chart(chart, "100·correlation with human ratings, mean of the benchmarks; higher is better."))
    made += [
        Chart(
            front(f"Loss and isotropy: {found.name}", outcomes, "isotropy", "isotropy", styled),
            "Every method at the factors tried, in order along its line; a star marks its best factor. Lower right "
            "is better in both.",
        ),
        Chart(
            front(f"Loss and word similarity: {found.name}", outcomes, "eb_cos_sim", "word similarity r̄", styled),
            "Loss against word similarity, every method at the factors tried; a star marks its best factor.",
        ),
    ]
    return [chart for chart in made if any(len(trace.x) for trace in chart.figure.data)]


def drawn_across(found: Sequence[Cell], styled: Mapping[str, Style]) -> list[Chart]:
    """Draw the loss at each arm's best factor, a chart a cell."""
    caption = (
        "Means over seeds with 95% t intervals, in brackets the factor; the line is AdamW. A seed that is good for "
        "one method is good for the others, so the differences within pairs, in the table, are more precise."
    )
    return [
        Chart(at_the_best(f"At its best: {each.name}", outcomes, styled), caption, wide=True)
        for each in found
        if (outcomes := each.outcomes())
    ]


def at_the_best(title: str, outcomes: Sequence[Outcome], styled: Mapping[str, Style]) -> go.Figure:
    """Draw the loss at each arm's best factor with its t interval."""
    figure = go.Figure()
    names = []
    for outcome in outcomes:
        mean, interval = outcome.mean("loss_report"), outcome.interval
        name = f"{outcome.arm.label} ({factor_text(outcome.choice)})"
        names.append(name)
        told = "the reference" if outcome.reference else f"minus AdamW's: {difference_text(outcome.difference)}"
        figure.add_scatter(
            x=[mean],
            y=[name],
            error_x={"array": [interval.high - (mean or 0.0)], "thickness": 1.5} if interval else None,
            mode="markers",
            name=outcome.arm.label,
            marker={"size": 9, "color": styled[outcome.arm.label].color, "symbol": styled[outcome.arm.label].symbol},
            hovertemplate=f"{html.escape(name)}: %{{x:.3f}}<br>{html.escape(told)}<extra></extra>",
            showlegend=False,
            meta=_meta(styled[outcome.arm.label]),
        )
    for outcome in outcomes:
        if outcome.reference:
            line = {"dash": "dot", "width": 1, "color": styled[outcome.arm.label].color}
            figure.add_vline(x=outcome.mean("loss_report"), line=line)
    figure.update_xaxes(title="test loss (nats)")  # the names leave little room
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], automargin=True)
    return charts.styled(figure, title, height=140 + 26 * len(outcomes))


def against_factor(title: str, outcomes: Sequence[Outcome], column: str, styled: Mapping[str, Style]) -> go.Figure:
    """Draw a figure against the factor, a line an arm; a star marks the factor chosen."""
    lines = []
    for outcome in outcomes:
        values = _of_choosing_seeds(outcome, column)
        lines.append((outcome, [(factor, values[factor]) for factor in outcome.choice.losses if factor in values]))
    loss = column == "loss_report"
    figure = _lines(title, lines, styled, "factor %{x:g}: %{y:.3f}", lambda outcome: outcome.choice.factor)
    figure.update_xaxes(title=FACTOR_AXIS, type="log")
    figure.update_xaxes(**charts.ticks(factor for outcome in outcomes for factor in outcome.choice.losses))
    figure.update_yaxes(title=LOSS_AXIS if loss else "100·correlation")
    if loss:
        _bound(figure)
    return figure


def by_decile(title: str, outcomes: Sequence[Outcome], styled: Mapping[str, Style]) -> go.Figure:
    """Draw the loss by decile of frequency minus that of the reference, each at its best factor."""
    lines = []
    columns = [f"loss_decile_{i}" for i in range(1, 11)]
    for base in (outcome for outcome in outcomes if outcome.reference):
        for outcome in outcomes:
            found = [paired_difference(base.at_the_best(column), outcome.at_the_best(column)) for column in columns]
            lines.append((outcome, [(i, each.mean) for i, each in enumerate(found, start=1) if each]))
    figure = _lines(title, lines, styled, "tenth %{x:g}: %{y:+.3f}", lambda outcome: None)
    figure.update_xaxes(title="tenth of the text, rare to frequent", dtick=1)
    figure.update_yaxes(title="loss minus AdamW's (nats per token)")
    return figure


def front(title: str, outcomes: Sequence[Outcome], column: str, axis: str, styled: Mapping[str, Style]) -> go.Figure:
    """Draw the loss of every arm at every factor against another figure; a star marks each arm's best factor."""
    lines, stars = [], {}
    for outcome in outcomes:
        losses, values = _of_choosing_seeds(outcome, "loss_report"), _of_choosing_seeds(outcome, column)
        shared = [factor for factor in outcome.choice.losses if factor in losses and factor in values]
        lines.append((outcome, [(values[factor], losses[factor]) for factor in shared]))
        stars[outcome.arm.name] = values.get(outcome.choice.factor)
    figure = _lines(
        title, lines, styled, f"{axis} %{{x:.3g}}, loss %{{y:.3f}}", lambda outcome: stars[outcome.arm.name]
    )
    figure.update_xaxes(title=axis)
    figure.update_yaxes(title=LOSS_AXIS)
    _bound(figure)
    return figure


def _of_choosing_seeds(outcome: Outcome, column: str) -> dict[float, float]:
    """The mean of a figure by factor over the seeds that chose, so that no point is of other seeds than the next."""
    found = {}
    for factor in outcome.choice.losses:
        values = outcome.arm.figures(column, factor)
        if set(outcome.choice.seeds) <= values.keys():
            found[factor] = sum(values[seed] for seed in outcome.choice.seeds) / len(outcome.choice.seeds)
    return found


def _lines(
    title: str,
    lines: Sequence[tuple[Outcome, Sequence[tuple[float, float]]]],
    styled: Mapping[str, Style],
    told: str,
    starred: Callable[[Outcome], float | None],
) -> go.Figure:
    """Draw a line an arm; where its x is that of ``starred``, the mark is a star."""
    figure = go.Figure()
    for outcome, points in lines:
        if not points:
            continue
        x, y = zip(*points, strict=True)
        style, chosen = styled[outcome.arm.label], starred(outcome)
        figure.add_scatter(
            x=x,
            y=y,
            name=outcome.arm.label,
            mode="lines+markers",
            line={"color": style.color, "dash": style.dash, "width": 2},
            marker={
                "symbol": ["star" if value == chosen else style.symbol for value in x],
                "size": [14 if value == chosen else 6 for value in x],
                "opacity": 1,
            },
            hovertemplate=f"{html.escape(outcome.arm.label)}<br>{told}<extra></extra>",
            meta=_meta(style),
        )
    return charts.styled(figure, title, height=340 + 20 * len(lines))


def _meta(style: Style) -> str | None:
    return "ink" if style.color == charts.INK else None


def _bound(figure: go.Figure) -> None:
    """Leave out losses that lie so high that the others would look alike."""
    values = [value for trace in figure.data for value in trace.y]
    if values and max(values) - min(values) > SHOWN:
        figure.update_yaxes(range=[min(values) - 0.05, min(values) + SHOWN])
