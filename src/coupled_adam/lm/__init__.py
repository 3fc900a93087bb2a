"""Language models: text in, checkpoints out."""

from coupled_adam.errors import require

require("demo", "numpy", "gensim", "tokenizers", "pydantic", "tomli_w", "filelock", "rich", "xxhash")
