"""Other people's models in, figures of their embeddings and a verdict out."""

from coupled_adam.errors import require

require("lm", "tokenizers", "jinja2", "plotly")
