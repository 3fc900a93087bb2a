"""The charts of the report over many runs, by section."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from coupled_adam import experiments
from coupled_adam.figures import FIGURES
from coupled_adam.lm.config import OPTIMIZER_LABELS
from coupled_adam.report import charts, sweep_sections, tuned_sections
from coupled_adam.report.aggregate import ADAMW, COUPLED, Comparison, SeedGroup, largest, spread, sweep
from coupled_adam.report.charts import Chart
from coupled_adam.report.documents import DocumentLosses
from coupled_adam.report.sweep_sections import TextTable
from coupled_adam.report.sweeps import Sweeps
from coupled_adam.report.tuned import Cell, versus


@dataclass(frozen=True)
class Section:
    """A heading, and what stands under it in this order."""

    heading: str
    charts: Sequence[Chart] = ()
    text: str = ""
    table: TextTable | None = None


def sections(
    found: Sequence[SeedGroup],
    pairs: Sequence[Comparison],
    swept: Sequence[Sweeps],
    tuned: Sequence[Cell],
    documents: Mapping[str, DocumentLosses],
) -> list[Section]:
    """Make the sections for what the runs hold.

    Args:
        found: all groups of runs.
        pairs: AdamW and Coupled Adam, as far as they are compared.
        swept: sweeps over learning rates.
        tuned: methods that are compared at their best rates of the embedding.
        documents: losses by document of each run, by name.
    """
    made: list[Section] = []
    if pairs:
        made.append(Section(f"During training: {largest(pairs).setting}", _curves(largest(pairs))))
        made.append(Section(f"Why the mean embedding moves: {largest(pairs).setting}", _drifts(largest(pairs))))
    if len(pairs) > 1:
        made.append(Section("Model and data size", _sizes(pairs)))
    scaled, sgd = sweep(found, "coupling_scale"), sweep(found, "lr_factor")
    made += [Section(f"Scaled Coupled Adam: {line[0].setting}", _scaled(line)) for line in scaled]
    made += [Section(f"SGD on the embedding: {line[0].setting}", _sgd(line, found)) for line in sgd]
    for each in swept:
        text, table = sweep_sections.sentences(each), sweep_sections.table(each)
        made.append(Section(sweep_sections.heading(each), sweep_sections.drawn(each), text, table))
    if swept:
        heading = "Learning-rate sensitivity in the paper on output embedding centering, arXiv 2601.02031"
        made.append(Section(heading, table=sweep_sections.published()))
    made += _tuned(tuned, documents)
    if pairs:
        drawn = _embeddings(largest(pairs))
        made.append(Section(f"The embeddings: {largest(pairs).setting}", drawn, charts.MAP_CAPTION))
    return [section for section in made if section.charts or section.table]


def _tuned(tuned: Sequence[Cell], documents: Mapping[str, DocumentLosses]) -> list[Section]:
    made = []
    for grid in tuned_sections.grids(tuned):
        styles = tuned_sections.styles(grid)
        charts_across = tuned_sections.drawn_across(grid, styles)
        across = tuned_sections.table_across(grid, documents)
        made.append(Section(tuned_sections.heading_across(grid), charts_across, table=across if across.rows else None))
        for cell in grid:
            told = " ".join(tuned_sections.sentence(each) for each in versus([cell]))
            drawn, table = tuned_sections.drawn(cell, styles), tuned_sections.table(cell, documents)
            made.append(Section(tuned_sections.heading(cell), drawn, told, table))
    return made


def _curves(pair: Comparison) -> list[Chart]:
    def drawn(figure: str, highest: float | None = None) -> go.Figure:
        lines = [
            (run.method, [(line["step"], line[figure]) for line in run.curve if line.get(figure) is not None])
            for group in (pair.adamw, pair.coupled)
            for run in group.runs
        ]
        return charts.curves(FIGURES[figure].title, lines, y=FIGURES[figure].axis, highest=highest)

    return [
        Chart(
            drawn("validation_loss"),
            "Nats per token on held-out text, one line per seed; lower is better.",
        ),
        Chart(drawn("isotropy", 1.02), "1 = isotropic: no preferred direction."),
        Chart(
            drawn("mean_shift_ratio", 1.0),
            "How far the mean embedding is from the origin, relative to the length of an embedding.",
        ),
    ]


def _drifts(pair: Comparison) -> list[Chart]:
    return charts.drifts({g.first.method: [run.curve for run in g.runs] for g in (pair.adamw, pair.coupled)})


def _sizes(pairs: Sequence[Comparison]) -> list[Chart]:
    def drawn(figure: str) -> go.Figure:
        series: dict[str, list[tuple[float, ...]]] = {}
        for pair in pairs:
            for group in (pair.adamw, pair.coupled):
                if found := group.moments(figure):
                    name = f"{group.first.model}, {group.first.method}"
                    series.setdefault(name, []).append((group.first.tokens, found.mean, found.deviation or 0.0))
        title, y = FIGURES[figure].title, FIGURES[figure].axis
        made = charts.curves(title, series.items(), y=y, x="training tokens", highest=1.05, log_x=True)
        return made.update_xaxes(**charts.ticks(pair.coupled.first.tokens for pair in pairs))

    return [
        Chart(
            drawn("isotropy"),
            "Whether more parameters or more text change the isotropy; bars: one standard deviation over seeds.",
        ),
        Chart(
            drawn("mean_shift_ratio"),
            "Whether they change the shift off the origin; bars: one standard deviation over seeds.",
        ),
    ]


def _swept(x: str, points: Mapping[float, SeedGroup], figure: str, baselines: Mapping[str, SeedGroup]) -> go.Figure:
    values = [
        (at, found.mean, found.deviation or 0.0)
        for at, group in sorted(points.items())
        if (found := group.moments(figure))
    ]
    optimizer = next(iter(points.values())).first.experiment.optimizer.embedding.name
    series: dict[str, charts.Points] = {OPTIMIZER_LABELS[optimizer]: values}
    if values:
        for name, group in baselines.items():
            if found := group.moments(figure):
                series[name] = [(values[0][0], found.mean, 0.0), (values[-1][0], found.mean, 0.0)]
    return charts.curves(FIGURES[figure].title, series.items(), y=FIGURES[figure].axis, x=x)


def _scaled(line: Sequence[SeedGroup]) -> list[Chart]:
    points = {-math.log2(group.first.experiment.optimizer.embedding.coupling_scale): group for group in line}

    def drawn(figure: str) -> go.Figure:
        return _swept("n (second moment scaled by 2⁻ⁿ)", points, figure, {})

    return [
        Chart(
            drawn("validation_loss"),
            "The effective learning rate of the embedding grows with n; n = 0 is plain Coupled Adam.",
        ),
        Chart(drawn("isotropy"), "Too large a step leaves the embedding less isotropic."),
        Chart(
            drawn("word_similarity"),
            "Agreement with human ratings, 100·correlation; higher is better.",
        ),
    ]


def _sgd(line: Sequence[SeedGroup], found: Sequence[SeedGroup]) -> list[Chart]:
    points = {group.first.experiment.optimizer.embedding.lr_factor: group for group in line}
    setting = line[0].first.setting
    baselines = {g.first.method: g for g in found if g.first.setting == setting and g.first.method in (ADAMW, COUPLED)}

    def drawn(figure: str) -> go.Figure:
        return _swept("f, factor on the learning rate", points, figure, baselines)

    return [
        Chart(
            drawn("validation_loss"),
            "SGD keeps the embeddings centered too; its loss says whether the step size fits.",
        ),
        Chart(drawn("isotropy"), "Level lines: the adaptive optimizers in the same setting."),
        Chart(drawn("mean_shift_ratio"), "SGD does not divide gradients by a per-token moment."),
    ]


def _embeddings(pair: Comparison) -> list[Chart]:
    both = (pair.adamw, pair.coupled)
    samples = {g.first.method: s for g in both if (s := g.first.token_sample)}
    spectra = {g.first.method: values for g in both if (values := g.first.embeddings.get("singular_values"))}
    if not samples:
        return []
    drawn = [
        *charts.token_maps(samples),
        charts.norm_against_frequency(samples),
        Chart(
            charts.token_scatter("Projection e·μ against frequency", samples, "projection"),
            "Far from zero, and ordered by frequency, if the common direction separates frequent tokens from "
            "rare ones.",
        ),
    ]
    if moments := {name: sample for name, sample in samples.items() if sample.second_moment}:
        low, high = experiments.published_second_moment_fit()
        drawn.append(
            Chart(
                charts.token_scatter("Adam's second moment against frequency", moments, "second_moment", log_y=True),
                "Mean over the components; a straight line is the proportionality that makes Adam's step depend on the "
                f"token's frequency (R² {_fit(pair)}; the paper: {low:g}–{high:g}).",
            )
        )
    if spectra:
        drawn.append(charts.spectrum(spectra))
    return drawn


def _fit(pair: Comparison) -> str:
    figure = FIGURES["second_moment_frequency_fit"]
    return spread(pair.adamw.moments(figure.name), figure.form)
