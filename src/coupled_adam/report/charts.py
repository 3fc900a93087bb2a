"""The charts of the report."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from coupled_adam.evaluation.token_sample import TokenSample
from coupled_adam.figures import FIGURES

#: The colors of Okabe and Ito, which people with any color vision tell apart.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")

Points = Sequence[tuple[float, ...]]

MAP_CAPTION = (
    "Every dot is a token (hover to read it), the red cross the origin. Across: the position along the mean embedding. "
    "Up: along the widest direction at right angles to it."
)


#: What the charts of the drift mean, by what people call the optimizer.
DRIFT_CAPTIONS = {
    "AdamW": (
        "How far each cause has moved the mean embedding off the origin, summed over all steps, along the direction in "
        "which it now lies. With the little that the initial mean has there they add up to ‖μ‖."
    ),
    "Coupled Adam": (
        "The same: rows that share one second moment leave gradients that do not sum to zero as the only cause."
    ),
}


@dataclass(frozen=True)
class Chart:
    """A chart, and what it means in one sentence."""

    figure: go.Figure
    caption: str
    wide: bool = False

    @property
    def name(self) -> str:
        """What a screen reader calls it: its title, or else what it means."""
        return self.figure.layout.title.text or self.caption


def curves(
    title: str,
    lines: Iterable[tuple[str, Points]],
    *,
    x: str = "training step",
    highest: float | None = None,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = True,
) -> go.Figure:
    """Lines over training steps, or over what ``x`` names; a third number of a point is its error bar.

    Lines of one name have one color and one entry in the legend.
    """
    figure, known = go.Figure(), list[str]()
    for name, points in lines:
        first = name not in known
        if first:
            known.append(name)
        i = known.index(name)
        columns = list(zip(*points, strict=True)) if points else [(), ()]
        figure.add_scatter(
            x=columns[0],
            y=columns[1],
            error_y={"array": columns[2], "thickness": 1} if len(columns) > 2 else None,
            name=name,
            legendgroup=name,
            showlegend=first,
            mode="lines+markers" if markers else "lines",
            line={
                "color": COLORS[i % len(COLORS)],
                "width": 2.5,
                "dash": "solid" if i < len(COLORS) else "dash",
            },
            hovertemplate=f"{html.escape(name)}<br>{html.escape(x)} %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    figure.update_xaxes(title=x, type="log" if log_x else "linear")
    figure.update_yaxes(range=None if highest is None else [0, highest], type="log" if log_y else "linear")
    return styled(figure, title, height=360)


#: The name of the line that the causes of the drift add up to, but for the initial mean.
TOTAL = "‖μ‖, all together"


def drifts(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[Chart]:
    """Draw why the mean embedding moved, a chart for each name in ``runs``, all on one scale; none without figures.

    Args:
        runs: by name, the evaluations of some runs, as metrics.jsonl has them.
    """
    causes = [figure for figure in FIGURES.values() if figure.name.startswith("drift_")]
    names = {figure.name: figure.label.removeprefix("drift: ") for figure in causes} | {"norm_of_mean": TOTAL}
    series = {
        name: [
            (label, [(line["step"], line[key]) for line in curve if line.get(key) is not None])
            for key, label in names.items()
            for curve in evaluations
            if any(line.get("drift_gradients") is not None for line in curve)
        ]
        for name, evaluations in runs.items()
    }
    drawn = [value for lines in series.values() for _, points in lines for _, value in points]
    if not drawn:
        return []
    still = {label for label in names.values() if not any(_moves(label, lines) for lines in series.values())}
    made = []
    for name, lines in series.items():
        moving = [line for line in lines if line[0] not in still]
        figure = curves(f"Drift with {name}", moving, markers=False).update_traces(hovertemplate="%{y:.4f}")
        figure.for_each_trace(lambda trace: trace.update(_filled(trace)))
        figure.update_layout(hovermode="x unified", yaxis={"range": _range(drawn)})
        figure.update_xaxes(unifiedhovertitle={"text": "step %{x}"})
        made.append(Chart(figure, DRIFT_CAPTIONS.get(name, f"The same with {name}.")))
    return made


def _moves(label: str, lines: Iterable[tuple[str, Points]]) -> bool:
    return any(value != 0 for other, points in lines if other == label for _, value in points)


def _filled(trace: Any) -> dict[str, Any]:
    """A cause is filled down to zero in its color; their sum is a dotted line in the color of the text."""
    if trace.name == TOTAL:
        return {"line": {"color": "#1c2430", "dash": "dot", "width": 2}}
    red, green, blue = (int(trace.line.color[i : i + 2], 16) for i in (1, 3, 5))
    return {"fill": "tozeroy", "fillcolor": f"rgba({red}, {green}, {blue}, 0.12)"}


def token_scatter(title: str, samples: Mapping[str, TokenSample], value: str, *, log_y: bool = False) -> go.Figure:
    """Draw ``norm``, ``projection`` or ``second_moment`` of sampled tokens against how often they occur."""
    figure = go.Figure()
    for i, (name, sample) in enumerate(samples.items()):
        figure.add_scatter(
            x=np.asarray(sample.count) + 1,
            y=getattr(sample, value),
            name=name,
            mode="markers",
            marker={"size": 4, "opacity": 0.5, "color": COLORS[i % len(COLORS)]},
            text=_labels(sample),
            hovertemplate="%{text}: %{y:.3g}<extra></extra>",
        )
    figure.update_xaxes(title="occurrences in the training text + 1", type="log")
    figure.update_yaxes(type="log" if log_y else "linear")
    return styled(figure, title, height=380)


def norm_against_frequency(samples: Mapping[str, TokenSample]) -> Chart:
    """Draw the norms of tokens against how often they occur."""
    return Chart(
        token_scatter("Norm ‖e‖ against frequency", samples, "norm"),
        "A cloud that rises or falls: the length of an embedding depends on how often its token occurs.",
    )


def spectrum(values: Mapping[str, Sequence[float]]) -> Chart:
    """Draw singular values, largest first, over the largest; zeros are left out of the logarithmic scale."""
    lines = [
        (name, [(i + 1, float(x / singular[0])) for i, x in enumerate(singular) if x > 0])
        for name, singular in values.items()
    ]
    return Chart(
        curves("Spectrum", lines, x="rank of the singular value", log_y=True, markers=False),
        "Singular values over the largest: one that towers above the rest is a dominating direction.",
    )


def token_maps(samples: Mapping[str, TokenSample]) -> go.Figure:
    """Draw the plane of the mean embedding and the widest direction across it, side by side on one scale.

    The origin is marked with a cross; a dot tells its token on hover.
    """
    figure = make_subplots(cols=len(samples), subplot_titles=list(samples), horizontal_spacing=0.06)
    for column, sample in enumerate(samples.values(), start=1):
        figure.add_scatter(
            x=sample.along,
            y=sample.across,
            mode="markers",
            marker={"size": 4, "opacity": 0.6} | _by_count(sample.count, shown=column == len(samples)),
            text=_labels(sample),
            hovertemplate="%{text}<extra></extra>",
            row=1,
            col=column,
        )
        cross = {"symbol": "x", "size": 12, "color": "#d00000", "line": {"color": "white", "width": 1}}
        origin = "origin<extra></extra>"
        figure.add_scatter(x=[0], y=[0], mode="markers", marker=cross, hovertemplate=origin, row=1, col=column)
        figure.update_xaxes(title="along the mean embedding", row=1, col=column)
    figure.update_xaxes(range=_range([x for s in samples.values() for x in s.along]))
    figure.update_yaxes(range=_range([y for s in samples.values() for y in s.across]))
    figure.update_yaxes(title="widest direction across it", row=1, col=1)
    return styled(figure, None, height=480).update_layout(showlegend=False)


def _by_count(counts: Sequence[int] | None, shown: bool) -> dict[str, Any]:
    if counts is None:
        return {"color": COLORS[1]}
    return {
        "color": np.round(np.log10(np.asarray(counts) + 1), 3),
        "colorscale": "Viridis",
        "showscale": shown,
        "colorbar": {"title": "log₁₀<br>count", "thickness": 12},
    }


def _labels(sample: TokenSample) -> list[str]:
    texts = [html.escape(repr(text)) for text in sample.text]
    if sample.count is None:
        return texts
    return [f"{text}, {count:,} times" for text, count in zip(texts, sample.count, strict=True)]


def _range(values: Sequence[float]) -> list[float]:
    """From the smallest to the largest and the origin, with a margin."""
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.05 * (high - low) or 1.0
    return [low - margin, high + margin]


def styled(figure: go.Figure, title: str | None, height: int) -> go.Figure:
    """Give a chart the look that all have."""
    # Below the chart, where several lines of it cover nothing.
    legend = {"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0}
    margin = {"l": 60, "r": 20, "t": 40, "b": 50}
    return figure.update_layout(
        template="plotly_white", title=title, height=height, margin=margin, legend=legend, hovermode="closest"
    )
