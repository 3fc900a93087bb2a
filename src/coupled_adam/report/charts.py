"""The charts of the report."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from coupled_adam.evaluation.token_sample import TokenSample
from coupled_adam.figures import FIGURES

#: The colors of Okabe and Ito, which people with any color vision tell apart.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")

#: Ticks of a logarithmic axis.
MOST_TICKS = 8

Points = Sequence[tuple[float, ...]]

#: The color of the text. A trace that has it says "ink" in its ``meta``, and has the page's own color in dark mode;
#: "dots" are less transparent there.
INK = "#1c2430"

#: From rare to frequent tokens, by hue: each stands out from a white and from a black page.
FREQUENCY_SCALE = ((0.0, "#3577bd"), (0.5, "#96799f"), (1.0, "#df6a1c"))

MAP_CAPTION = (
    "In the maps every dot is a token; hover over it, or open the data, to read it. All maps have one scale, the same "
    "on both axes. The mean norm of a map's embeddings is 1, so the distance of the mean from the origin is the mean "
    "shift ratio. Horizontal: position along the mean embedding. Vertical: position along the direction of largest "
    "variance orthogonal to it."
)

#: What the charts of the drift mean, by what people call the optimizer.
DRIFT_CAPTIONS = {
    "AdamW": (
        "How far each cause has moved the mean embedding off the origin, summed over all steps, along the direction in "
        "which it now lies. Together with the mean at initialization they add up to ‖μ‖."
    ),
    "Coupled Adam": (
        "The same with Coupled Adam. With one shared second moment, only gradients that do not sum to zero can move "
        "the mean."
    ),
}


@dataclass(frozen=True)
class Chart:
    """A chart, and what it means in one sentence."""

    figure: go.Figure
    caption: str
    wide: bool = False
    """Whether it takes half of the page, as maps do, instead of a third."""

    @property
    def name(self) -> str:
        """What a screen reader calls it: its title, or else what it means."""
        return self.figure.layout.title.text or self.caption


def curves(
    title: str,
    lines: Iterable[tuple[str, Points]],
    *,
    y: str,
    x: str = "training step",
    highest: float | None = None,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = True,
) -> go.Figure:
    """Lines of ``y`` over training steps, or over what ``x`` names; a third number of a point is its error bar.

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
    figure.update_xaxes(title=x, **(log_axis(_all(figure, "x")) if log_x else {}))
    figure.update_yaxes(title=y, **(log_axis(_all(figure, "y")) if log_y else {}))
    if highest is not None:
        figure.update_yaxes(range=[0, highest])
    return styled(figure, title, height=360)


#: The name of the line that the causes of the drift add up to, but for the initial mean.
TOTAL = "‖μ‖, total"


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
        figure = curves(f"Drift with {name}", moving, y="distance moved along μ", markers=False)
        figure.update_traces(hovertemplate="%{y:.4f}")
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
        return {"line": {"color": INK, "dash": "dot", "width": 2}, "meta": "ink"}
    red, green, blue = (int(trace.line.color[i : i + 2], 16) for i in (1, 3, 5))
    return {"fill": "tozeroy", "fillcolor": f"rgba({red}, {green}, {blue}, 0.12)"}


#: What is drawn against the frequency of tokens, by its name in a sample.
AGAINST_FREQUENCY = {"norm": "‖e‖", "projection": "e·μ", "second_moment": "mean second moment"}


def token_scatter(title: str, samples: Mapping[str, TokenSample], value: str, *, log_y: bool = False) -> go.Figure:
    """Draw ``norm``, ``projection`` or ``second_moment`` of sampled tokens against how often they occur."""
    figure = go.Figure()
    for i, (name, sample) in enumerate(samples.items()):
        figure.add_scatter(
            x=[count + 1 for count in sample.count or ()],
            y=getattr(sample, value),
            name=name,
            mode="markers",
            marker={"size": 4, "opacity": 0.6, "color": COLORS[i % len(COLORS)]},
            meta="dots",
            text=_labels(sample),
            hovertemplate="%{text}: %{y:.3g}<extra></extra>",
        )
    figure.update_xaxes(title="count in the training text + 1", **log_axis(_all(figure, "x")))
    figure.update_yaxes(title=AGAINST_FREQUENCY[value], **(log_axis(_all(figure, "y")) if log_y else {}))
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
        curves(
            "Spectrum",
            lines,
            x="rank of the singular value",
            y="singular value over the largest",
            log_y=True,
            markers=False,
        ),
        "Singular values over the largest: one that towers above the rest is a dominant direction.",
    )


def token_maps(samples: Mapping[str, TokenSample]) -> list[Chart]:
    """Draw a map for each sample: the plane of the mean embedding and the widest direction orthogonal to it.

    Lengths are in mean norms of the sample, and all maps have one range, on both axes: a cloud that is round in that
    plane is round in its map, and one that is twice as wide is drawn twice as wide.
    """
    placed = {name: _in_mean_norms(sample) for name, sample in samples.items()}
    along, across = ([v for place in placed.values() for v in place[axis]] for axis in (0, 1))
    x_range, y_range = _square(_range(along), _range(across))
    made = []
    for name, sample in samples.items():
        x, y = placed[name]
        figure = go.Figure()
        figure.add_scatter(
            x=x,
            y=y,
            name="tokens",
            mode="markers",
            marker={"size": 4, "opacity": 0.6} | _by_count(sample.count),
            meta="dots",
            text=_labels(sample),
            hovertemplate="%{text}<extra></extra>",
        )
        cross = {"symbol": "x", "size": 12, "color": "#d00000", "line": {"color": "white", "width": 1}}
        ring = {"symbol": "circle-open", "size": 13, "color": INK, "line": {"width": 3}}
        for point, at, marker in (("origin", (0.0, 0.0), cross), ("mean", (np.mean(x), np.mean(y)), ring)):
            figure.add_scatter(
                x=[float(at[0])],
                y=[float(at[1])],
                name=point,
                mode="markers",
                marker=marker,
                meta="ink" if marker is ring else None,
                hovertemplate=f"{point}<extra></extra>",
            )
        figure.update_xaxes(title="along the mean (mean norms)", range=x_range, constrain="domain")
        figure.update_yaxes(title="orthogonal to it (mean norms)", range=y_range, constrain="domain")
        figure.update_yaxes(scaleanchor="x", scaleratio=1)
        figure = styled(figure, name, height=570 if sample.count else 500).update_layout(showlegend=False)
        made.append(Chart(figure, "Red cross: the origin. Ring: the mean of the tokens shown.", wide=True))
    return made


def _in_mean_norms(sample: TokenSample) -> tuple[list[float], list[float]]:
    """Return the positions of a sample over its mean norm; as they are, where that is zero."""
    largest = max(sample.norm, default=0.0)
    unit = largest * float(np.mean([norm / largest for norm in sample.norm])) if largest > 0 else 1.0
    unit = unit if 0 < unit < float("inf") else 1.0
    return [value / unit for value in sample.along], [value / unit for value in sample.across]


def _square(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Widen the shorter of two ranges to the length of the longer."""
    half = max(x[1] - x[0], y[1] - y[0]) / 2
    middle_x, middle_y = (x[0] + x[1]) / 2, (y[0] + y[1]) / 2
    return [middle_x - half, middle_x + half], [middle_y - half, middle_y + half]


def _by_count(counts: Sequence[int] | None) -> dict[str, Any]:
    if counts is None:
        return {"color": COLORS[1]}
    return {
        "color": np.round(np.log10(np.asarray(counts) + 1), 3).tolist(),
        "colorscale": FREQUENCY_SCALE,
        "showscale": True,
        "colorbar": {
            "title": {"text": "log₁₀ of the count in the training text", "side": "top"},
            "orientation": "h",
            "thickness": 10,
            "y": -0.17,
            "yanchor": "top",
        },
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


def _all(figure: go.Figure, axis: str) -> list[float]:
    return [value for trace in figure.data for value in trace[axis]]


def log_axis(values: Iterable[float]) -> dict[str, Any]:
    """Return the settings of a logarithmic axis: ticks at powers of ten, or at 1, 2 and 5 where these are few."""
    positive = [value for value in values if 0 < value < float("inf")]
    if not positive:
        return {"type": "log"}
    low, high = math.log10(min(positive)), math.log10(max(positive))
    digits, stride = ((1,), math.ceil((high - low) / MOST_TICKS)) if high - low > 1.5 else ((1, 2, 5), 1)
    powers = range(math.floor(low), math.ceil(high) + 1, max(stride, 1))
    return {"type": "log"} | ticks(digit * 10.0**power for power in powers for digit in digits)


def ticks(values: Iterable[float]) -> dict[str, Any]:
    """Return the settings of an axis with ticks at these values."""
    at = sorted(set(values))
    return {"tickvals": at, "ticktext": [number_text(value) for value in at]}


def number_text(value: float) -> str:
    """Write a number for a tick or a sentence: 0.003, but 3·10⁻⁴ where there would be more zeros."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,g}" if float(value).is_integer() else f"{value:g}"
    digits, _, exponent = f"{value:.3e}".partition("e")
    power = f"10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    return power if float(digits) == 1 else f"{float(digits):g}·{power}"


def styled(figure: go.Figure, title: str | None, height: int) -> go.Figure:
    """Give a chart the look that all have. It is transparent: the page decides what is behind it."""
    # At the foot, where several lines of it cover nothing.
    legend = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
    margin = {"l": 60, "r": 20, "t": 40, "b": 50}
    # Powers of ten: the prefixes of SI, µ above all, look like quantities.
    figure.update_xaxes(exponentformat="power", automargin=True).update_yaxes(exponentformat="power", automargin=True)
    return figure.update_layout(
        template="plotly_white",
        title=title,
        height=height,
        margin=margin,
        legend=legend,
        hovermode="closest",
        font={"color": INK, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
