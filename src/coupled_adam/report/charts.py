"""The charts of the report."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from coupled_adam.geometry.arrays import Float64, Matrix, as_matrix

#: The colours of Okabe and Ito, which people with any colour vision tell apart.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class TokenMap:
    """The tokens of one model in the plane of its mean direction and its widest direction across it."""

    coordinates: Float64
    """(tokens, 2): along the mean embedding, and along the first principal component of the rest."""
    labels: list[str]
    counts: list[int]


def curves(title: str, series: Mapping[str, Points], *, highest: float | None = None) -> go.Figure:
    """One line a run over training steps."""
    figure = go.Figure()
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        x, y = zip(*points, strict=True) if points else ((), ())
        hover = f"{html.escape(name)}<br>step %{{x}}: %{{y:.4g}}<extra></extra>"
        line = {"color": colour, "width": 2.5}
        figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", line=line, hovertemplate=hover)
    figure.update_xaxes(title="training step")
    figure.update_yaxes(range=None if highest is None else [0, highest])
    return _styled(figure, title, height=340)


def map_tokens(embedding: Matrix, labels: Sequence[str], counts: Sequence[int], limit: int = 3000) -> TokenMap:
    """Project a (V, H) matrix onto the plane that shows its mean shift best; keep ``limit`` tokens.

    The tokens that are kept are evenly spread over the ranks of frequency, so that they stand for the whole vocabulary.

    The first axis points from the origin to the mean embedding μ, the second along the first principal component of
    what is orthogonal to μ. The plane passes through the origin, so distances from it are not distorted by centring.
    """
    e = as_matrix(embedding)
    mean = e.mean(0)
    along = mean / np.linalg.norm(mean)
    rest = (e - mean) - np.outer((e - mean) @ along, along)
    _, directions = np.linalg.eigh(rest.T @ rest)
    across = directions[:, -1] * np.sign(directions[np.abs(directions[:, -1]).argmax(), -1])
    ranked = np.argsort(-np.asarray(counts), kind="stable")
    kept = ranked[np.linspace(0, len(e) - 1, min(limit, len(e))).round().astype(int)]
    coordinates = np.stack([e @ along, e @ across], axis=1)[kept]
    return TokenMap(coordinates, [labels[i] for i in kept], [int(counts[i]) for i in kept])


def token_maps(maps: Mapping[str, TokenMap]) -> go.Figure:
    """The maps side by side on the same scale, the origin marked with a cross, tokens on hover."""
    figure = make_subplots(cols=len(maps), subplot_titles=list(maps), horizontal_spacing=0.06)
    everything = np.concatenate([m.coordinates for m in maps.values()] + [np.zeros((1, 2))])
    low, high = everything.min(0), everything.max(0)
    margin = 0.05 * (high - low)
    for column, token_map in enumerate(maps.values(), start=1):
        figure.add_scatter(
            x=np.round(token_map.coordinates[:, 0], 4),
            y=np.round(token_map.coordinates[:, 1], 4),
            mode="markers",
            marker={
                "size": 4,
                "opacity": 0.6,
                "color": np.round(np.log10(np.asarray(token_map.counts) + 1), 3),
                "colorscale": "Viridis",
                "showscale": column == len(maps),
                "colorbar": {"title": "log₁₀<br>count", "thickness": 12},
            },
            text=[html.escape(repr(label)) for label in token_map.labels],
            customdata=token_map.counts,
            hovertemplate="%{text}, %{customdata} times<extra></extra>",
            row=1,
            col=column,
        )
        cross = {"symbol": "x", "size": 12, "color": "#d00000", "line": {"color": "white", "width": 1}}
        origin = "origin<extra></extra>"
        figure.add_scatter(x=[0], y=[0], mode="markers", marker=cross, hovertemplate=origin, row=1, col=column)
        figure.update_xaxes(title="along the mean embedding", row=1, col=column)
    figure.update_xaxes(range=[low[0] - margin[0], high[0] + margin[0]])
    figure.update_yaxes(range=[low[1] - margin[1], high[1] + margin[1]])
    figure.update_yaxes(title="widest direction across it", row=1, col=1)
    return _styled(figure, None, height=480).update_layout(showlegend=False)


def _styled(figure: go.Figure, title: str | None, height: int) -> go.Figure:
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    margin = {"l": 60, "r": 20, "t": 70 if title else 40, "b": 50}
    return figure.update_layout(
        template="plotly_white", title=title, height=height, margin=margin, legend=legend, hovermode="closest"
    )
