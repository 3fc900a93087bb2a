"""A page that opens offline: its style, data and chart library are in the one file."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from coupled_adam import __version__
from coupled_adam.files import check_file_replaceable, write_text
from coupled_adam.report.charts import Chart

#: The tools of a chart; none of them sends data anywhere.
TOOLS = [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]]

#: What stands near the top of all pages, and says that they may be replaced.
MARK = '<meta name="generator" content="coupled-adam '


@dataclass(frozen=True)
class Drawn:
    """A chart as the templates take it."""

    id: str
    title: str
    caption: str
    wide: bool
    html: str


def check_page(path: Path) -> None:
    """Raise InputError unless a page may be written to ``path``: nothing is there, or a page of ours."""
    check_file_replaceable(path, MARK)


def write_page(path: Path, page: str, charts: Mapping[str, Chart], **values: Any) -> None:
    """Render the template of a page to ``path``, with ``charts.NAME`` for a ``Drawn`` and ``NAME`` for a value.

    ``page`` is the name of the page's module, ``coupled_adam.report.demo_page`` for one; its template has the same name
    and lies beside it. All extend page.html, which lies here.

    Raises:
        InputError: as ``check_page``.
    """
    check_page(path)
    package, _, name = page.rpartition(".")
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.FunctionLoader(_reader(p)) for p in (package, "coupled_adam.report")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    with _python_json():
        drawn = {name: _drawn(name, chart) for name, chart in charts.items()}
    template = environment.get_template(f"{name}.html")
    write_text(path, template.render(charts=drawn, plotly=get_plotlyjs(), version=__version__, **values))


def _drawn(name: str, chart: Chart) -> Drawn:
    """Turn a chart into HTML. Its title becomes a heading of the page, which wraps where the screen is narrow."""
    figure = go.Figure(chart.figure).update_layout(title=None, margin_t=30)
    figure.update_xaxes(title_font_size=13).update_yaxes(title_font_size=13)
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{name}",
        config={"responsive": True, "displaylogo": False, "modeBarButtons": TOOLS},
    )
    return Drawn(name, chart.name, chart.caption, chart.wide, html)


@contextmanager
def _python_json() -> Iterator[None]:
    """Have plotly write JSON as Python does, whatever is installed: orjson refuses some names that a file may have."""
    config = plotly.io.json.config
    before, config.default_engine = config.default_engine, "json"
    try:
        yield
    finally:
        config.default_engine = before


def _reader(package: str) -> Callable[[str], str | None]:
    def read(name: str) -> str | None:
        file = files(package).joinpath(name)
        return file.read_text("utf-8") if file.is_file() else None

    return read
