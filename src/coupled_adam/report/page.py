"""A page that opens offline: its style, data and chart library are in the one file."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from coupled_adam.files import write_text


def write_page(path: Path, template: str, charts: Mapping[str, go.Figure], **values: Any) -> None:
    """Render ``templates/<template>.html`` to ``path``, with ``charts.NAME`` for a chart and ``NAME`` for a value."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: files("coupled_adam.report").joinpath("templates", name).read_text("utf-8")
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    drawn = {
        name: figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"chart-{name}",
            config={"responsive": True, "displaylogo": False},
        )
        for name, figure in charts.items()
    }
    page = environment.get_template(f"{template}.html").render(charts=drawn, plotly=get_plotlyjs(), **values)
    write_text(path, page)
