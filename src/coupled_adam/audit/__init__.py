"""Other people's models in, figures of their embeddings and a verdict out."""

from coupled_adam.errors import require

require("demo", "tokenizers", "jinja2", "plotly")
