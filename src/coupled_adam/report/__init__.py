"""Figures in, tables and pages out."""

from coupled_adam.errors import require

require("lm", "jinja2", "plotly")
