"""Figures in, tables and pages out."""

from coupled_adam.errors import require

require("demo", "jinja2", "plotly")
